"""The cost of a run by phase: floating-point operations, seconds and memory."""

import html
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from kibitz.report.folder import Run, dig_number
from kibitz.report.formats import DASH, flops, percent, safe_lines, seconds, size


@dataclass(frozen=True)
class Phase:
    """`flops` and `seconds` are the keys under which `metrics.jsonl` counts it."""

    label: str
    flops: str
    seconds: str


LAST_STEPS = 6  # whose timeline is drawn: of more, nobody would see the gaps
ELSE = "Everything else"
PHASES = (
    Phase("Student writes", "student_sampling", "sampling"),
    Phase("Teacher scores", "teacher_scoring", "scoring"),
    Phase("Reference scores", "reference_scoring", "scoring"),
    Phase("Opponent learns", "opponent_training", "scoring"),
    Phase("Student learns", "student_training", "training"),
    Phase("Teacher writes", "teacher_sampling", "sampling"),
)


def total(run: Run, *path: str) -> float | None:
    """The sum over the steps, or None if no step says."""
    values = [value for row in run.metrics if (value := dig_number(row, *path)) is not None]
    return sum(values) if values else None


def total_flops(run: Run) -> float | None:
    return _sum(total(run, "flops", phase.flops) for phase in PHASES)


def spent(run: Run, phase: Phase) -> tuple[float | None, float | None]:
    """FLOPs and seconds of a phase. Seconds that several phases share, such as those of writing, count once: for the one
    that computed most."""
    compute = total(run, "flops", phase.flops)
    if not compute and any(total(run, "flops", other.flops) for other in PHASES):
        return None, None  # this run has no such phase, whatever its loop spent in that place
    sharing = [other for other in PHASES if other.seconds == phase.seconds]
    owner = max(sharing, key=lambda other: total(run, "flops", other.flops) or 0.0)
    return compute, total(run, "seconds", phase.seconds) if owner is phase else None


def table(run: Run) -> dict[str, Any] | None:
    """Rows of words: phase, FLOPs, their share, seconds, their share; None if nothing was counted.

    `wall` is from start to end, with loading, evaluating and saving, of all parts of a run that was taken up again."""
    sizes = [spent(run, phase) for phase in PHASES]
    all_compute = _sum(compute for compute, _ in sizes)
    all_time = _sum(total(run, "seconds", key) for key in {phase.seconds for phase in PHASES})
    if all_compute is None and all_time is None:
        return None
    rows = [
        [phase.label, flops(compute), _share(compute, all_compute), seconds(time), _share(time, all_time)]
        for phase, (compute, time) in zip(PHASES, sizes, strict=True)
        if compute or time
    ]
    left = (all_time or 0.0) - (_sum(time for _, time in sizes) or 0.0)
    if all_time and left > 0.01 * all_time:
        rows.append([ELSE, flops(None), "", seconds(left), _share(left, all_time)])
    total_words = ["Together", flops(all_compute), "", seconds(all_time), ""]
    return {"rows": rows, "total": total_words, "wall": seconds(wall(run))}


def wall(run: Run) -> float | None:
    """Seconds from start to end, of all parts of the run; None where that is less than its steps took: an older version
    noted the last part only, and a run that has no end yet what its last checkpoint knew."""
    noted = dig_number(run.info, "seconds")
    in_steps = _sum(total(run, "seconds", key) for key in {phase.seconds for phase in PHASES})
    return None if noted is None or noted < (in_steps or 0.0) else noted


PEAKS = {
    "loading": "Loading",
    "sampling": "Writing",
    "scoring": "Scoring",
    "training": "Learning",
    "evaluation": "Evaluating",
    "saving": "Saving",
}
"""The phases of which `run.json` and `metrics.jsonl` hold the largest memory."""


def memory(run: Run) -> dict[str, str]:
    """The largest memory of each phase in words: of the device, and of the process beside a GPU. Of a run that did not end,
    what its steps say."""
    found = {}
    for key, label in PEAKS.items():
        parts = [_highest(run, unit, key) for unit in ("peak_bytes", "host_peak_bytes")]
        if parts[0] is not None or parts[1] is not None:
            host = "" if parts[1] is None else f", {size(parts[1])} of the machine"
            found[label] = (DASH if parts[0] is None else size(parts[0])) + host
    return found


def _highest(run: Run, *path: str) -> float | None:
    known = [value for row in (run.info, *run.metrics) if (value := dig_number(row, *path)) is not None]
    return max(known, default=None)


def labels(tables: list[dict[str, Any] | None]) -> dict[str, int | None]:
    """The phases that any of the runs went through, in the order in which a step does, and the number of each one's colour;
    the bars do not show everything else."""
    found = {row[0] for table in tables if table for row in table["rows"]}
    numbers = {**{phase.label: number for number, phase in enumerate(PHASES)}, ELSE: None}
    return {label: number for label, number in numbers.items() if label in found}


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
            layout = _layout(
                len(runs),
                barmode="stack",
                bargap=0.45,
                xaxis={"ticksuffix": " s" if kind == "seconds" else "", "tickformat": ".3~s", "nticks": 5},
            ).update(yaxis_showticklabels=len(runs) > 1)
            drawn.append(
                {
                    "key": f"costs_{kind}",
                    "title": title,
                    "figure": go.Figure(traces, layout).to_plotly_json(),
                    "wide": False,
                }
            )
    return drawn


def _layout(num_bars: int, **settings: Any) -> go.Layout:
    """Of bars one below the other."""
    return go.Layout(
        template="none",
        height=44 + 36 * num_bars,
        margin={"l": 12, "r": 12, "t": 4, "b": 30},
        showlegend=False,
        yaxis={"autorange": "reversed", "automargin": True, "showgrid": False},
        **settings,
    )


def timelines(runs: list[Run]) -> list[dict[str, Any]]:
    """For each run with servers: who was at work when, in its last steps. Where a lane is empty, who stands there waited."""
    drawn = []
    for index, run in enumerate(runs):
        spans = _last_spans(run)
        if not spans:
            continue
        origin = min(start for _, start, _ in spans)
        lanes = {phase.flops: (number, phase.label) for number, phase in enumerate(PHASES)}
        traces = [
            go.Bar(
                base=[start - origin for key, start, _ in spans if key == lane],
                x=[end - start for key, start, end in spans if key == lane],
                y=[label for key, _, _ in spans if key == lane],
                orientation="h",
                name=label,
                hovertemplate="%{y}: %{x:.2f} s from %{base:.2f} s on<extra></extra>",
                meta={"run": number, "kind": "bar"},
            )
            for lane, (number, label) in lanes.items()
            if any(key == lane for key, _, _ in spans)
        ]
        layout = _layout(
            len(traces),
            barmode="overlay",
            bargap=0.3,
            xaxis={"ticksuffix": " s", "nticks": 8, "range": [0, max(end for _, _, end in spans) - origin]},
        )
        title = "Who worked, who waited" + (f": {safe_lines(run.name)}" if len(runs) > 1 else "")
        figure = go.Figure(traces, layout).to_plotly_json()
        drawn.append({"key": f"timeline_{index}", "title": title, "figure": figure, "wide": True})
    return drawn


def _last_spans(run: Run) -> list[tuple[str, float, float]]:
    """Of the last steps that have a timeline: the phase, its beginning and its end."""
    rows = [row["timeline"] for row in run.metrics if isinstance(row.get("timeline"), dict)][-LAST_STEPS:]
    found = []
    for key, spans in ((key, spans) for row in rows for key, spans in row.items() if isinstance(spans, list)):
        for span in spans:
            if isinstance(span, list) and len(span) == 2 and all(isinstance(at, int | float) for at in span):
                found.append((str(key), float(span[0]), float(span[1])))
    known = {phase.flops for phase in PHASES}
    return [
        (key, start, end) for key, start, end in found if key in known and math.isfinite(start) and start <= end < 1e11
    ]


def _bars(runs: list[Run], index: int, phase: Phase, kind: str, words: Callable[[float | None], str]) -> go.Bar | None:
    sizes = [spent(run, phase)[0 if kind == "flops" else 1] for run in runs]
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
