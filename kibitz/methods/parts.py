"""What a method is, and what it is made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kibitz.config import Recipe
from kibitz.engines import Engine
from kibitz.losses.chunked import Criterion, over_chunks
from kibitz.models import LanguageModel
from kibitz.types import Batch, Prompt, Rollout, Sampling, Scored


class Method(Protocol):
    """Rewards, where there is a grader, stand in the rollouts before `signal` is called."""

    def rollout(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]:
        """What is learnt from in one step, in the same order for the same seed."""
        ...

    def signal(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        """What each token is told; one entry per rollout, in order."""
        ...

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over the batch of weight x loss, not divided, and per-token values `[T]` to log."""
        ...


@dataclass(frozen=True)
class Parts:
    """What methods are made of. `divergence` is the user's own `(student_CS, teacher_CS) -> loss_C`, if one was passed."""

    recipe: Recipe
    engine: Engine
    teacher: LanguageModel | None
    sampling: Sampling
    encode_response: Callable[[str], list[int]]
    divergence: Callable[[Tensor, Tensor], Tensor] | None = None


def token_loss(
    student: LanguageModel, batch: Batch, criterion: Criterion, chunk_tokens: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """A criterion over all response tokens of a batch, inside the student's own forward pass."""
    size = chunk_tokens or student.chunk_tokens
    return student(batch, lambda hidden_TD, head: over_chunks(criterion, hidden_TD, head, batch.tokens, size))
