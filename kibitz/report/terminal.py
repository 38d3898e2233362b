"""One annotated rollout in the terminal: the heat-map in background colours, the fork also as a line underneath."""

import re
from math import exp

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from kibitz.report.folder import Row, dig_number
from kibitz.report.formats import LEVELS, level, safe_lines, visible
from kibitz.report.heatmap import fork, is_right, penalty, probability, tokens, top

# Text and background for each level: both are set, so that they are readable in light and dark terminals.
STYLES = (
    Style(),
    Style(color="#1e2022", bgcolor="#fcf3d9"),
    Style(color="#1e2022", bgcolor="#fae6ad"),
    Style(color="#1e2022", bgcolor="#f5cc6b"),
    Style(color="#1a1207", bgcolor="#eda03f"),
    Style(color="#1a1207", bgcolor="#e0762f"),
    Style(color="#ffffff", bgcolor="#b3241c"),
)
MOST_PUNISHED = 5
NO_PENALTY = (
    f"No token is punished: the teacher finds each at least {exp(-LEVELS[0]):.1f} times as likely as the student does. That "
    "compares the two models; whether the answer is right is another question."
)
SPACE = re.compile(r" (?![^\W\d_])")
"""A space that a dot stands for: not one before a word, which everybody sees."""


def print_rollout(row: Row, console: Console) -> None:
    """Prompt, response and the most punished tokens. Model text reaches the terminal without control characters and
    is never read as markup."""
    console.print(Text(safe_lines(str(row.get("prompt", ""))), style="bold"))
    console.print(_summary(row))
    console.print()
    listed = tokens(row)
    if not listed:
        console.print(Text(safe_lines(str(row.get("response", ""))) or "The response is empty."))
        return
    for line in _lines(listed, fork(row), console.width):
        console.print(line, no_wrap=True, crop=False, overflow="ignore")
    if row.get("finished") is False:
        console.print(Text("… cut off here", style="italic"))
    console.print()
    console.print(_most_punished(listed, console.width))


def _summary(row: Row) -> Text:
    parts = []
    if row.get("answer") is not None:
        parts.append(f"answer {safe_lines(str(row['answer']))}")
    right = is_right(row)
    if right is not None:
        parts.append("right" if right else "wrong")
    if (step := dig_number(row, "step")) is not None:
        parts.append(f"step {step:.0f}")
    return Text(" · ".join(parts), style="dim")


def _lines(listed: list[Row], at: int | None, width: int) -> list[Text]:
    """The response wrapped between tokens, and under the line of the fork a line that points at it."""
    lines, line, caret = [], Text(), None

    def end_line() -> None:
        nonlocal line, caret
        lines.append(line)
        if at is not None and caret is not None:
            lines.append(_pointer(listed[at], *caret, width))
        line, caret = Text(), None

    for index, token in enumerate(listed):
        style = STYLES[level(penalty(token))]
        pieces = SPACE.sub("·", visible(str(token.get("text", "")))).split("\n")
        for number, piece in enumerate(pieces):
            if number:
                end_line()
            for part in _parts(piece, width):
                if line and cell_len(line.plain) + cell_len(part) > width:
                    end_line()
                if index == at and caret is None and number == 0:
                    caret = (cell_len(line.plain), max(1, cell_len(part)))
                line.append(part, style + Style(bold=True, underline=True) if index == at else style)
    end_line()
    return lines


def _parts(text: str, width: int) -> list[str]:
    """A token wider than the terminal in pieces that fit."""
    size = max(1, width // 2)  # a character takes up to two cells
    return [text[start : start + size] for start in range(0, len(text), size)]


def _pointer(token: Row, column: int, length: int, width: int) -> Text:
    """`^^^ fork: penalty 4.84 nats; the teacher would rather say 8`, or the words before the caret, or beneath it."""
    words = f"fork: penalty {penalty(token) or 0.0:.2f} nats"
    instead = top(token.get("teacher_top"))
    if instead and instead[0][0] != token.get("text"):
        words += f"; the teacher would rather say {_shown(instead[0][0])}"
    carets = "^" * min(length, width - column)
    if column + len(carets) + 1 + cell_len(words) <= width:
        return Text(" " * column + f"{carets} {words}")
    if cell_len(words) + 1 <= column:
        return Text(f"{words} ".rjust(column) + carets)
    return Text(" " * column + f"{carets}\n{words}")


def _most_punished(listed: list[Row], width: int) -> Table | Text:
    """The tokens that cost anything, worst first, with what both models would have said; less of it where the
    terminal is narrow."""
    costly = [token for token in listed if level(penalty(token)) > 0]
    if not costly:
        heard = any(penalty(token) is not None for token in listed)
        return Text(NO_PENALTY if heard else "No teacher scored this response.", style="dim")
    table = Table(title="Most punished tokens", title_justify="left", title_style="bold", box=None, pad_edge=False)
    num_choices = 3 if width >= 90 else 1
    for name in ("token", "penalty", "student", "teacher", "student would say", "teacher would say"):
        number = name in ("penalty", "student", "teacher")
        width_needed = len(name) if number else 4
        table.add_column(
            name, justify="right" if number else "left", no_wrap=True, min_width=width_needed, max_width=40
        )
    for token in sorted(costly, key=lambda token: -(penalty(token) or 0.0))[:MOST_PUNISHED]:
        table.add_row(
            Text(_shown(str(token.get("text", ""))), style=STYLES[level(penalty(token))]),
            f"{penalty(token):.2f}",
            _percent(probability(token.get("student_logp"))),
            _percent(probability(token.get("teacher_logp"))),
            _choices(token.get("student_top"), num_choices),
            _choices(token.get("teacher_top"), num_choices),
        )
    return table


def _choices(listed: object, num: int) -> Text:
    return Text("  ".join(f"{_shown(text)} {_percent(share)}" for text, share in top(listed)[:num]))


def _percent(share: float | None) -> str:
    if share is None:
        return "–"
    return "<0.1%" if 0 < share < 0.001 else f"{100 * share:.1f}%"


def _shown(text: str) -> str:
    return visible(text).replace(" ", "·").replace("\n", "")
