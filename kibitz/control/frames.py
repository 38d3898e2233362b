"""Pictures of one episode, side by side. They are drawn in a process of their own, which cannot end a run: where MuJoCo finds no
OpenGL it aborts the whole process.

    python -m kibitz.control.frames RUN OUTPUT.png
"""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 120
HEIGHT = 160  # of a picture, in pixels, at most
MODULE = "kibitz.control.frames"


def draw(folder: Path, name: str) -> str:
    """Draw `name` into a run's folder; returns an empty text, or why there is no picture."""
    quiet = {**os.environ, "SDL_VIDEODRIVER": "dummy", "PYGAME_HIDE_SUPPORT_PROMPT": "1"}
    try:
        ended = subprocess.run(
            [sys.executable, "-m", MODULE, str(folder), str(folder / name)],
            capture_output=True, text=True, timeout=SECONDS, check=False, env=quiet,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no picture was drawn within {SECONDS} s"
    if ended.returncode == 0 and (folder / name).is_file():
        return ""
    last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return f"no picture: the process that draws ended with code {ended.returncode} ({last[:200]})"


def section(folder: Path, name: str, title: str) -> dict[str, Any]:
    """The section of the report, with the reason where there is no picture."""
    why = draw(folder, name)
    if why:
        return {"title": title, "words": why[:1].upper() + why[1:] + "."}
    return {"title": title, "words": "One episode, from left to right.", "image": name}


# ------------------------------------------------------------------ in the child


def strip(folder: Path) -> np.ndarray:
    """An episode with seed 0 in `eval.frames` pictures, equally far apart, as one picture [H, W, 3]."""
    from kibitz.config import load_as
    from kibitz.control import environments, export, rpd, taught
    from kibitz.control.recipe import DistilRecipe, RPDRecipe

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
