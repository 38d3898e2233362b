"""Engines write responses. They know token ids and no text; seeds decide every token, the batch decides none."""

from collections.abc import Sequence
from typing import Any, Protocol

from kibitz.types import Prompt, Rollout, Sampling


class Engine(Protocol):
    """Writes `sampling.num_samples` responses to each prompt."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """The rollouts in the order of the prompts, the samples of one prompt next to each other."""
        ...

    def sync(self, student: Any) -> None:
        """Take the student's new weights. Called after every optimizer step, before the next `generate`."""
        ...

    def close(self) -> None:
        """Nobody asks for rollouts any more."""
        ...
