"""Shapes that several experiments share: a *grid* of arms by rows and columns, and a *comparison* of arms side by side.

The third, the *ladder* of budgets, is `kibitz.experiments.budgets`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.results import Results
from kibitz.experiments.statistics import Estimate

Grid = dict[Any, dict[Any, Estimate]]
"""row -> column -> a mean and half its interval."""


def grid(
    results: Results, rows: Iterable[Any], columns: Iterable[Any], arm: Callable[[Any, Any], str], measure: str = ""
) -> Grid:
    """The accuracy of the arm of each row and column, of those that were run; a row without any is left out."""
    columns, found = list(columns), {}
    for row in rows:
        cells = {c: results.accuracy(name, name=measure) for c in columns if results.has(name := arm(row, c))}
        if cells:
            found[row] = cells
    return found


def turned(cells: Mapping[Any, Mapping[Any, Any]]) -> dict[Any, dict[Any, Any]]:
    """Columns for rows."""
    found: dict[Any, dict[Any, Any]] = {}
    for row, by in cells.items():
        for column, cell in by.items():
            found.setdefault(column, {})[row] = cell
    return found


def lines(
    cells: Mapping[Any, Mapping[Any, Estimate]],
    x: Callable[[Any], float] = float,
    name: Callable[[Any], str] = str,
    **more,
) -> list[Line]:
    """A line for each row of a grid, through its columns; `x` is where a column stands."""
    return [Line(name(row), [(x(column), *cell) for column, cell in by.items()], **more) for row, by in cells.items()]


def compared(
    title: str, y: str, names: Sequence[str], series: Mapping[str, Mapping[str, Estimate]], joined: bool = False, **more
) -> Panel:
    """Arms side by side, in the order of `names`, with a series of points for each thing that is said of them."""
    places = {name: float(place) for place, name in enumerate(names)}
    found = [
        Line(label, [(places[name], *points[name]) for name in names if name in points], joined=joined)
        for label, points in series.items()
    ]
    ticks = {place: name.replace("-", "\n") for name, place in places.items()}
    return Panel(title, "", y, found, ticks=ticks, **more)
