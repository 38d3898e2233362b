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

from kibitz.training.progress import Bar, harmless, is_first_process


class Output:
    """The two consoles of a command, and what `--quiet` and `--json` do to them. Of the processes that torchrun started, the
    first speaks, and the others of their mistakes only."""

    def __init__(self, quiet: bool = False, as_json: bool = False):
        self.is_main = is_first_process()
        self.as_json = as_json
        self.live = not quiet and not as_json and self.is_main
        self.console = Console(highlight=False, quiet=not self.is_main)
        self.errors = Console(stderr=True, highlight=False, quiet=not self.is_main)
        self.mistake = "error: " if self.is_main else f"error in process {os.environ['RANK']}: "
        self.watched: Bar | None = None

    def result(self, tree: dict[str, Any], show: Callable[[Console], None]) -> None:
        """One JSON object under `--json`; else what `show` prints for a person."""
        if not self.is_main:
            return
        if self.as_json:
            self.console.file.write(json.dumps(_finite(tree), ensure_ascii=True, allow_nan=False) + "\n")
        else:
            show(self.console)

    def bar(self) -> Bar:
        """The progress of a run, drawn where somebody watches."""
        self.watched = Bar(self.errors if self.live else None)
        return self.watched

    def doing(self) -> str:
        """What the command is about, for one that fails: a phase and a step of a run, or nothing."""
        return "" if self.watched is None else f" while {self.watched.doing()}"

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
