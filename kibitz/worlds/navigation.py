"""The world `navigation`: from a start to a goal, without being told where one is.

A problem names a start and a goal, each by column and row. A response is a walk, one letter a step; ending it is the claim
to have arrived. Where the walker stands is never written, so it has to be remembered:

    prompt     25>46:
    response   ENE           from (2, 5) to (4, 6)

A wrong step is no end: the walk can be mended, if one knows how to. Demonstrations are shortest walks and never show that. A
student that learnt from them alone meets, on its own walks, places that they never went to; this is what is called
exposure bias, and learning on one's own text cures it. In `navigation-astray` a few random steps were made already and stand in
the prompt: what the teacher learns mending from.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from kibitz.worlds import characters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SIZE = 9  # columns and rows, numbered from 1
STEPS = {"N": (0, 1), "E": (1, 0), "S": (0, -1), "W": (-1, 0)}
CHARACTERS = "123456789>:" + "".join(STEPS)


def problems() -> list[str]:
    """All pairs of a start and another place as the goal."""
    places = [f"{column}{row}" for column in range(1, SIZE + 1) for row in range(1, SIZE + 1)]
    return [f"{start}>{goal}" for start in places for goal in places if start != goal]


def missing(prompt: str, walk: str = "") -> tuple[int, int]:
    """Return how far east and north of the walker the goal still is, after the steps of the prompt and of a walk.

    The plane has no edge: a step out of the grid is a step like any other."""
    problem, _, made = prompt.partition(":")
    (x, y), (goal_x, goal_y) = ([int(digit) for digit in place] for place in problem.split(">"))
    for letter in made + walk:
        x, y = x + STEPS[letter][0], y + STEPS[letter][1]
    return goal_x - x, goal_y - y


def shortest(prompt: str, rng: random.Random) -> str:
    """A shortest walk to the goal, every order of its steps equally likely."""
    east, north = missing(prompt)
    letters = ["E" if east > 0 else "W"] * abs(east) + ["N" if north > 0 else "S"] * abs(north)
    rng.shuffle(letters)
    return "".join(letters)


def grade(prompt: str, text: str) -> float:
    """1.0 if a response is a walk that ends at the goal, by whatever way, else 0.0."""
    return float(set(text) <= STEPS.keys() and missing(prompt, text) == (0, 0))


def split_of(problem: str) -> str:
    """`train`, `dev` or `test`: a function of start and goal alone, so no two splits ever share a problem."""
    bucket = int.from_bytes(hashlib.sha256(problem.encode()).digest()[:4], "big") % 10
    return "dev" if bucket == 0 else "test" if bucket == 1 else "train"


@dataclass(frozen=True)
class Navigation:
    """Problems in whose prompts at most `strays` random steps are made already."""

    name: str
    description: str
    strays: int = 0

    @property
    def longest_response(self) -> int:
        """Tokens, with room for a walk that has to be mended."""
        return 64

    def _prompts(self, split: str, seed: int) -> Iterator[str]:
        """Distinct prompts; without strays there are as many as problems, else no end of them."""
        if split not in ("train", "dev", "test"):
            raise ValueError(f"the splits of the world {self.name!r} are train, dev and test; there is no {split!r}")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        found = [problem for problem in problems() if split_of(problem) == split]
        rng.shuffle(found)
        seen: set[str] = set()
        for problem in cycle(found) if self.strays else found:
            prompt = f"{problem}:" + "".join(rng.choices("".join(STEPS), k=rng.randint(0, self.strays)))
            # A walk that has gone astray to its goal would want an empty answer, which is no text to learn.
            if prompt not in seen and missing(prompt) != (0, 0):
                seen.add(prompt)
                yield prompt

    def rows(self, split: str, count: int, seed: int) -> list[dict]:
        """Distinct problems, as many as there are. A shorter list of the same split and seed is the head of a longer one."""
        prompts = islice(self._prompts(split, seed), count)
        return [{"prompt": prompt, "answer": prompt[3:5], "task": "navigation"} for prompt in prompts]

    def demonstrations(self, split: str, count: int, seed: int, corrupted: float = 0.0) -> list[dict]:
        """The problems of `rows` with a shortest walk each; with probability `corrupted` one step of it goes elsewhere."""
        rng = random.Random(f"{self.name}/{split}/{seed}/walks")
        rows = []
        for row in self.rows(split, count, seed):
            walk = shortest(row["prompt"], rng)
            if rng.random() < corrupted:
                at = rng.randrange(len(walk))
                walk = walk[:at] + rng.choice([letter for letter in STEPS if letter != walk[at]]) + walk[at + 1 :]
            rows.append({"prompt": row["prompt"], "response": walk, **row})
        return rows

    def grade(self, row: dict, text: str) -> float:
        """1.0 if the decoded response, special tokens left out, is a walk that ends at the row's goal."""
        return grade(row["prompt"], text)

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The colon ends the user's turn: steps that were made already read like those of the walker."""
        return characters.tokenizer(CHARACTERS, assistant="")

    def checkpoint(self, name: str) -> Path:
        """The Hugging Face folder of a shipped model: `teacher` or `student`."""
        return characters.shipped(self.name, "navigation", name)
