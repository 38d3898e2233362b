"""Where two models differ, aggregated over many answers: by token, by what stands before, by task; and how unequally.

A *context* is a pattern of the tokens before a token: what stands directly before it (`after`), or anywhere in the last
`WINDOW` (`near`), with up to one hole. Contexts are found by covering: the conjunction of up to three patterns that explains
most of what is left of the divergence, then the next of what that one leaves. Nothing is known of any task.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy

from kibitz.evaluate.annotate import FORK_NATS

WINDOW = 16
MOST_PATTERNS = 3
MOST_CONTEXTS = 8
CAP = 3.0
"""Nats of a token that count in the search, so that a few tokens that the teacher all but excludes do not speak for all."""
GROWTH = 1.1
"""A further pattern must explain a tenth more."""
LEAST_SHARE = 0.01
CLEAR = 5.0
"""Standard errors that a context's mean must lie above that of the rest: thousands of patterns are tried."""
HOLE = None
"""Any token, in a pattern."""
MOST_TOKENS = 30_000
"""Tokens whose contexts are looked at, evenly spread over the answers: each has some fifty patterns before it."""
EXAMPLES = 5

Pattern = tuple[str | None, ...]
"""`("after", a, b)`: a and b stand directly before. `("near", a, HOLE, b)`: somewhere before a, any token, b."""
Place = tuple[int, int]
"""The number of an answer, and of a token in it."""


@dataclass(frozen=True)
class Answer:
    """One answer of the student as the teacher sees it. For each token: the text, what the teacher would likeliest have
    written, the divergence there in nats (reverse KL, or else what the token is punished by), and the penalty."""

    task: str
    before: Sequence[str]
    tokens: Sequence[str]
    instead: Sequence[str]
    nats: Sequence[float]
    penalty: Sequence[float]
    reward: float | None = None

    @property
    def fork(self) -> int | None:
        """The token that is punished most, if any is."""
        worst = max(range(len(self.penalty)), key=self.penalty.__getitem__, default=None)
        return worst if worst is not None and self.penalty[worst] > FORK_NATS else None


@dataclass
class Context:
    """Tokens that have the same patterns before them: how many, their mean divergence and that of all others in nats, the
    share of the whole divergence, what is written there and what the teacher says instead, and where to look."""

    patterns: list[Pattern]
    num: int
    nats: float
    elsewhere: float
    share: float
    said: list[tuple[str, str, int]] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)


def contexts(answers: Sequence[Answer], most: int = MOST_CONTEXTS) -> list[Context]:
    """The contexts in which the two differ most, those that explain most first."""
    places = [(a, t) for a, answer in enumerate(answers) for t in range(len(answer.tokens))]
    places = places[:: -(-len(places) // MOST_TOKENS) or 1]
    nats = numpy.array([max(0.0, answers[a].nats[t]) for a, t in places])
    if not nats.sum():
        return []
    index = _Index(answers, places)
    left, found = numpy.ones(len(places), dtype=bool), []
    while len(found) < most and (chosen := index.best(numpy.minimum(nats, CAP), left)) is not None:
        patterns, inside = chosen
        share = float(nats[inside].sum() / nats.sum())
        if share < LEAST_SHARE:
            break
        rest = nats[left & ~inside]
        found.append(
            Context(
                patterns, int(inside.sum()), float(nats[inside].mean()), float(rest.mean()) if len(rest) else 0.0, share,
                *_there(answers, [places[i] for i in numpy.flatnonzero(inside)]),
            )
        )  # fmt: skip
        left &= ~inside
    return found


def _there(answers: Sequence[Answer], places: Sequence[Place]) -> tuple[list[tuple[str, str, int]], list[Place]]:
    """What is written most often where the teacher is against it, and the places where it is most, one of an answer."""
    forked = [(a, t) for a, t in places if answers[a].penalty[t] > FORK_NATS]
    said = Counter((answers[a].tokens[t], answers[a].instead[t]) for a, t in forked)
    worst: dict[int, int] = {}
    for a, t in sorted(forked, key=lambda place: -answers[place[0]].penalty[place[1]]):
        worst.setdefault(a, t)
    return [(*pair, num) for pair, num in said.most_common(3)], list(worst.items())[:EXAMPLES]


class _Index:
    """Which tokens have which patterns before them."""

    def __init__(self, answers: Sequence[Answer], places: Sequence[Place], least: int = 8, most: float = 0.9):
        where: dict[Pattern, list[int]] = defaultdict(list)
        for number, (a, t) in enumerate(places):
            for pattern in patterns_before(answers[a], t):
                where[pattern].append(number)
        self.least = least
        self.where = {
            pattern: numpy.array(numbers)
            for pattern, numbers in where.items()
            if least <= len(numbers) <= most * len(places)
        }
        self.names = list(self.where)
        self.numbers = numpy.concatenate(list(self.where.values())) if self.where else numpy.zeros(0, dtype=int)
        lengths = [len(self.where[name]) for name in self.names]
        self.starts = numpy.cumsum([0, *lengths[:-1]]) if lengths else numpy.zeros(0, dtype=int)

    def best(self, nats: numpy.ndarray, left: numpy.ndarray) -> tuple[list[Pattern], numpy.ndarray] | None:
        """The conjunction that explains most of the divergence of the tokens that are left, and its tokens."""
        patterns, inside, explained = [], left.copy(), 0.0
        while self.names and len(patterns) < MOST_PATTERNS:
            scores = self._explained(nats, left, inside)
            choice = int(scores.argmax())
            if scores[choice] <= GROWTH * explained:
                break
            explained = float(scores[choice])
            patterns.append(self.names[choice])
            has = numpy.zeros(len(nats), dtype=bool)
            has[self.where[self.names[choice]]] = True
            inside &= has
        if not patterns or not _clear(nats[inside], nats[left & ~inside]):
            return None
        return patterns, inside

    def _explained(self, nats: numpy.ndarray, left: numpy.ndarray, inside: numpy.ndarray) -> numpy.ndarray:
        """For each pattern, together with those chosen: the sum of squares between its tokens and all others that are left, as
        in a regression tree; 0 where the divergence is below the mean."""
        num, mean = left.sum(), nats[left].mean()
        counts = numpy.add.reduceat(inside[self.numbers].astype(float), self.starts)
        sums = numpy.add.reduceat(numpy.where(inside[self.numbers], nats[self.numbers], 0.0), self.starts)
        more = sums - counts * mean
        possible = (more > 0) & (counts >= self.least) & (counts < num)
        return numpy.where(possible, more**2 * num / (numpy.maximum(counts, 1) * numpy.maximum(num - counts, 1)), 0.0)


def _clear(inside: numpy.ndarray, rest: numpy.ndarray) -> bool:
    if len(rest) < 2:
        return False
    error = (inside.var() / len(inside) + rest.var() / len(rest)) ** 0.5
    return bool(inside.mean() - rest.mean() > CLEAR * error)


def patterns_before(answer: Answer, token: int) -> set[Pattern]:
    """All patterns of what stands before a token, in the prompt and in the answer."""
    start = len(answer.before) + token
    text = [*answer.before[max(0, start - WINDOW) :], *answer.tokens[max(0, token - WINDOW) : token]][-WINDOW:]
    found: set[Pattern] = {("after", *text[-size:]) for size in (1, 2, 3) if len(text) >= size}
    for i, one in enumerate(text):
        found.add(("near", one))
        if i + 1 < len(text):
            found.add(("near", one, text[i + 1]))
        if i + 2 < len(text):
            found.add(("near", one, HOLE, text[i + 2]))
    return found


# ------------------------------------------------------------------ by token, by task, by rank


def by_token(answers: Sequence[Answer], most: int = 12) -> list[dict[str, Any]]:
    """Forking tokens: what the student writes and the teacher would not, with what it would write, the most costly first."""
    groups: dict[tuple[str, str], list[Place]] = defaultdict(list)
    total = sum(max(0.0, nats) for answer in answers for nats in answer.nats)
    for a, answer in enumerate(answers):
        for t, penalty in enumerate(answer.penalty):
            if penalty > FORK_NATS:
                groups[answer.tokens[t], answer.instead[t]].append((a, t))
    rows = [
        {
            "said": said,
            "instead": instead,
            "num": len(places),
            "penalty": fmean(answers[a].penalty[t] for a, t in places),
            "share": sum(max(0.0, answers[a].nats[t]) for a, t in places) / total if total else 0.0,
            "places": _there(answers, places)[1],
        }
        for (said, instead), places in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["share"])[:most]


def by_task(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """For each task the answers, the share that is right, the mean divergence of a token, and the share of the divergence."""
    total = sum(sum(answer.nats) for answer in answers) or 1.0
    rows = []
    for task in sorted({answer.task for answer in answers}):
        own = [answer for answer in answers if answer.task == task]
        rewards = [answer.reward for answer in own if answer.reward is not None]
        nats = [value for answer in own for value in answer.nats]
        rows.append(
            {
                "task": task,
                "num": len(own),
                "accuracy": fmean(rewards) if rewards else None,
                "nats": fmean(nats) if nats else 0.0,
                "share": sum(nats) / total,
            }
        )
    return sorted(rows, key=lambda row: -row["share"])


def share_of_worst(answers: Sequence[Answer], part: float = 0.01) -> float:
    """The share of the divergence that lies in this part of the tokens, the worst ones; at least one token."""
    nats = sorted((max(0.0, value) for answer in answers for value in answer.nats), reverse=True)
    total = sum(nats)
    return sum(nats[: max(1, round(part * len(nats)))]) / total if total else 0.0
