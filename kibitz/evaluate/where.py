"""Where a student of language disagrees with its teacher, as sentences: a shallow tree on simple features of tokens, fitted to
the penalty of the annotated rollouts of a run.

    after `)`, where the token is `*`: 38% of the penalty in 2% of the tokens, 3.1 nats each

The tree is fitted on one half of the prompts, and the shares are those of the other half. It needs scikit-learn: kibitz[control].
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kibitz.files import JSONL, write_atomically
from kibitz.report.heatmap import penalty, tokens
from kibitz.report.shown import NAME

Row = dict[str, Any]
TITLE = "Where the teacher disagrees"
DEPTH, LEAVES, LEAST_SHARE = 4, 10, 0.005
"""Questions in a row, rules in all, and the tokens that a rule must hold at least."""
FREQUENT, MOST_TEXTS = 0.005, 40
"""Of texts that have a question of their own: their share of all tokens at least, and how many at most."""
OPEN, CLOSED = "([{", ")]}"
CLASSES: dict[str, Callable[[str], bool]] = {
    "a number": lambda text: text.strip().isdigit(),
    "a word": lambda text: text.strip().isalpha(),
    "an operator": lambda text: text.strip() in {*"+-*/=<>^%", "==", "<=", ">="},
    "a bracket": lambda text: text.strip() != "" and all(sign in OPEN + CLOSED for sign in text.strip()),
    "white space": lambda text: text != "" and text.isspace(),
}


@dataclass(frozen=True)
class Place:
    """A token that was written and what is known of it. `entropy` is the teacher's in nats, of its likeliest tokens."""

    prompt: str
    text: str
    before: str
    position: int
    nesting: int
    entropy: float
    penalty: float


@dataclass(frozen=True)
class Feature:
    """A question to a place. Of a number `above`, `below` and `between` say on which side of a threshold it is, with `{}` for the
    threshold, and `whole` that it is counted; of another question `above` is yes and `below` no, `about` the
    `token` or the one `before` it, and `exact` that it names its text."""

    value: Callable[[Place], float]
    above: str
    below: str
    between: str = ""
    whole: bool = False
    about: str = ""
    exact: bool = False

    def words(self, low: float | None, high: float | None) -> str:
        """The answer: more than `low` and at most `high`, where each is given."""
        shown = [None if edge is None else self._shown(edge) for edge in (low, high)]
        if None not in shown:
            return self.between.format(*shown)
        return self.below.format(shown[1]) if low is None else self.above.format(shown[0])

    def _shown(self, threshold: float) -> str:
        return str(math.ceil(threshold)) if self.whole else f"{threshold:.2g}"


@dataclass(frozen=True)
class Rule:
    """A leaf of the tree: its sentence, and on the other half of the prompts its share of penalty and of tokens and its mean."""

    words: str
    share: float
    tokens: float
    nats: float

    def sentence(self) -> str:
        return f"{self.words}: {self.share:.0%} of the penalty in {self.tokens:.1%} of the tokens, {self.nats:.2f} nats each"


def places(rows: Sequence[Row]) -> list[Place]:
    """The tokens of annotated rollouts that a teacher has judged. What the teacher likes more than the student costs 0."""
    found = []
    for row in rows:
        before, nesting = "the beginning", 0
        for position, token in enumerate(tokens(row)):
            text, nats = str(token.get("text", "")), penalty(token)
            if nats is not None:
                shares = [p for _, p in token.get("teacher_top") or [] if isinstance(p, float) and p > 0]
                entropy = -sum(p * math.log(p) for p in shares)
                key = str(row.get("prompt_key") or row.get("prompt"))
                found.append(Place(key, text, before, position, nesting, entropy, max(0.0, nats)))
            nesting = max(0, nesting + sum(text.count(s) for s in OPEN) - sum(text.count(s) for s in CLOSED))
            before = text
    return found


def features(found: Sequence[Place]) -> list[Feature]:
    """The questions: which token, after which, of which class, how deep, how far, how undecided the teacher is, how frequent."""
    counts, after = Counter(place.text for place in found), Counter(place.before for place in found)
    num = len(found)
    asked = [
        Feature(
            lambda p: p.position,
            "after the first {} tokens",
            "in the first {} tokens",
            "after the first {} and within the first {} tokens",
            whole=True,
        ),
        Feature(
            lambda p: p.nesting,
            "at least {} brackets deep",
            "less than {} brackets deep",
            "at least {} and less than {} brackets deep",
            whole=True,
        ),
        Feature(
            lambda p: p.entropy,
            "where the teacher's entropy is above {} nats",
            "where the teacher's entropy is at most {} nats",
            "where the teacher's entropy is between {} and {} nats",
        ),
        Feature(
            lambda p: counts[p.text] / num,
            "where the token is more frequent than {}",
            "where the token is at most as frequent as {}",
            "where the token's frequency is between {} and {}",
        ),
    ]
    classes = [(name, belongs, False) for name, belongs in CLASSES.items()]
    for shown, belongs, exact in [*classes, *((_code(t), t.__eq__, True) for t in _frequent(counts, num))]:
        asked.append(_of_token(shown, belongs, exact))
    for shown, belongs, exact in [*classes, *((_code(t), t.__eq__, True) for t in _frequent(after, num))]:
        asked.append(_of_before(shown, belongs, exact))
    return asked


def _of_token(shown: str, belongs: Callable[[str], bool], exact: bool) -> Feature:
    yes, no = f"where the token is {shown}", f"where the token is not {shown}"
    return Feature(lambda p: float(belongs(p.text)), yes, no, about="token", exact=exact)


def _of_before(shown: str, belongs: Callable[[str], bool], exact: bool) -> Feature:
    yes, no = f"after {shown}", f"not after {shown}"
    return Feature(lambda p: float(belongs(p.before)), yes, no, about="before", exact=exact)


def _frequent(counts: Counter[str], num: int) -> list[str]:
    return [text for text, count in counts.most_common(MOST_TEXTS) if count >= FREQUENT * num]


def _code(text: str) -> str:
    return f"`{text}`" if text.strip() else repr(text)


def rules(rows: Sequence[Row], seed: int = 0) -> list[Rule]:
    """The rules under which the penalty is above its mean, the largest share first; ValueError without enough judged tokens."""
    from sklearn.tree import DecisionTreeRegressor

    found = places(rows)
    halves = [[p for p in found if _half(p.prompt) == side] for side in (0, 1)]
    if min(map(len, halves)) < 50:
        raise ValueError(
            f"there are {len(found)} judged tokens, too few for a rule: raise eval.heatmaps, or take a run with a teacher"
        )
    asked = features(halves[0])
    table = [[[feature.value(place) for feature in asked] for place in half] for half in halves]
    tree = DecisionTreeRegressor(
        max_depth=DEPTH,
        max_leaf_nodes=LEAVES,
        min_samples_leaf=max(5, round(LEAST_SHARE * len(halves[0]))),
        random_state=seed,
    )
    tree.fit(table[0], [place.penalty for place in halves[0]])
    where = tree.apply(table[1])
    told = _paths(tree.tree_, asked)
    total, num = sum(place.penalty for place in halves[1]) or 1.0, len(halves[1])
    made = []
    for leaf, words in told.items():
        inside = [place.penalty for place, node in zip(halves[1], where, strict=True) if node == leaf]
        if inside:
            made.append(Rule(words, sum(inside) / total, len(inside) / num, sum(inside) / len(inside)))
    return sorted((rule for rule in made if rule.share > rule.tokens), key=lambda rule: -rule.share)


def _half(prompt: str) -> int:
    return hashlib.sha256(prompt.encode()).digest()[0] % 2


def _paths(tree: Any, asked: Sequence[Feature]) -> dict[int, str]:
    """leaf -> its conditions in words."""
    found: dict[int, str] = {}

    def walk(node: int, said: dict[int, tuple[float | None, float | None]]) -> None:
        left, right = int(tree.children_left[node]), int(tree.children_right[node])
        if left == right:
            found[node] = _told(said, asked)
            return
        number, threshold = int(tree.feature[node]), float(tree.threshold[node])
        low, high = said.get(number, (None, None))
        walk(left, {**said, number: (low, threshold)})
        walk(right, {**said, number: (threshold, high)})

    walk(0, {})
    return found


def _told(said: dict[int, tuple[float | None, float | None]], asked: Sequence[Feature]) -> str:
    """The conditions: what is so of the tokens, what is not, and numbers. Where a text is named, what it is not goes unsaid."""
    named = {asked[number].about for number, (low, _) in said.items() if low is not None and asked[number].exact}
    numbers = [asked[number].words(*edges) for number, edges in said.items() if asked[number].between]
    texts = [(asked[number], low is not None) for number, (low, _) in said.items() if not asked[number].between]
    yes = [feature.above for feature, is_so in texts if is_so]
    no = [feature.below for feature, is_so in texts if not is_so and feature.about not in named]
    return ", ".join([*sorted(yes, key=lambda words: not words.startswith("after")), *no, *numbers]) or "everywhere"


def write(folder: Path) -> list[str]:
    """Write the rules of a run's first annotated rollouts, those from before training, for its report; returns the sentences."""
    rows = JSONL(folder / "rollouts.jsonl").read()
    if not rows:
        raise ValueError(f"{folder} has no annotated rollouts: train it with eval.heatmaps above 0")
    first = min(row.get("step") or 0 for row in rows)
    found = rules([row for row in rows if (row.get("step") or 0) == first])
    sentences = [rule.sentence() for rule in found if rule.share >= 0.01]
    words = (
        f"A shallow tree on simple features of tokens, fitted on half of the prompts of step {first}; shares are those of the "
        "other half. The penalty is how much less likely the teacher finds a token than the student did."
    )
    section = {"title": TITLE, "words": words, "lines": [line[:1].upper() + line[1:] + "." for line in sentences]}
    path = folder / NAME
    others = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    write_atomically(
        path, json.dumps([*(one for one in others if one.get("title") != TITLE), section], ensure_ascii=False)
    )
    return section["lines"]
