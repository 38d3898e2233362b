"""Charts as SVG, by matplotlib: the same bytes for the same numbers, so that a test can make them again.

Another processor computes other last digits, so numbers are rounded before they are drawn, coordinates after that, and ids
are numbered in the order in which they stand.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kibitz.report.formats import level, safe_lines, visible
from kibitz.report.terminal import STYLES as HEAT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Point = tuple[float, float, float]
"""x, y, and half the 95% interval of y."""

DIGITS = 5  # of a number that is drawn
PLACES = 2  # of a coordinate, in points
COORDINATE = re.compile(r"-?\d+\.\d{3,}")
HASHED_ID = re.compile(r'(?<=["#])([a-z])[0-9a-f]{10}(?=["\)])')

COLOURS = ("#0b6e99", "#c2571a", "#3f7d3a", "#8250df", "#b35900", "#6e7781", "#a40e4c", "#1b7c83")
MARKERS = "osD^vPX*"
MOST_MARKERS = 20  # of a line; more points are a curve


@dataclass(frozen=True)
class Line:
    """Points with intervals, joined in the order of x."""

    name: str
    points: Sequence[Point]
    dashed: bool = False
    joined: bool = True


@dataclass(frozen=True)
class Panel:
    """One pair of axes. `levels` are dashed horizontals with names; `ticks` names places on the x axis."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    levels: Mapping[str, float] = field(default_factory=dict)
    log_x: bool = False
    log_y: bool = False
    percent: bool = True
    ticks: Mapping[float, str] | Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Heat:
    """Texts token by token, each with its penalty in nats, in the heat-map's colours; a line of words above each."""

    title: str
    texts: Sequence[tuple[str, Sequence[tuple[str, float]]]]


def available() -> bool:
    return find_spec("matplotlib") is not None


FEW_DECADES = 100
CLOSE = 0.05  # of the height of a panel: the name of the lower of two such levels stands below it
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "kibitz", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif",
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titleweight": "bold",
    "axes.grid": True, "grid.color": "#e4e8ec", "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8,
}  # fmt: skip


def draw(panels: Sequence[Panel | Heat], width: float = 5.2, height: float = 3.8) -> str:
    """The panels side by side; four of them in two rows."""
    rows = 2 if len(panels) == 4 else 1
    columns = len(panels) // rows
    with figure_of(width * columns, height * rows) as figure:
        for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True):
            if isinstance(panel, Heat):
                _draw_heat(axes, panel)
            else:
                _draw(axes, panel)
        return saved(figure)


@contextmanager
def figure_of(width: float, height: float) -> Iterator["Figure"]:
    """An empty figure, in inches, with our style for as long as it is drawn and saved."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained", facecolor="white")


def saved(figure: "Figure") -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    lines = (_steady_coordinates(row.rstrip()) for row in _steady_ids(file.getvalue()).splitlines())
    return "\n".join(lines) + "\n"


def steady(value: float) -> float:
    """The number with so many digits that every processor draws the same one."""
    return float(f"{value:.{DIGITS}g}")


def _steady_ids(text: str) -> str:
    """Ids that are hashes of coordinates become numbers in their order."""
    numbers: dict[str, str] = {}
    return HASHED_ID.sub(lambda match: numbers.setdefault(match[0], f"{match[1]}{len(numbers)}"), text)


def _steady_coordinates(row: str) -> str:
    """A line of SVG with its coordinates rounded; the words of a text stay as they are."""
    head, closed, words = row.partition(">") if "<text" in row or "<tspan" in row else (row, "", "")
    return COORDINATE.sub(lambda match: f"{round(float(match[0]), PLACES) + 0.0:g}", head) + closed + words


def _draw(axes, panel: Panel) -> None:
    scale = 100.0 if panel.percent else 1.0
    for index, line in enumerate(panel.lines):
        points = sorted(line.points)
        xs, ys = [steady(p[0]) for p in points], [steady(scale * p[1]) for p in points]
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        halves = [steady(scale * p[2]) for p in points]
        axes.errorbar(
            xs, ys, halves if any(halves) else None, label=line.name, color=colour,
            marker=marker if len(points) <= MOST_MARKERS else "", markersize=4.5,
            linewidth=1.6, elinewidth=1, capsize=2, linestyle=("--" if line.dashed else "-") if line.joined else "none",
        )  # fmt: skip
    for name, height in {name: steady(at) for name, at in panel.levels.items()}.items():
        axes.axhline(scale * height, color="#59636e", linewidth=1, linestyle=(0, (4, 3)))
        crowded = any(
            0 <= steady(other) - height < CLOSE * _span(axes, scale) for n, other in panel.levels.items() if n != name
        )
        place = {"x": 1.0, "y": scale * height, "s": name, "transform": axes.get_yaxis_transform()}
        axes.text(**place, ha="right", va="top" if crowded else "bottom", color="#59636e", fontsize=8)
    # Of runs too short to say anything there may be nothing that has a logarithm.
    if panel.log_x and any(point[0] > 0 for line in panel.lines for point in line.points):
        axes.set_xscale("log")
        _number(axes.xaxis)
    if panel.log_y and any(point[1] > 0 for line in panel.lines for point in line.points):
        axes.set_yscale("log")
        _number(axes.yaxis)
    if panel.ticks:
        axes.margins(x=0.15)
        axes.set_xticks(list(panel.ticks), list(panel.ticks.values()))
        axes.minorticks_off()
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y + (", %" if panel.percent else ""))
    if len(panel.lines) > 1:
        axes.legend()


def _span(axes, scale: float) -> float:
    low, high = axes.get_ylim()
    return (high - low) / scale


def _number(axis) -> None:
    """The logarithmic axis with numbers as they are, 1, 10, 100; over less than two decades 2 and 5, too."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if low > 0 and high / low < FEW_DECADES else (1,), numticks=15))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


COLUMNS, LINES, MOST_LINES = 42, 13, 3  # of a heat-map's panel in characters, and of one text


def _draw_heat(axes, heat: Heat) -> None:
    """A grid of cells, one a character: whatever font a browser takes, text and colour stay together."""
    from matplotlib.patches import Rectangle

    axes.set_axis_off()
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(LINES, 0)
    axes.set_title(heat.title, loc="left")
    line, last = 0.4, 0
    for words, tokens in heat.texts:
        axes.text(0, line + 0.5, safe_lines(words)[:72], va="center", color="#59636e", fontsize=8)
        line += 1.1
        for rows, column, character, nats in _cells(tokens):
            style = HEAT[level(nats)]
            back = style.bgcolor.get_truecolor().hex if style.bgcolor else "white"
            front = style.color.get_truecolor().hex if style.color else "#1e2022"
            axes.add_patch(Rectangle((column, line + 1.1 * rows), 1, 1, facecolor=back, linewidth=0))
            place = (column + 0.5, line + 1.1 * rows + 0.52)
            axes.text(*place, character, ha="center", va="center", family="monospace", color=front, fontsize=10)
            last = rows
        line += 1.1 * last + 2.2


def _cells(tokens: Sequence[tuple[str, float]]) -> Iterator[tuple[int, int, str, float]]:
    """Line, column, character and penalty; what is longer than a few lines begins shortly before the worst token."""
    cells = [(character, nats) for text, nats in tokens for character in visible(text).replace("\n", "")]
    room = COLUMNS * MOST_LINES
    worst = max(range(len(cells)), key=lambda i: cells[i][1], default=0)
    start = 0 if len(cells) <= room else max(0, min(worst - COLUMNS, len(cells) - room))
    for place, (character, nats) in enumerate(cells[start : start + room]):
        yield place // COLUMNS, place % COLUMNS, character, nats
