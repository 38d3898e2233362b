"""The page of `kibitz score --prompts`: where two models differ, what could be gained, examples, and the recipe that follows."""

from typing import Any

from kibitz.report import heatmap, page
from kibitz.report.folder import Row, dig, dig_number, number
from kibitz.report.formats import DASH, count, flops, percent, plain, safe_lines, seconds, visible

BOTH = (
    ("both", "both right"),
    ("teacher", "the teacher right, the student wrong"),
    ("student", "the student right, the teacher wrong"),
    ("neither", "both wrong"),
)


def diagnosis_page(found: Row) -> str:
    """One self-contained page of what `kibitz.preflight.diagnosis.diagnose` found."""
    return page.render(
        "diagnosis.html.j2",
        ["page.js", "heatmap.js", "diagnosis.js"],
        student=_short(found.get("student")),
        teacher=_short(found.get("teacher")),
        numbers=found.get("numbers") or {},
        facts=_facts(found.get("numbers") or {}),
        contexts=[_context(one) for one in found.get("contexts") or []],
        tokens=[_token(one) for one in found.get("tokens") or []],
        tasks=[_task(one) for one in found.get("tasks") or []],
        both=[(label, dig(found, "numbers", "both", key)) for key, label in BOTH]
        if dig(found, "numbers", "both")
        else [],
        prefixes=_prefixes(found.get("numbers") or {}),
        gain=_gain(found.get("numbers") or {}),
        heatmap=_heatmap(found.get("examples") or []),
        doubts=[safe_lines(str(doubt)) for doubt in found.get("doubts") or []],
        recipe=safe_lines(str(found.get("recipe") or "")),
        recipe_file=safe_lines(str(found.get("recipe_file") or "recipe.yaml")),
        cost=_cost(found.get("cost") or {}),
    )


def facts_in_words(found: Row) -> list[tuple[str, str, str]]:
    """The figures on top of the page: what it is, the figure, a word on it."""
    return _facts(found.get("numbers") or {})


def pattern_in_words(pattern: list[Any]) -> str:
    """`+ any * before`: what stands before a token, for a terminal."""
    shown = _pattern(pattern)
    words = " ".join("any" if token is None else token for token in shown["tokens"])
    return f"{words} before" if shown["near"] else f"{words} directly before"


def _short(name: Any) -> str:
    return safe_lines("/".join(str(name or "without a name").rstrip("/").split("/")[-2:]))


def _facts(numbers: Row) -> list[tuple[str, str, str]]:
    """The figures on top: what it is, the figure, a word on it."""
    found = []
    for label, key in (("The student is right", "accuracy"), ("The teacher is right", "teacher_accuracy")):
        if (value := dig_number(numbers, key, "accuracy")) is not None:
            found.append((label, percent(value), _interval(numbers[key])))
    if (predicted := dig_number(numbers, "predicted")) is not None:
        found.append(("Within reach", percent(predicted), "right answers, if it learns the worst token of each"))
    found.append(("Reverse KL", plain(dig_number(numbers, "reverse_kl")), "nats per token"))
    found.append(("The worst 1% of tokens", percent(dig_number(numbers, "worst_percent")), "of the divergence"))
    if (mass := dig_number(numbers, "overlap_mass")) is not None:
        share = percent(dig_number(numbers, "top_k_overlap"))
        found.append(("Overlap", percent(mass), f"of the probability, in {share} of the likeliest 16"))
    return found


def _interval(row: Any) -> str:
    low, high = dig_number(row, "low"), dig_number(row, "high")
    return "" if low is None or high is None else f"[{100 * low:.1f}–{percent(high)}]"


def _context(one: Row) -> Row:
    return {
        "patterns": [_pattern(pattern) for pattern in one.get("patterns") or []],
        "num": count(number(one.get("num"))),
        "nats": plain(number(one.get("nats"))),
        "elsewhere": plain(number(one.get("elsewhere"))),
        "share": number(one.get("share")) or 0.0,
        "percent": percent(number(one.get("share"))),
        "said": [
            (visible(str(said)), visible(str(instead)), count(num)) for said, instead, num in one.get("said") or []
        ],
        "places": _places(one),
    }


def _pattern(pattern: list[Any]) -> Row:
    """`after` or `near`, and its tokens; None for any token."""
    kind, *tokens = pattern
    return {"near": kind == "near", "tokens": [None if token is None else visible(str(token)) for token in tokens]}


def _places(one: Row) -> list[tuple[int, int]]:
    return [(int(pair), int(token)) for pair, token in one.get("places") or []]


def _token(one: Row) -> Row:
    return {
        "said": visible(str(one.get("said", ""))),
        "instead": visible(str(one.get("instead", ""))),
        "num": count(number(one.get("num"))),
        "penalty": plain(number(one.get("penalty"))),
        "share": number(one.get("share")) or 0.0,
        "percent": percent(number(one.get("share"))),
        "places": _places(one),
    }


def _task(one: Row) -> list[str]:
    words = [safe_lines(str(one.get("task", ""))), count(number(one.get("num")))]
    words += [percent(number(one.get(key))) for key in ("accuracy", "teacher")]
    return [*words, plain(number(one.get("nats"))), percent(number(one.get("share")))]


def _prefixes(numbers: Row) -> list[Row]:
    """How often the whole is right when the teacher goes on behind so much of the student's answer: from none to all."""
    if not numbers.get("prefixes"):
        return []
    ends = [
        ("nothing: the teacher alone", numbers.get("teacher_accuracy")),
        ("all: the student alone", numbers.get("accuracy")),
    ]
    rows = [
        ends[0],
        *((f"the first {percent(number(row.get('share'))).replace('.0', '')}", row) for row in numbers["prefixes"]),
        ends[1],
    ]
    return [
        {"label": label, "text": percent(dig_number(row, "accuracy")), "interval": _interval(row)}
        | {key: dig_number(row, key) for key in ("accuracy", "low", "high")}
        for label, row in rows
    ]


def _gain(numbers: Row) -> str:
    """The sentence about what training could bring."""
    mended, wrong, forked = (dig_number(numbers, key) for key in ("mended", "wrong", "forked"))
    if mended is None or wrong is None or forked is None:
        return ""
    before, after = dig_number(numbers, "accuracy", "accuracy"), dig_number(numbers, "predicted")
    return (
        f"In {forked:.0f} of the {wrong:.0f} wrong answers a token stands out that the teacher would not have written. "
        f"Taking over there, it finishes {percent(mended)} of them right. A student that has learnt to do so would be right in "
        f"{percent(after)} of all answers, where it was in {percent(before)}."
    )


def _cost(cost: Row) -> str:
    """The cost in words."""
    words = [f"{count(number(cost.get('rollouts')))} answers", f"about {count(number(cost.get('tokens')))} tokens"]
    if (spent := number(cost.get("flops"))) is not None:
        words.append(flops(spent))
    words.append(f"about {seconds(number(cost.get('seconds')))} on {safe_lines(str(cost.get('device') or DASH))}")
    if (money := number(cost.get("money"))) is not None:
        words.append(f"{money:,.2f} at that price")
    return ", ".join(words)


def _heatmap(rows: list[Row]) -> Row | None:
    """The examples in their order: contexts and tokens point to them by number."""
    if not rows:
        return None
    strings: dict[str, int] = {}
    found = [heatmap.Pair(str(row.get("prompt", "")), str(row.get("answer") or ""), [row]) for row in rows]
    pairs = [heatmap.for_page(pair, lambda text: heatmap.interned(strings, text)) for pair in found]
    island = {"levels": heatmap.levels(), "runs": [{"name": "", "pairs": pairs}], "strings": list(strings)}
    graded = any(heatmap.is_right(row) is not None for row in rows)
    values = page.empty_heatmap([""]) | {"island": island, "paired": False, "graded": graded}
    return values | {"facts": heatmap.fork_facts(found)}
