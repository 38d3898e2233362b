"""Annotated rollouts for the heat-map: which rollouts stand side by side, and what the page's script needs of them.

The page draws the tokens itself, only those that are looked at, from a JSON island. The island keeps each string
once, because the alternatives of neighbouring tokens are mostly the same words.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median
from typing import Any

from kibitz.report.folder import Row, Run, dig_number, number
from kibitz.report.formats import LEVELS, safe_lines, visible

FORK_NATS = 1.0
MAX_TOKENS = 200_000  # a page of about 30 MB
LOWEST_LOGP = -100.0


@dataclass
class Pair:
    """The rollouts of one prompt: before and after training, or one of them."""

    prompt: str
    answer: str
    sides: list[Row]

    @property
    def num_tokens(self) -> int:
        return sum(len(tokens(side)) for side in self.sides)


def tokens(row: Row) -> list[Row]:
    listed = row.get("tokens")
    return [token for token in listed if isinstance(token, dict)] if isinstance(listed, list) else []


def teachers(row: Row) -> list[Row]:
    """The rows of several teachers: for a rollout their names and weights, for a token what each said of it."""
    listed = row.get("teachers")
    return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []


def penalty(token: Row) -> float | None:
    """log p_student - log p_teacher of the token that was written, in nats."""
    student, teacher = _logp(token.get("student_logp")), _logp(token.get("teacher_logp"))
    return None if student is None or teacher is None else student - teacher


def probability(logp: Any) -> float | None:
    finite = _logp(logp)
    return None if finite is None else math.exp(finite)


def fork(row: Row) -> int | None:
    """The token that the teacher would least have written, if it stands out: the row's own word on it, or ours."""
    listed = tokens(row)
    if "fork" in row:
        index = row["fork"]
        return index if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(listed) else None
    penalties = [penalty(token) or 0.0 for token in listed]
    worst = max(range(len(penalties)), key=penalties.__getitem__, default=None)
    return worst if worst is not None and penalties[worst] > FORK_NATS else None


def is_right(row: Row) -> bool | None:
    reward = number(row.get("reward"))
    return None if reward is None else reward >= 0.5


def pairs(rows: list[Row]) -> list[Pair]:
    """The earliest and the latest rollouts of each prompt, sample by sample; first those that began wrong."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.get("prompt_key") or row.get("prompt")), []).append(row)
    found = []
    for group in groups.values():
        steps = [dig_number(row, "step") or 0.0 for row in group]
        first = [row for row, step in zip(group, steps, strict=True) if step == min(steps)]
        last = [row for row, step in zip(group, steps, strict=True) if step == max(steps) > min(steps)]
        for before, after in zip_longest(first, last):
            sides = [side for side in (before, after) if side is not None]
            answer = sides[0].get("answer")
            found.append(Pair(str(sides[0].get("prompt", "")), "" if answer is None else str(answer), sides))
    return sorted(found, key=lambda pair: is_right(pair.sides[0]) is not False)


def shown(found: list[Pair], max_tokens: int = MAX_TOKENS) -> list[Pair]:
    """As many as a browser can hold."""
    total, kept = 0, []
    for pair in found:
        total += pair.num_tokens
        if kept and total > max_tokens:
            break
        kept.append(pair)
    return kept


def fork_facts(found: list[Pair]) -> dict[str, float] | None:
    """Compare the penalty of forks with that of other tokens, in the wrong rollouts from before training
    (in all, if none is graded)."""
    wrong = [pair.sides[0] for pair in found if is_right(pair.sides[0]) is not True]
    forked = [(tokens(row), index) for row in wrong if (index := fork(row)) is not None]
    if not forked:
        return None
    at_fork = [penalty(listed[index]) or 0.0 for listed, index in forked]
    elsewhere = [abs(penalty(token) or 0.0) for listed, at in forked for i, token in enumerate(listed) if i != at]
    return {
        "num_forked": len(forked),
        "num_wrong": len(wrong),
        "fork": median(at_fork),
        "elsewhere": median(elsewhere) if elsewhere else 0.0,
    }


def island(runs: list[Run]) -> dict[str, Any]:
    """All that the heat-map's script reads. Model text has been made harmless and visible."""
    strings: dict[str, int] = {}

    def intern(text: Any) -> int:
        return interned(strings, text)

    per_run = []
    for run in runs:
        found = shown(pairs(run.rollouts), MAX_TOKENS // max(1, len(runs)))
        per_run.append({"name": safe_lines(run.name), "pairs": [for_page(pair, intern) for pair in found]})
    return {"levels": levels(), "runs": per_run, "strings": list(strings)}


def interned(strings: dict[str, int], text: Any) -> int:
    """The number of a harmless form of the text in a table of strings, which it joins if it is new."""
    return strings.setdefault(visible(str(text)), len(strings))


def levels() -> list[float]:
    """The bounds of the colours, in nats."""
    return [round(bound, 3) for bound in LEVELS]


def for_page(pair: Pair, intern: Callable[[Any], int]) -> Row:
    """One pair as the page's script reads it; `intern` gives texts their numbers."""
    sides = []
    for row in pair.sides:
        listed = tokens(row)
        sides.append(
            {
                "step": dig_number(row, "step"),
                "finished": row.get("finished") is not False,
                "reward": number(row.get("reward")),
                "right": is_right(row),
                "fork": fork(row),
                "teachers": [[safe_lines(str(t.get("name", ""))), number(t.get("weight"))] for t in teachers(row)],
                "tokens": [_token(token, intern) for token in listed],
                "response": "" if listed else safe_lines(str(row.get("response", ""))),
            }
        )
    return {"prompt": safe_lines(pair.prompt), "answer": safe_lines(pair.answer), "sides": sides}


def _token(token: Row, intern: Any) -> list[Any]:
    return [
        intern(token.get("text", "")),
        _logp(token.get("student_logp")),
        _logp(token.get("teacher_logp")),
        _rounded(number(token.get("reverse_kl"))),
        _top(token.get("student_top"), intern),
        _top(token.get("teacher_top"), intern),
        [[_logp(v.get("logp")), _rounded(number(v.get("kl"))), _top(v.get("top"), intern)] for v in teachers(token)],
    ]


def top(listed: Any) -> list[tuple[str, float]]:
    """A model's most likely tokens with their probabilities; what is not such a pair is left out."""
    entries = listed if isinstance(listed, list) else []
    pairs_of_two = [entry for entry in entries if isinstance(entry, list | tuple) and len(entry) == 2]
    return [(str(text), p) for text, share in pairs_of_two if (p := number(share)) is not None]


def _top(listed: Any, intern: Any) -> list[Any]:
    """Flat: text, probability, text, probability, ..."""
    return [value for text, share in top(listed) for value in (intern(text), float(f"{share:.3g}"))]


def _logp(value: Any) -> float | None:
    """A log-probability of minus infinity, which JSON cannot say but Python's reader takes, has a floor."""
    if value == float("-inf"):
        return LOWEST_LOGP
    finite = number(value)
    return None if finite is None else _rounded(max(finite, LOWEST_LOGP))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
