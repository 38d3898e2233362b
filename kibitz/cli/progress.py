"""The progress of a run on a terminal: a bar with the time left, and one line of numbers."""

from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from kibitz.cli.output import harmless

PHASES = {
    "rollouts": "student writes",
    "teacher": "teacher scores",
    "student": "student learns",
    "evaluation": "evaluating",
    "checkpoint": "saving",
}
LINES_WITHOUT_TERMINAL = 10
SPEED_SECONDS = 1800.0  # of the last steps, from which the time left is foretold: a step can take minutes


class Bar:
    """The progress object of `kibitz.train`. In a log file, where nothing can be redrawn, it writes a few lines."""

    def __init__(self, console: Console):
        self.console = console
        self.accuracy: float | None = None
        self.figures = ""
        self.steps = 0
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            speed_estimate_period=SPEED_SECONDS,
        )
        self.task = self.progress.add_task("starting", total=None)
        self.live = Live(get_renderable=self._drawn, console=console, transient=True, refresh_per_second=8)

    def _drawn(self) -> Group:
        return Group(self.progress, Text(self.figures, style="dim", no_wrap=True, overflow="ellipsis"))

    def __enter__(self) -> "Bar":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def start(self, recipe: Any, first_step: int) -> None:
        self.steps = recipe.steps
        self.progress.update(self.task, total=recipe.steps, completed=first_step)

    def phase(self, name: str) -> None:
        self.progress.update(self.task, description=PHASES.get(name, harmless(name).replace("_", " ")))

    def step(self, row: dict[str, Any]) -> None:
        self.figures = self._figures(row)
        self.progress.update(self.task, completed=row["step"])
        if (
            not self.console.is_terminal
            and self.steps
            and row["step"] % max(1, self.steps // LINES_WITHOUT_TERMINAL) == 0
        ):
            self.console.print(f"step {row['step']}/{self.steps}  {self.figures}", markup=False, soft_wrap=True)

    def evaluated(self, row: dict[str, Any]) -> None:
        sampled, greedy = row.get("sampled"), row.get("greedy")
        if sampled:
            self.accuracy = sampled["accuracy"]
        parts = [f"step {row.get('step', 0)}: {row.get('split', 'evaluation')}"]
        parts += [f"accuracy {sampled['accuracy']:.1%}"] if sampled else []
        parts += [f"greedy {greedy['accuracy']:.1%}"] if greedy else []
        parts += [f"reverse KL {row['reverse_kl']:.3g}"] if row.get("reverse_kl") is not None else []
        self.console.print(Text(harmless("  ".join(parts))), soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(Text(harmless(text), style="yellow"))

    def _figures(self, row: dict[str, Any]) -> str:
        shown = {"loss": row.get("loss"), "reverse KL": row.get("reverse_kl"), "reward": row.get("reward")}
        parts = [f"{name} {value:.3g}" for name, value in shown.items() if isinstance(value, int | float)]
        if self.accuracy is not None:
            parts.append(f"accuracy {self.accuracy:.1%}")
        if isinstance(speed := row.get("tokens_per_second"), int | float):
            parts.append(f"{speed:,.0f} tokens/s")
        return "  ".join(parts)
