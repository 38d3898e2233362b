"""Toy worlds: tasks a CPU can learn, with prompts, demonstrations, a grader, a tokenizer and shipped models.

A world has no state: everything it gives is a function of the split, the count and the seed.
"""

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kibitz.worlds import assistant
from kibitz.worlds.arithmetic import Arithmetic
from kibitz.worlds.arithmetic_long import ArithmeticLong
from kibitz.worlds.navigation import Navigation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["WORLDS", "World", "get"]


class World(Protocol):
    """A world is what a recipe's `data: {world: name}` stands for. Rows have the columns `prompt`, `answer` and `task`."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def longest_response(self) -> int:
        """The limit of a response in `kibitz eval`, in tokens."""
        ...

    def rows(self, split: str, count: int, seed: int) -> list[dict]:
        """Distinct problems; a world that has few of a kind may bring them again. Train, dev and test share none."""
        ...

    def demonstrations(self, split: str, count: int, seed: int, corrupted: float = 0.0) -> list[dict]:
        """Rows with a `response` each, without the end-of-sequence token."""
        ...

    def grade(self, row: dict, text: str) -> float:
        """The reward in [0, 1] of a decoded response, special tokens left out."""
        ...

    def tokenizer(self) -> "PreTrainedTokenizerBase": ...

    def checkpoint(self, name: str) -> Path: ...


WORLDS: dict[str, World] = {
    world.name: world
    for world in (
        Arithmetic("arithmetic", "order of operations modulo 10, 3 to 5 operators", fewest=3, most=5),
        Arithmetic("arithmetic-wide", "the same with 1 to 5 operators, for training from nothing", fewest=1, most=5),
        ArithmeticLong(
            "arithmetic-long", "1, 2, 4 or 8 expressions in one prompt, for training the models", counts=(1, 2, 4, 8)
        ),
        ArithmeticLong("arithmetic-long-1", "one expression of 2 or 3 operators", counts=(1,)),
        ArithmeticLong("arithmetic-long-2", "two in one prompt, rewarded if both are right", counts=(2,)),
        ArithmeticLong("arithmetic-long-4", "four in one prompt, rewarded if all are right", counts=(4,)),
        ArithmeticLong("arithmetic-long-8", "eight in one prompt, rewarded if all are right", counts=(8,)),
        Navigation("navigation", "walk to a goal without being told where one is"),
        Navigation("navigation-astray", "the same after up to 8 random steps, for training from nothing", strays=8),
        *assistant.worlds(),
    )
}


def get(name: str) -> World:
    """The world of that name."""
    if name in WORLDS:
        return WORLDS[name]
    nearest = difflib.get_close_matches(name, WORLDS, n=1, cutoff=0.0)[0]
    raise ValueError(f"there is no world {name!r}; did you mean {nearest!r}? The worlds are: {', '.join(WORLDS)}")
