"""Numbers and model text as a person reads them. Unknown numbers are a dash."""

import math
import unicodedata
from datetime import datetime

DASH = "–"
MINUS = "−"

# The steps of the heat-map in nats: the teacher finds the token 1.25, 2, 5, 10, 30, 100 times less likely.
LEVELS = tuple(math.log(ratio) for ratio in (1.25, 2, 5, 10, 30, 100))


def level(nats: float | None) -> int:
    """Return the heat-map's colour of a penalty or a divergence: 0 is pale, `len(LEVELS)` the strongest."""
    return 0 if nats is None else sum(nats >= bound for bound in LEVELS)


def visible(text: str) -> str:
    """Model text with everything invisible made visible and harmless.

    A line feed becomes `↵` and still breaks the line; control characters, escape sequences and direction overrides
    become signs. One leading space stays a space, so that words wrap; all other spaces become dots.
    """
    lead, rest = (" ", text[1:]) if text.startswith(" ") and not text[1:].startswith(" ") else ("", text)
    return lead + "".join(_sign(character) for character in rest)


def safe_lines(text: str) -> str:
    """Like `visible` for text that is read rather than inspected: spaces and line breaks stay what they are."""
    return "".join(character if character in " \n" else _sign(character) for character in text)


def _sign(character: str) -> str:
    code = ord(character)
    match character:
        case " ":
            return "·"
        case "\n":
            return "↵\n"
        case "\t":
            return "⇥"
    if code < 0x20:
        return chr(0x2400 + code)  # the pictures of the control characters: ␀, ␛
    if code == 0x7F:
        return "␡"
    if 0xD800 <= code <= 0xDFFF:
        return "\ufffd"
    if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") and character != "\u200d":
        return f"<U+{code:04X}>"
    return character


def plain(value: float | None, digits: int = 3) -> str:
    """Three significant digits, thousands separated: 0.0413, 23.4, 12,345."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e9:
        return f"{value:.1e}".replace("-", MINUS)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f}%".replace("-", MINUS)


def count(value: float | None) -> str:
    """Exact below a million, then 1.5M, 7.6B."""
    if value is None or value < 1e6:
        return DASH if value is None else f"{value:,.0f}"
    return _scaled(value / 1e6, ("M", "B", "T"))


def many(value: float | None, noun: str) -> str:
    """`1 step`, `40 steps`, `– steps`."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def flops(value: float | None) -> str:
    units = (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP", " ZFLOP")
    return DASH if value is None else _scaled(value, units)


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """Three significant digits and the largest unit that fits."""
    value = float(f"{value:.3g}")
    power = 0
    while value >= 1000 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g}{units[power]}"


def size(num_bytes: float | None) -> str:
    """In units of 1024: 512 MiB, 3.21 GiB."""
    if num_bytes is None:
        return DASH
    return f"{num_bytes / 2**20:.3g} MiB" if num_bytes < 1000 * 2**20 else f"{num_bytes / 2**30:.3g} GiB"


def seconds(value: float | None) -> str:
    """0.42 s, 12.3 s, 4 min 05 s, 3 h 12 min, 2 d 4 h."""
    if value is None:
        return DASH
    if value < 1:
        return f"{value:.2g} s"
    if value < 99.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(value / 3600)
    return f"{hours // 24} d {hours % 24} h"


def moment(text: object) -> float | None:
    """A time as run.json writes it, in seconds since 1970; None if it is none."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def change(before: float | None, after: float | None, *, points: bool = False) -> str:
    """The difference with its sign; `points` for shares, which differ by percentage points."""
    if before is None or after is None:
        return DASH
    difference = after - before
    sign = "+" if difference > 0 else MINUS if difference < 0 else "±"
    return f"{sign}{100 * abs(difference):.1f} points" if points else f"{sign}{plain(abs(difference))}"
