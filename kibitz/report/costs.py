"""What a run cost: floating-point operations and seconds, by phase."""

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from kibitz.report.folder import Run, dig_number
from kibitz.report.formats import flops, percent, safe_lines, seconds


@dataclass(frozen=True)
class Phase:
    """`flops` and `seconds` are the keys under which `metrics.jsonl` counts it."""

    label: str
    flops: str
    seconds: str | None


PHASES = (
    Phase("Student writes", "student_sampling", "sampling"),
    Phase("Teacher scores", "teacher_scoring", "scoring"),
    Phase("Student learns", "student_training", "training"),
    Phase("Teacher writes", "teacher_sampling", "teacher_sampling"),
)


def total(run: Run, *path: str) -> float | None:
    """The sum over the steps, or None if no step says."""
    values = [value for row in run.metrics if (value := dig_number(row, *path)) is not None]
    return sum(values) if values else None


def total_flops(run: Run) -> float | None:
    return _sum(total(run, "flops", phase.flops) for phase in PHASES)


@dataclass
class Costs:
    """One run's costs in words. `phases` is keyed by the phase's label: FLOPs, their share, seconds, their share.

    `wall` is from start to end, with loading, evaluating and saving."""

    phases: dict[str, list[str]]
    flops: str
    seconds: str
    wall: str


def costs(run: Run) -> Costs | None:
    """None if the run counted neither operations nor seconds."""
    compute = [total(run, "flops", phase.flops) for phase in PHASES]
    time = [total(run, "seconds", phase.seconds) if phase.seconds else None for phase in PHASES]
    all_compute, all_time = _sum(compute), _sum(time)
    if all_compute is None and all_time is None:
        return None
    phases = {
        phase.label: [flops(c), _share(c, all_compute), seconds(t), _share(t, all_time)]
        for phase, c, t in zip(PHASES, compute, time, strict=True)
        if c or t
    }
    return Costs(phases, flops(all_compute), seconds(all_time), seconds(dig_number(run.info, "seconds")))


def phases_of(found: list[Costs | None]) -> list[str]:
    """The phases that any of the runs went through, in the order in which a step does."""
    return [phase.label for phase in PHASES if any(c and phase.label in c.phases for c in found)]


def charts(runs: list[Run]) -> list[dict[str, Any]]:
    """Two stacked bars a run: where the FLOPs went, where the seconds went."""
    kinds: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
        ("flops", "Compute", flops),
        ("seconds", "Time", seconds),
    )
    drawn = []
    for kind, title, words in kinds:
        traces = [trace for index, phase in enumerate(PHASES) if (trace := _bars(runs, index, phase, kind, words))]
        if traces:
            layout = go.Layout(
                template="none",
                barmode="stack",
                bargap=0.45,
                height=44 + 36 * len(runs),
                margin={"l": 12, "r": 12, "t": 4, "b": 30},
                showlegend=False,
                xaxis={"ticksuffix": " s" if kind == "seconds" else "", "tickformat": ".3~s", "nticks": 5},
                yaxis={"autorange": "reversed", "automargin": True, "showticklabels": len(runs) > 1, "showgrid": False},
            )
            drawn.append({"key": f"costs_{kind}", "title": title, "figure": go.Figure(traces, layout).to_plotly_json()})
    return drawn


def _bars(runs: list[Run], index: int, phase: Phase, kind: str, words: Callable[[float | None], str]) -> go.Bar | None:
    key = phase.flops if kind == "flops" else phase.seconds
    sizes = [total(run, kind, key) if key else None for run in runs]
    if not any(sizes):
        return None
    return go.Bar(
        x=[size or 0.0 for size in sizes],
        y=[html.escape(safe_lines(run.name)) for run in runs],
        orientation="h",
        name=phase.label,
        customdata=[words(size) for size in sizes],
        hovertemplate="%{fullData.name}: %{customdata}<extra></extra>",
        meta={"run": index, "kind": "bar"},
    )


def _sum(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _share(part: float | None, whole: float | None) -> str:
    return percent(part / whole) if part is not None and whole else ""
