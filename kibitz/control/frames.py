"""Pictures of one episode, side by side. They are drawn in a process of their own, which cannot end a run: where MuJoCo finds no
OpenGL it aborts the whole process.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 120
MODULE = "kibitz.control.strip"


def draw(folder: Path, name: str) -> str:
    """Draw `name` into a run's folder; returns an empty text, or why there is no picture."""
    quiet = {**os.environ, "SDL_VIDEODRIVER": "dummy", "PYGAME_HIDE_SUPPORT_PROMPT": "1"}
    try:
        ended = subprocess.run(
            [sys.executable, "-m", MODULE, str(folder), str(folder / name)],
            capture_output=True, text=True, timeout=SECONDS, check=False, env=quiet, start_new_session=True,
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
