"""The formats of numbers and tables of experiments. Templates of claims have these functions as filters."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf, isinf, isnan

from kibitz.report.formats import safe_lines

NONE = "–"


def percent(share: Sequence[float] | float | None) -> str:
    """`87.3 ± 1.2`, or `87.3` of a number without an interval; in percent."""
    if share is None:
        return NONE
    if isinstance(share, Sequence):
        return f"{100 * share[0]:.1f} ± {100 * share[1]:.1f}"
    return f"{100 * share:.1f}"


def rounded(share: Sequence[float] | float | None) -> str:
    """The same without decimals: `87 ± 1`."""
    if share is None:
        return NONE
    return f"{100 * share[0]:.0f} ± {100 * share[1]:.0f}" if isinstance(share, Sequence) else f"{100 * share:.0f}"


def signed(way: Sequence[float]) -> str:
    """A share that may be negative: `+33% ± 17`."""
    return f"{100 * way[0]:+.0f}% ± {100 * way[1]:.0f}"


def between(share: Sequence[float]) -> str:
    """A share and the ends of its interval: `83.2 (79.7–86.3)`, in percent."""
    return f"{100 * share[0]:.1f} ({100 * share[1]:.1f}–{100 * share[2]:.1f})"


def times(ratio: Sequence[float] | None) -> str:
    """`6.1x (4.0–9.2)`: a ratio and its interval; an end that is not reached, or that only the other reaches, says so."""
    if ratio is None:
        return NONE
    middle, low, high = ratio
    if middle == 0:
        return "reached by the other only"
    if middle == inf:
        return f"over {low:.1f}x, not reached" if low != inf else "not reached"
    return f"{middle:.1f}x ({low:.1f}–{'∞' if high == inf else f'{high:.1f}'})"


def fold(ratio: Sequence[float] | None) -> str:
    """A ratio in plain words, without its interval: `3.1x`."""
    return NONE if ratio is None or isinf(ratio[0]) else f"{ratio[0]:.1f}x"


def figures(value: float, digits: int = 3) -> str:
    """A number with so many significant digits: `14.5`, `174`."""
    return f"{value:.{digits}g}"


def fixed(value: float, places: int = 2) -> str:
    """A number with so many decimals; never a negative zero."""
    if isnan(value):
        return NONE
    return f"{round(value, places) + 0.0:.{places}f}"


def pair(value: Sequence[float]) -> str:
    """A mean and half its interval, in their own unit: `9.35 ± 0.25`."""
    return f"{fixed(value[0])} ± {fixed(value[1])}"


def whole(value: Sequence[float] | float) -> str:
    """A mean and half its interval without decimals: `-366 ± 12`; a number alone: `-366`."""
    if isinstance(value, Sequence):
        return f"{value[0]:,.0f} ± {value[1]:,.0f}"
    return f"{value:,.0f}"


def brief(value: Sequence[float] | float) -> str:
    """The same with one decimal where all of it is below 20: `7.1 ± 2.3`."""
    numbers = value if isinstance(value, Sequence) else [value]
    return whole(value) if max(map(abs, numbers)) >= 20 else " ± ".join(f"{one:.1f}" for one in numbers)


def nats(value: Sequence[float] | None) -> str:
    """`0.050 ± 0.005`; without the interval where that is 0."""
    return NONE if value is None else f"{value[0]:.3f}" + (f" ± {value[1]:.3f}" if value[1] else "")


def number(value: float | None) -> str:
    """`1,280`."""
    return NONE if value is None or isinf(value) else f"{value:,.0f}"


def general(value: float) -> str:
    """`0.0005`, `64`: as one would write it in a recipe."""
    return f"{value:g}"


def params(num: float) -> str:
    """Parameters: `0.15M`, `12M`, `1.7B`."""
    return f"{num / 1e9:.1f}B" if num >= 1e9 else f"{num / 1e6:.2f}M" if num < 1e7 else f"{num / 1e6:.0f}M"


def listed(names: Iterable[object], between: str = ", ") -> str:
    """The names, or `none`."""
    return between.join(str(name) for name in names) or "none"


def code(text: str, longest: int = 60) -> str:
    """Model text in a cell of a table: on one line, and nothing of it is read as Markdown."""
    line = safe_lines(text[:longest]).replace("\n", " ").replace("`", "'").replace("|", "¦").strip()
    return f"`{line}`" if line else NONE


def table(head: Sequence[str], body: Iterable[Sequence[str]], left: int = 0) -> str:
    """In Markdown; columns after the first `left` are flush right, if any are named."""
    rules = ["---"] * left + ["--:"] * (len(head) - left) if left else ["---"] * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rules, *body))


FILTERS: Mapping[str, Callable[..., str]] = {
    function.__name__: function
    for function in (
        *(percent, rounded, signed, between, times, fold),
        *(figures, fixed, pair, whole, brief, nats, number, general, params, listed, code),
    )
}
