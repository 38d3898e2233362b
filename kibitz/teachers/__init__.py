"""Teachers: rollouts in, what they say about each token out."""

from collections.abc import Sequence
from typing import Protocol

from kibitz.types import Rollout, Signal


class Teacher(Protocol):
    def score(self, rollouts: Sequence[Rollout]) -> list[Signal]:
        """One signal per rollout, in order, an entry for each response token."""
        ...
