"""Curves over the steps of training, one small chart for each question; several runs share the axes.

The figures carry no colours: `trace.meta` says which run a line belongs to and what it is, and the page's script
paints it in the theme of the moment.
"""

import html
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import plotly.graph_objects as go

from kibitz.report.folder import Row, Run, dig_number, number
from kibitz.report.formats import safe_lines

MAX_POINTS = 1500


@dataclass(frozen=True)
class Line:
    """One curve of a chart: `source` is the run's list it comes from, `low` and `high` the edges of its band."""

    label: str
    source: str
    path: tuple[str, ...]
    low: tuple[str, ...] = ()
    high: tuple[str, ...] = ()
    dash: str = "solid"


@dataclass(frozen=True)
class Chart:
    key: str
    title: str
    unit: str
    note: str
    lines: tuple[Line, ...]
    share: bool = False


def _accuracy(label: str, how: str, dash: str) -> Line:
    return Line(label, "evals", (how, "accuracy"), (how, "low"), (how, "high"), dash)


CHARTS = (
    Chart(
        "accuracy", "Accuracy", "right answers", "Held-out prompts; the bands are 95% intervals.",
        (_accuracy("sampled", "sampled", "solid"), _accuracy("greedy", "greedy", "dot")), share=True,
    ),
    Chart(
        "return", "Return", "of an episode", "Fresh episodes without chance in the actions; the band is a 95% interval.",
        (Line("return", "evals", ("return", "mean"), ("return", "low"), ("return", "high")),),
    ),
    Chart(
        "agreement", "Agreement", "of actions", "Where the student itself went: would the teacher have done the same?",
        (Line("agreement", "metrics", ("agreement",)),), share=True,
    ),
    Chart(
        "reverse_kl", "Reverse KL", "nats per token", "How far the student is from the teacher, on its own text.",
        (Line("training", "metrics", ("reverse_kl",)), Line("evaluation", "evals", ("reverse_kl",), dash="dot")),
    ),
    Chart("loss", "Loss", "", "What the optimiser saw.", (Line("loss", "metrics", ("loss",)),)),
    Chart("reward", "Reward", "mean", "Of the rollouts trained on.", (Line("reward", "metrics", ("reward",)),)),
    Chart("teacher_term", "Teacher's term", "", "Without its weight.", (Line("term", "metrics", ("teacher_term",)),)),
    Chart(
        "entropy", "Entropy", "nats per token", "How undecided each model is about the next token.",
        (
            Line("student", "metrics", ("student_entropy",)),
            Line("teacher", "metrics", ("teacher_entropy",), dash="dot"),
        ),
    ),
    Chart(
        "response_tokens", "Response length", "tokens", "Mean over the rollouts of a step.",
        (Line("tokens", "metrics", ("response_tokens",)),),
    ),
    Chart(
        "cut_off", "Cut off", "rollouts", "Responses that hit the limit before they ended.",
        (Line("cut off", "metrics", ("cut_off",)),), share=True,
    ),
    Chart(
        "tokens_per_second", "Speed", "tokens per second", "Sampling, scoring and training together.",
        (Line("speed", "metrics", ("tokens_per_second",)),),
    ),
    Chart(
        "grad_norm", "Gradient norm", "", "Before clipping.", (Line("gradient", "metrics", ("grad_norm",)),),
    ),
)  # fmt: skip


def charts(runs: list[Run]) -> list[dict[str, Any]]:
    """The charts that have at least two points to show: their words, and a plotly figure each."""
    held_out = any(row.get("held_out") is not False for run in runs for row in run.evals)
    drawn = []
    for chart in CHARTS:
        lines = [line for line in chart.lines if any(len(points(run, line)[0]) > 1 for run in runs)]
        if not lines:
            continue
        traces = [
            trace
            for index, run in enumerate(runs)
            for line in lines
            for trace in _traces(run, index, line, len(runs) > 1, with_band=len(runs) == 1 or line is lines[0])
        ]
        words = ", ".join(f"{'dotted' if line.dash == 'dot' else 'solid'}: {line.label}" for line in lines)
        drawn.append(
            {
                "key": chart.key,
                "title": chart.title,
                "unit": chart.unit,
                "note": chart.note if held_out else chart.note.replace("Held-out", "Training"),
                "lines": words.capitalize() + "." if len(lines) > 1 else "",
                "figure": figure(chart, traces),
            }
        )
    return drawn


def points(run: Run, line: Line) -> tuple[list[float], list[float], list[Row]]:
    """Steps, values and rows of a line, without the steps at which it is unknown."""
    rows = getattr(run, line.source)
    if line.source == "evals":
        rows = [row for row in rows if row.get("split") == main_split(run)]
    kept = [row for row in rows if dig_number(row, *line.path) is not None]
    stride = max(1, len(kept) // MAX_POINTS)
    kept = kept[::-1][::stride][::-1]  # the last point always stays
    return [row["step"] for row in kept], [dig_number(row, *line.path) or 0.0 for row in kept], kept


def main_split(run: Run) -> Any:
    """The split that is evaluated most often: the others are looked at once, at the end."""
    splits = [row.get("split") for row in run.evals]
    return max(splits, key=splits.count, default=None)


def compute_so_far(run: Run, steps: list[float]) -> list[float] | None:
    """The FLOPs spent up to each of these steps, or None if the run did not count them."""
    per_step = [row.get("flops") if isinstance(row.get("flops"), dict) else {} for row in run.metrics]
    spent = [0.0, *accumulate(sum(number(value) or 0.0 for value in step.values()) for step in per_step)]
    known = [row["step"] for row in run.metrics]
    return [spent[bisect_right(known, step)] for step in steps] if spent[-1] else None


def _traces(run: Run, index: int, line: Line, several: bool, with_band: bool) -> Iterator[go.Scatter]:
    steps, values, rows = points(run, line)
    if not steps:
        return
    compute = compute_so_far(run, steps)
    low, high = _edge(rows, line.low), _edge(rows, line.high)
    if low and high and with_band:
        there_and_back = {"step": steps + steps[::-1], "flops": compute and compute + compute[::-1]}
        yield go.Scatter(
            x=steps + steps[::-1], y=high + low[::-1], mode="lines", line={"width": 0}, fill="toself",
            hoverinfo="skip", meta={"run": index, "kind": "band", "x": there_and_back},
        )  # fmt: skip
    yield go.Scatter(
        x=steps, y=values, mode="lines+markers" if line.source == "evals" else "lines",
        line={"dash": line.dash, "width": 2}, marker={"size": 6}, cliponaxis=False,
        name=html.escape(safe_lines(f"{run.name}, {line.label}" if several else line.label)),
        meta={"run": index, "kind": "line", "x": {"step": steps, "flops": compute}},
    )  # fmt: skip


def _edge(rows: list[Row], path: tuple[str, ...]) -> list[float]:
    """One edge of a band, or nothing if any of it is unknown."""
    edge = [value for row in rows if path and (value := dig_number(row, *path)) is not None]
    return edge if len(edge) == len(rows) else []


def figure(chart: Chart, traces: list[go.Scatter]) -> dict[str, Any]:
    """The figure of a chart, for plotly."""
    highest = max((abs(value) for trace in traces for value in trace.y or ()), default=0.0)
    for trace in traces:
        if trace.hoverinfo != "skip":
            trace.hovertemplate = "%{y:.1%}" if chart.share else "%{y:,.4~r}"
    layout = go.Layout(
        template="none",
        height=240,
        margin={"l": 48, "r": 12, "t": 8, "b": 32},
        hovermode="x unified",
        showlegend=False,
        xaxis={"title": {"text": "step"}, "rangemode": "tozero"},
        yaxis={
            "tickformat": "~%" if chart.share else "~s" if highest >= 1000 else "~g",
            "rangemode": "normal" if chart.key in ("loss", "accuracy", "return") else "tozero",
        },
    )
    return go.Figure(traces, layout).to_plotly_json()
