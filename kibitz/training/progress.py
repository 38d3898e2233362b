"""The progress of a run where somebody watches: a bar with the time left and one line of numbers, or a few lines of text."""

import os
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

PHASES = {
    "rollouts": "student writes",
    "teacher": "teacher scores",
    "student": "student learns",
    "evaluation": "evaluating",
    "checkpoint": "saving",
}
LOADING = "loading"
LINES_WITHOUT_TERMINAL = 10
SPEED_SECONDS = 1800.0  # of the last steps, from which the time left is foretold: a step can take minutes


def harmless(text: str) -> str:
    """The text with everything but printable signs, spaces and line breaks taken out."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)


def is_first_process() -> bool:
    """Whether this is the process that speaks: the only one, or the first of those that torchrun started."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def bar_if_watched(quiet: bool) -> "AbstractContextManager[Bar | None]":
    """A bar on stderr if that is a terminal or a notebook; nothing for a log, unless somebody asks for it."""
    console = Console(stderr=True, highlight=False)
    watched = (console.is_terminal or console.is_jupyter) and is_first_process()
    return Bar(console) if watched and not quiet else nullcontext()


class Bar:
    """Watches a run for a person. Where nothing can be redrawn (a log, a notebook), it writes a few lines; without a console
    it only remembers what the run is doing."""

    def __init__(self, console: Console | None):
        self.console = Console(quiet=True) if console is None else console
        self.redraws = self.console.is_terminal and not self.console.quiet
        self.accuracy: float | None = None
        self.figures = ""
        self.steps, self.first_step, self.done = 0, 0, 0
        self.now, self.began = LOADING, time.monotonic()
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            speed_estimate_period=SPEED_SECONDS,
        )
        self.task = self.progress.add_task(LOADING, total=None)
        self.live = Live(get_renderable=self._drawn, console=console, transient=True, refresh_per_second=8)

    def _drawn(self) -> Group:
        return Group(self.progress, Text(self.figures, style="dim", no_wrap=True, overflow="ellipsis"))

    def __enter__(self) -> "Bar":
        if self.redraws:
            self.live.start()
        elif self.console.is_jupyter:
            self.console.print(LOADING, style="dim")
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def doing(self) -> str:
        """The present phase and step, for an error report."""
        return self.now if self.now == LOADING else f"{self.now} (step {self.done + 1} of {self.steps})"

    def start(self, recipe: Any, first_step: int) -> None:
        self.steps, self.first_step, self.done, self.began = recipe.steps, first_step, first_step, time.monotonic()
        self.progress.update(self.task, total=recipe.steps, completed=first_step)

    def phase(self, name: str) -> None:
        self.now = PHASES.get(name, harmless(name).replace("_", " "))
        self.progress.update(self.task, description=self.now)

    def step(self, row: dict[str, Any]) -> None:
        self.figures, self.done = self._figures(row), row["step"]
        self.progress.update(self.task, completed=self.done)
        if not self.redraws and self.steps and self.done % max(1, self.steps // LINES_WITHOUT_TERMINAL) == 0:
            line = f"step {self.done}/{self.steps}  {self.figures}{self._time_left()}"
            self.console.print(line, markup=False, soft_wrap=True)

    def evaluated(self, row: dict[str, Any]) -> None:
        sampled, greedy = row.get("sampled"), row.get("greedy")
        if sampled:
            self.accuracy = sampled["accuracy"]
        parts = [f"step {row.get('step', 0)}: {row.get('split', 'evaluation')}"]
        parts += [f"accuracy {sampled['accuracy']:.1%}"] if sampled else []
        parts += [f"return {row['return']['mean']:.4g}"] if row.get("return") else []
        parts += [f"greedy {greedy['accuracy']:.1%}"] if greedy else []
        parts += [f"reverse KL {row['reverse_kl']:.3g}"] if row.get("reverse_kl") is not None else []
        self.console.print(Text(harmless("  ".join(parts))), soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(Text(harmless(text), style="yellow"))

    def _time_left(self) -> str:
        """Of a run in equal steps; nothing behind the last one."""
        made, left = self.done - self.first_step, self.steps - self.done
        if made < 1 or left < 1:
            return ""
        minutes, seconds = divmod(round((time.monotonic() - self.began) / made * left), 60)
        return f"  {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"

    def _figures(self, row: dict[str, Any]) -> str:
        shown = {
            "loss": row.get("loss"),
            "reverse KL": row.get("reverse_kl"),
            "reward": row.get("reward"),
            "agreement": row.get("agreement"),
        }
        parts = [f"{name} {value:.3g}" for name, value in shown.items() if isinstance(value, int | float)]
        if self.accuracy is not None:
            parts.append(f"accuracy {self.accuracy:.1%}")
        if isinstance(speed := row.get("tokens_per_second"), int | float):
            parts.append(f"{speed:,.0f} tokens/s")
        return "  ".join(parts)
