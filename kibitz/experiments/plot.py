"""The plot of an experiment's arms: a row an arm, best on top, accuracy with its interval, and what it cost."""

from math import floor
from pathlib import Path

from kibitz.experiments.charts import COLOURS, figure_of, saved
from kibitz.experiments.design import Experiment
from kibitz.experiments.formats import nats
from kibitz.experiments.tables import Row, models, rows

ROW = 0.27  # inches of an arm's row


def svg(experiment: Experiment, folder: Path) -> str:
    """Accuracy at temperature 1 and greedy; dashed lines are the models at temperature 1."""
    found = [row for row in rows(experiment, folder) if row.sampled and row.greedy]
    ends = {role: test["sampled"]["accuracy"] for role, test in models(experiment, folder).items() if "sampled" in test}
    with figure_of(width=8.2, height=1.1 + ROW * max(1, len(found))) as figure:
        axes = figure.subplots()
        for offset, (how, colour) in zip((0.12, -0.12), (("sampled", COLOURS[0]), ("greedy", COLOURS[1])), strict=True):
            _dots(axes, found, how, offset, colour)
        axes.set_yticks(range(len(found)), [row.arm for row in found])
        for label, row in zip(axes.get_yticklabels(), found, strict=True):
            label.set_fontweight("bold" if row.arm == experiment.reference else "normal")
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_xlim(_floor(found, list(ends.values())), 100)
        for role, share in ends.items():
            axes.axvline(100 * share, color="#59636e", linewidth=1, linestyle=(0, (4, 3)))
            axes.text(100 * share, -0.7, role, ha="center", va="bottom", color="#59636e", fontsize=8)
        for index, row in enumerate(found):
            cost = row.student_gflop + row.teacher_gflop + row.other_gflop
            axes.text(
                101, index, f"{nats(_mean(row))} nats, {cost:.0f} GFLOP", va="center", fontsize=8, color="#59636e"
            )
        axes.set_xlabel("accuracy, %, with 95% intervals; right: reverse KL, cost")
        figure.legend(loc="outside upper left", ncols=2)
        return saved(figure)


def _mean(row: Row) -> tuple[float, float] | None:
    return None if row.reverse_kl is None else (row.reverse_kl[0], 0.0)


def _dots(axes, found: list[Row], how: str, offset: float, colour: str) -> None:
    shares = [getattr(row, how) for row in found]
    axes.errorbar(
        [100 * share[0] for share in shares],
        [index + offset for index in range(len(found))],
        xerr=[100 * share[1] for share in shares],
        label={"sampled": "temperature 1", "greedy": "greedy"}[how],
        color=colour, marker="o", markersize=4, linestyle="none", elinewidth=1.3,
    )  # fmt: skip


def _floor(found: list[Row], others: list[float]) -> int:
    """Return the start of the axis, in percent: a multiple of ten below all values that are shown."""
    lows = [row.sampled[0] - row.sampled[1] for row in found if row.sampled]
    return max(0, 10 * floor(10 * min(lows + others, default=0.0)))
