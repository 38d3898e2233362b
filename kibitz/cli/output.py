"""The command line writes results to stdout, progress and errors to stderr.

What models, files and people wrote is shown as `Text` without control characters, never as rich markup: it can
neither colour the screen nor send escape sequences to the terminal.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

PACKAGE = Path(__file__).parents[1]


def harmless(text: str) -> str:
    """The text with everything but printable signs, spaces and line breaks taken out."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)


def sentence(error: Exception) -> str:
    """Return an error as one line. If kibitz did not raise it, the line also says how to see the traceback."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    text = " ".join(text.split())
    return text if _raised_by_kibitz(error) else f"{text} (`--debug` shows where)"


def _raised_by_kibitz(error: Exception) -> bool:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is None or Path(frame.tb_frame.f_code.co_filename).is_relative_to(PACKAGE)


class Output:
    """The two consoles of a command, and what `--quiet` and `--json` do to them. Of the processes that torchrun started, the
    first speaks, and the others of their mistakes only."""

    def __init__(self, quiet: bool = False, as_json: bool = False):
        rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
        self.is_main = rank == "0"
        self.as_json = as_json
        self.live = not quiet and not as_json and self.is_main
        self.console = Console(highlight=False, quiet=not self.is_main)
        self.errors = Console(stderr=True, highlight=False, quiet=not self.is_main)
        self.mistake = "error: " if self.is_main else f"error in process {rank}: "

    def result(self, tree: dict[str, Any], show: Callable[[Console], None]) -> None:
        """One JSON object under `--json`; else what `show` prints for a person."""
        if not self.is_main:
            return
        if self.as_json:
            self.console.file.write(json.dumps(_finite(tree), ensure_ascii=True, allow_nan=False) + "\n")
        else:
            show(self.console)

    def say(self, text: str) -> None:
        """A remark on the way, left out when nobody watches."""
        if self.live:
            self.errors.print(Text(harmless(text), style="dim"))

    def fail(self, text: str) -> None:
        said = Text.assemble((self.mistake, "bold red"), harmless(text))
        Console(stderr=True, highlight=False).print(said, soft_wrap=True)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no paths."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
