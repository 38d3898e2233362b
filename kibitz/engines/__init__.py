"""Engines write responses. They know token ids and no text; seeds decide every token, the batch decides none."""

from collections.abc import Callable, Sequence
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


@runtime_checkable
class Checked(Protocol):
    """An engine that writes elsewhere, perhaps while the student's weights are about to change."""

    def believed(self) -> bool:
        """Whether what `generate` wrote last has the log-probabilities that the student, as it is now, gives it."""
        ...
