"""The plot of an experiment as one SVG: a row an arm, accuracy with its interval, and what it cost. Light and dark."""

from collections.abc import Sequence
from html import escape
from math import floor
from pathlib import Path

from kibitz.experiments.design import Experiment
from kibitz.experiments.tables import Estimate, Row, models, nats, percent, rows

# In pixels: the names, the axis, a column of numbers, a row, the head.
NAMES, WIDTH, COLUMN, HEIGHT, TOP = 180, 430, 105, 26, 64
STYLE = """
text{font:13px system-ui,sans-serif;fill:#1f2328}
.name{font-family:ui-monospace,monospace;font-size:12px}.small{font-size:11px;fill:#59636e}
.grid{stroke:#d1d9e0}.model{stroke:#59636e;stroke-dasharray:4 3}
.sampled{fill:#0b6e99;stroke:#0b6e99}.greedy{fill:#fff;stroke:#c2571a}.bar{stroke-width:2;fill:none}
.page{fill:#fff}.band{fill:#f6f8fa}.reference{font-weight:700}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9198a1}.grid{stroke:#3d444d}.model{stroke:#9198a1}
.sampled{fill:#58b7e0;stroke:#58b7e0}.greedy{fill:#0d1117;stroke:#f0883e}.page{fill:#0d1117}.band{fill:#151b23}}
"""


def svg(experiment: Experiment, folder: Path) -> str:
    """Accuracy at temperature 1 and greedy, best arm on top; dashed lines are the models at temperature 1."""
    found = [row for row in rows(experiment, folder) if row.sampled and row.greedy]
    ends = {role: test["sampled"]["accuracy"] for role, test in models(folder).items() if "sampled" in test}
    low = _floor([row.sampled for row in found if row.sampled], list(ends.values()))
    place = _scale(low)
    bottom = TOP + HEIGHT * len(found)
    width, height = NAMES + WIDTH + 2 * COLUMN + 10, bottom + 28
    parts = [f'<rect class="page" width="{width}" height="{height}"/>']
    for y in range(TOP, bottom, 2 * HEIGHT):
        parts.append(f'<rect class="band" y="{y}" width="{width}" height="{HEIGHT}"/>')
    parts += [_head(), *_axis(low, place, bottom), *_ends(ends, place, bottom)]
    for index, row in enumerate(found):
        parts += _row(row, TOP + HEIGHT * index, place, row.arm == experiment.reference)
    inside = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(experiment.question)}">\n<style>{STYLE}</style>\n{inside}\n</svg>\n'
    )


def _floor(shares: Sequence[Estimate], others: Sequence[float]) -> int:
    """Where the axis begins, in percent: a multiple of ten below all that is shown."""
    return max(0, 10 * floor(10 * min([share[0] - share[1] for share in shares] + list(others), default=0.0)))


def _scale(low: int):
    return lambda share: round(NAMES + WIDTH * max(0.0, min(1.0, (100 * share - low) / (100 - low))), 1)


def _head() -> str:
    """The legend and the heads of the columns."""
    y, right = 16, NAMES + WIDTH
    return "\n".join(
        [
            f'<circle class="sampled" cx="{NAMES + 6}" cy="{y - 4}" r="4"/>'
            f'<text class="small" x="{NAMES + 16}" y="{y}">accuracy, temperature 1</text>',
            f'<circle class="greedy" cx="{NAMES + 166}" cy="{y - 4}" r="3.5" stroke-width="1.5"/>'
            f'<text class="small" x="{NAMES + 176}" y="{y}">greedy</text>',
            f'<text class="small" x="{NAMES + 234}" y="{y}">bars: 95% intervals</text>',
            f'<text class="small" x="{right + COLUMN}" y="{TOP - 8}" text-anchor="end">reverse KL</text>',
            f'<text class="small" x="{right + 2 * COLUMN}" y="{TOP - 8}" text-anchor="end">GFLOP</text>',
        ]
    )


def _axis(low: int, place, bottom: int) -> list[str]:
    lines = []
    for tick in range(low, 101, 10):
        x = place(tick / 100)
        lines.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}"/>')
        lines.append(f'<text class="small" x="{x}" y="{bottom + 18}" text-anchor="middle">{tick}%</text>')
    return lines


def _ends(ends: dict[str, float], place, bottom: int) -> list[str]:
    """The student before training and the teacher, as dashed lines."""
    lines = []
    for role, share in ends.items():
        x = place(share)
        lines.append(f'<line class="model" x1="{x}" x2="{x}" y1="{TOP - 4}" y2="{bottom}"/>')
        lines.append(f'<text class="small" x="{x}" y="{TOP - 8}" text-anchor="middle">{role}</text>')
    return lines


def _row(row: Row, y: int, place, reference: bool) -> list[str]:
    assert row.sampled is not None and row.greedy is not None
    middle, right = y + HEIGHT / 2, NAMES + WIDTH
    cost = f"{row.student_gflop + row.teacher_gflop + row.other_gflop:.0f}"
    told = f"{row.arm}: {row.about}. T=1 {percent(row.sampled)}, greedy {percent(row.greedy)}, rate {row.rate:g}"
    return [
        f"<g><title>{escape(told)}</title>",
        f'<text class="name{" reference" if reference else ""}" x="{NAMES - 12}" y="{middle + 4}" text-anchor="end">'
        f"{escape(row.arm)}</text>",
        _dot(row.greedy, middle - 5, place, "greedy"),
        _dot(row.sampled, middle + 5, place, "sampled"),
        f'<text class="name" x="{right + COLUMN}" y="{middle + 4}" text-anchor="end">{nats((row.reverse_kl[0], 0))}</text>',
        f'<text class="name" x="{right + 2 * COLUMN}" y="{middle + 4}" text-anchor="end">{cost}</text>',
        "</g>",
    ]


def _dot(share: Estimate, y: float, place, kind: str) -> str:
    left, right = place(share[0] - share[1]), place(share[0] + share[1])
    return f'<path class="{kind} bar" d="M{left} {y}H{right}"/><circle class="{kind}" cx="{place(share[0])}" cy="{y}" r="3.5"/>'
