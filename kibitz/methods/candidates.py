"""The tokens that a teacher is asked to score: at each position the student's K likeliest, and the one that was written."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kibitz.batching import group, pack
from kibitz.ledger import Count, uncounted
from kibitz.models import LanguageModel
from kibitz.signals import Scored
from kibitz.types import Rollout


@torch.no_grad()
def student_top_k(
    student: LanguageModel,
    top_k: int,
    tokens_per_micro_batch: int,
    rollouts: Sequence[Rollout],
    count: Count = uncounted,
) -> list[Tensor]:
    """`[T, 1 + K]` ids of each rollout, the written token first; it may stand there twice. The student's own top K at the
    weights that the loss will see, at the cost of one more forward pass."""
    found: dict[int, Tensor] = {}
    for indices in group(rollouts, tokens_per_micro_batch):
        members = [rollouts[i] for i in indices]
        batch = pack([Scored(r, r.weight_T()) for r in members], student.device)
        size, k = student.chunk_tokens, min(top_k, student.vocab_size)

        def likeliest(hidden_TD: Tensor, head, size: int = size, k: int = k) -> tuple[Tensor]:
            return (
                torch.cat([head(hidden_CD).float().topk(k, dim=-1).indices for hidden_CD in hidden_TD.split(size)]),
            )

        (ids_TK,) = student(batch, likeliest)
        ids_TK = torch.cat([batch.tokens.token_T[:, None], ids_TK], dim=-1).cpu()
        found |= dict(zip(indices, ids_TK.split([r.num_tokens for r in members]), strict=True))
    count(student, rollouts)
    return [found[i] for i in range(len(rollouts))]
