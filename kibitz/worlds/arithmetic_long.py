"""The worlds `arithmetic-long-K`: K expressions of the world `arithmetic` in one prompt, to be solved one after the other.

Each expression has a letter, counted down to A, so that a model that reads from left to right knows from the letter alone
how many are still to come. A response repeats each expression before it solves it:

    prompt     B8+2*3A(1-4)*2
    response   B8+2*3=8+6=4A(1-4)*2=7*2=4

The reward is for all of them together: with K it gets rarer, and one bit has to say something about K times as many tokens.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kibitz.worlds import characters
from kibitz.worlds.arithmetic import CHARACTERS, expression, misreadable, solve, split_of, value

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LETTERS = "ABCDEFGH"
FEWEST, MOST = 2, 3  # operators of one expression
INVITING = 0.3  # of the expressions are chosen to be misreadable; of the others a seventh is
ROOM = 512  # tokens of a prompt and its response: the longest have some 100 and 230
PARTS = re.compile("([A-H])([^A-H]*)")


def lettered(expressions: list[str]) -> str:
    """The prompt."""
    return "".join(letter + text for letter, text in zip(_letters(len(expressions)), expressions, strict=True))


def parts(text: str) -> list[tuple[str, str]]:
    """Each letter of a prompt or response, with what follows it up to the next."""
    return PARTS.findall(text)


def _letters(num: int) -> str:
    return LETTERS[:num][::-1]


def _expression(rng: random.Random, split: str, inviting: bool) -> str:
    while True:
        text = expression(rng, rng.randint(FEWEST, MOST))
        if split_of(text) == split and (misreadable(text) or not inviting):
            return text


def right(answer: str, text: str) -> list[bool]:
    """Return which expressions a response answers rightly: a digit of `answer` each. As in `arithmetic`, steps are not looked
    at. A letter that is missing, or stands twice, is answered wrongly."""
    found = parts(text)
    letters = [letter for letter, _ in found]
    ends = {letter: part.rpartition("=")[2] for letter, part in found}
    return [
        letters.count(letter) == 1 and ends[letter] == digit
        for letter, digit in zip(_letters(len(answer)), answer, strict=True)
    ]


def grade(answer: str, text: str) -> float:
    """1.0 if a response answers every expression rightly, in their order, and says nothing else, else 0.0."""
    in_order = "".join(letter for letter, _ in parts(text)) == _letters(len(answer))
    return float(in_order and text[:1] in LETTERS and all(right(answer, text)))


@dataclass(frozen=True)
class ArithmeticLong:
    """Problems of as many expressions as one of `counts` says, each count equally often."""

    name: str
    description: str
    counts: tuple[int, ...]

    @property
    def longest_response(self) -> int:
        """Tokens, with some room; no right one is longer."""
        return 32 * max(self.counts)

    def _problems(self, split: str, count: int, seed: int, inviting: float) -> Iterator[list[str]]:
        """No two splits share an expression; prompts differ, while an expression may stand in several."""
        if split not in ("train", "dev", "test"):
            raise ValueError(f"the splits of the world {self.name!r} are train, dev and test; there is no {split!r}")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        seen: set[str] = set()
        while len(seen) < count:
            found = [_expression(rng, split, rng.random() < inviting) for _ in range(rng.choice(self.counts))]
            if (prompt := lettered(found)) not in seen:
                seen.add(prompt)
                yield found

    def rows(self, split: str, count: int, seed: int, reward: str = "all", inviting: float = INVITING) -> list[dict]:
        """Distinct problems with their answers, a digit an expression. `reward`: `all` right or nothing, or the `share` of the
        expressions that are. `inviting`: the share of expressions that are chosen to be misreadable, as `5+2*3` is."""
        if reward not in ("all", "share"):
            raise ValueError(f"data.options.reward is all or share, not {reward!r}")
        return [
            {"prompt": lettered(found), "answer": "".join(map(value, found)), "task": "arithmetic", "reward": reward}
            for found in self._problems(split, count, seed, inviting)
        ]

    def demonstrations(
        self, split: str, count: int, seed: int, corrupted: float = 0.0, reward: str = "all", inviting: float = INVITING
    ) -> list[dict]:
        """The problems of `rows` with one solution each, as `arithmetic` has them."""
        rng = random.Random(f"{self.name}/{split}/{seed}/solutions")
        rows = []
        for row in self.rows(split, count, seed, reward, inviting):
            solved = [f"{letter}{text}={solve(text, rng, corrupted)}" for letter, text in parts(row["prompt"])]
            rows.append({"prompt": row["prompt"], "response": "".join(solved), **row})
        return rows

    def grade(self, row: dict, text: str) -> float:
        """Return the reward that the row's `reward` asks for, of a decoded response without special tokens."""
        if row.get("reward") == "share":
            answered = right(row["answer"], text)
            return sum(answered) / len(answered)
        return grade(row["answer"], text)

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """Return the tokenizer of `arithmetic` with the letters behind it."""
        return characters.tokenizer(CHARACTERS + LETTERS, room=ROOM)

    def checkpoint(self, name: str) -> Path:
        """The Hugging Face folder of a shipped model, `teacher` or `student`; they are the same for every K."""
        return characters.shipped(self.name, "arithmetic-long", name)
