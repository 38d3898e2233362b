"""The world `arithmetic`: order of operations, modulo 10.

A problem is an expression over one-digit numbers with `+ - * ( )`. A solution rewrites one part a line, any part
that may be reduced now, until a digit is left; the lines are joined by `=`:

    prompt     5+(2*3)-4
    response   5+6-4=1-4=7

Every value is taken modulo 10, so each number is one character and one token. The response does not repeat the
prompt. A student that was also shown *corrupted* solutions has a misconception rather than a gap: it reads `5+2*3`
from left to right, as `7*3`, although it can do all the rest. Wrong policy over a latent ability is what
post-training of a language model meets too, and what on-policy distillation mends in a few dozen steps.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kibitz.worlds import characters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHARACTERS = "0123456789+-*()="


# --- expressions ---------------------------------------------------------------------------------------------------


def expression(rng: random.Random, num_operators: int) -> str:
    """A random expression: a chain of digits in which up to two random stretches are put in parentheses."""
    items = [str(rng.randrange(10))]
    for _ in range(num_operators):
        items += [rng.choice("+-*"), str(rng.randrange(10))]
    for _ in range(rng.randrange(3)):
        num_operands = len(items) // 2 + 1
        if num_operands < 3:
            break  # parentheses around everything say nothing
        length = rng.randrange(2, num_operands)
        first = 2 * rng.randrange(num_operands - length + 1)
        last = first + 2 * length - 1
        items[first:last] = ["(" + "".join(items[first:last]) + ")"]
    return "".join(items)


def _pairs(text: str) -> Iterator[tuple[int, str, str, str]]:
    """Each `digit operator digit` in the text: its index, what stands before, the operator, what stands after.

    The ends of the text count as parentheses.
    """
    fenced = f"({text})"
    for at in range(len(text) - 2):
        left, operator, right = text[at : at + 3]
        if left.isdigit() and operator in "+-*" and right.isdigit():
            yield at, fenced[at], operator, fenced[at + 4]


def reducible(text: str) -> list[int]:
    """Return the places where a pair may be reduced now: `*` binds tighter than `+ -`, and equals are taken from the left."""
    return [
        at
        for at, before, operator, after in _pairs(text)
        if (before != "*" if operator == "*" else before == "(" and after != "*")
    ]


def misreadable(text: str) -> list[int]:
    """Return the places where `a+b*...` or `a-b*...` invites reducing the left pair first, which is the misconception."""
    return [at for at, before, operator, after in _pairs(text) if operator != "*" and before != "*" and after == "*"]


def reversible(text: str) -> list[int]:
    """Return the places where `a-b-...` or `a-b+...` invites reducing the right pair first: another misconception."""
    return [at for at, before, operator, after in _pairs(text) if operator != "*" and before == "-" and after != "*"]


def reduce(text: str, at: int, off: int = 0) -> str:
    """The expression after the pair at `at` is replaced by its value modulo 10; parentheses around one digit go. `off` is by
    how much a slip misses the value."""
    left, operator, right = int(text[at]), text[at + 1], int(text[at + 2])
    value = {"+": left + right, "-": left - right, "*": left * right}[operator]
    value, end = (value + off) % 10, at + 3
    if text[at - 1 : at] == "(" and text[end : end + 1] == ")":
        at, end = at - 1, end + 1
    return f"{text[:at]}{value}{text[end:]}"


def solve(text: str, rng: random.Random, corrupted: float = 0.0, slips: float = 0.0, backwards: float = 0.0) -> str:
    """A solution with its steps in random order; each time the text can be misread, it is with probability `corrupted`, each
    time it can be taken from the right, with probability `backwards`; and with probability `slips` the value of a step is
    some other digit."""
    lines = []
    while len(text) > 1:
        mistakes = misreadable(text) if corrupted else []
        places = mistakes if mistakes and rng.random() < corrupted else reducible(text)
        if backwards and (wrong := reversible(text)) and rng.random() < backwards:
            places = wrong
        at = rng.choice(places)
        off = rng.randint(1, 9) if slips and rng.random() < slips else 0
        text = reduce(text, at, off)
        lines.append(text)
    return "=".join(lines)


def value(text: str) -> str:
    """The digit the expression is worth modulo 10."""
    while len(text) > 1:
        text = reduce(text, reducible(text)[0])
    return text


# --- judging -------------------------------------------------------------------------------------------------------


def grade(answer: str, text: str) -> float:
    """1.0 if the last line of a response is the answer and nothing else, else 0.0.

    Steps are not looked at: a wrong derivation that ends in the right digit passes, as it does under any outcome reward.
    """
    return float(text.rpartition("=")[2] == answer)


def first_wrong_step(prompt: str, response: str) -> int | None:
    """Index of the first character of a response at which it stops being a derivation; None if it never does.

    A response that stops before a single digit is reached gives `len(response)`: its end is the wrong token. An
    error is where the text can no longer be completed to a right line, so a wrong choice of the part to reduce may
    show a character or two after the mind went wrong.
    """
    line, done = prompt, 0  # `done`: where the line now being written begins
    while True:
        nexts = [reduce(line, at) for at in reducible(line)]
        end = response.find("=", done)
        written = response[done:] if end < 0 else response[done:end]
        for length in range(1, len(written) + 1):
            if not any(candidate.startswith(written[:length]) for candidate in nexts):
                return done + length - 1
        if written not in nexts:
            return done + len(written)  # the line was broken off
        if len(written) == 1:
            return None if end < 0 else end  # nothing may follow the last digit
        if end < 0:
            return len(response)
        line, done = written, end + 1


# --- the world -----------------------------------------------------------------------------------------------------


def split_of(text: str) -> str:
    """`train`, `dev` or `test`: a function of the expression alone, so no two splits ever share one."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100
    return "dev" if bucket < 5 else "test" if bucket < 10 else "train"


@dataclass(frozen=True)
class Arithmetic:
    """Problems with `fewest` to `most` operators, each number of operators equally often."""

    name: str
    description: str
    fewest: int
    most: int
    folder: str = "arithmetic"

    @property
    def longest_response(self) -> int:
        """Tokens, with some room; no right one is longer."""
        return 64

    def _expressions(self, split: str, count: int, seed: int) -> Iterator[str]:
        if split not in ("train", "dev", "test"):
            raise ValueError(f"the splits of the world {self.name!r} are train, dev and test; there is no {split!r}")
        # A string seeds `Random` through SHA-512; a tuple would go through hash(), which differs between processes.
        rng = random.Random(f"{self.name}/{split}/{seed}")
        seen: set[str] = set()
        while len(seen) < count:
            text = expression(rng, rng.randint(self.fewest, self.most))
            if text not in seen and split_of(text) == split:
                seen.add(text)
                yield text

    def rows(self, split: str, count: int, seed: int) -> list[dict]:
        """Distinct problems with their answers. A shorter list of the same split and seed is the head of a longer one."""
        return [
            {"prompt": text, "answer": value(text), "task": "arithmetic"}
            for text in self._expressions(split, count, seed)
        ]

    def demonstrations(
        self, split: str, count: int, seed: int, corrupted: float = 0.0, slips: float = 0.0, backwards: float = 0.0
    ) -> list[dict]:
        """The problems of `rows` with one solution each, without the end-of-sequence token.

        `answer` stays the true value where a solution with errors, as `solve` has them, misses it.
        """
        rng = random.Random(f"{self.name}/{split}/{seed}/solutions")
        return [
            {"prompt": row["prompt"], "response": solve(row["prompt"], rng, corrupted, slips, backwards), **row}
            for row in self.rows(split, count, seed)
        ]

    def grade(self, row: dict, text: str) -> float:
        """1.0 if the decoded response, special tokens left out, ends in the row's answer."""
        return grade(row["answer"], text)

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        return tokenizer()

    def checkpoint(self, name: str) -> Path:
        """The Hugging Face folder of a shipped model: `teacher`; `student`, which has the misconception; and two students to
        compare it with: `slips`, which errs at random, and `undertrained`, which never became competent."""
        return characters.shipped(self.name, self.folder, name)


def tokenizer() -> "PreTrainedTokenizerFast":
    """One token a character."""
    return characters.tokenizer(CHARACTERS)
