"""Engines write responses. They know token ids and no text; seeds decide every token, the batch decides none."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from kibitz.ledger import Count, uncounted
from kibitz.types import Prompt, Rollout, Sampling

OnReady = Callable[[Sequence[Rollout]], object]
"""Gets rollouts as soon as they are finished, while others are still written, perhaps from another thread."""


def nobody_waits(rollouts: Sequence[Rollout]) -> None:
    """Do nothing with finished rollouts: the caller waits until all are written."""


class Engine(Protocol):
    """Writes `sampling.num_samples` responses to each prompt."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_ready: OnReady = nobody_waits, count: Count = uncounted
    ) -> list[Rollout]:
        """The rollouts in the order of the prompts, the samples of one prompt next to each other. `on_ready` gets each of
        them once, in the process that writes it; `count` is called there with each model and the rollouts that it has read."""
        ...

    def sync(self, student: Any) -> None:
        """Take the student's new weights. Called after every optimizer step, before the next `generate`."""
        ...

    def metrics(self) -> dict[str, Any]:
        """Numbers of the step since the last call, for its row."""
        ...

    def close(self) -> None:
        """Nobody asks for rollouts any more."""
        ...


class Unfinished(Exception):
    """Not all is written: servers failed in the background, and are looked after by `Overlapping.settle`."""


@runtime_checkable
class Overlapping(Protocol):
    """An engine that can write elsewhere while the student learns, for several processes their shares. All of them call `begin`
    and `settle` in the same order; in between a thread of each may write, and calls nothing that processes do together."""

    def begin(self) -> None:
        """Make sure that servers hold the student's weights, and forget what was written in the background."""
        ...

    def in_background(self) -> AbstractContextManager[None]:
        """A context inside which `generate`, called in this thread, writes this process's share, or raises `Unfinished`. What
        is written is kept: called again, it writes what is missing."""
        ...

    def settle(self) -> bool:
        """Return whether what all processes have written is whole, and came from the student's weights as they are now.
        Otherwise servers are ready for another try of `generate`."""
        ...
