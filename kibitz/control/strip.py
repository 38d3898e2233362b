"""Draws an episode of a run as one strip of pictures. `frames` starts it as a process of its own.

python -m kibitz.control.strip RUN OUTPUT.png
"""

import struct
import sys
import zlib
from pathlib import Path

import numpy as np

from kibitz.config import load_as
from kibitz.control import environments, export, rpd, taught
from kibitz.control.recipe import DistilRecipe, RPDRecipe

HEIGHT = 160  # of a picture, in pixels, at most


def strip(folder: Path) -> np.ndarray:
    """An episode with seed 0 in `eval.frames` pictures, equally far apart, as one picture [H, W, 3]."""
    code = folder / "policy.py"
    recipe = load_as(DistilRecipe if code.is_file() else RPDRecipe, folder / "recipe.yaml")
    if code.is_file():
        one = export.load(code.read_text(encoding="utf-8"))
        act = lambda seen_BO: np.array([one(row.tolist()) for row in seen_BO])  # noqa: E731
    else:
        act = rpd.act_of(taught.load_policy(folder))
    env = environments.make(recipe.env, render_mode="rgb_array")
    seen, pictures, over = env.reset(seed=0)[0], [], False
    while not over:
        pictures.append(small(np.asarray(env.render())))
        seen, _, terminated, truncated, _ = env.step(act(seen[None])[0])
        over = terminated or truncated
    chosen = np.linspace(0, len(pictures) - 1, recipe.eval.frames).round().astype(int)
    return np.concatenate([pictures[place] for place in chosen], axis=1)


def small(picture: np.ndarray) -> np.ndarray:
    """Every so many-th pixel, so that it is at most HEIGHT high."""
    stride = max(1, -(-picture.shape[0] // HEIGHT))
    return picture[::stride, ::stride, :3]


def png(picture_HW3: np.ndarray) -> bytes:
    """The picture as a PNG file, each line unfiltered (RFC 2083)."""
    height, width = picture_HW3.shape[:2]
    lines = b"".join(b"\0" + row.astype(np.uint8).tobytes() for row in picture_HW3)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


if __name__ == "__main__":
    run, output = map(Path, sys.argv[1:])
    output.write_bytes(png(strip(run)))
