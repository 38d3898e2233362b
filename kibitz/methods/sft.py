"""Supervised fine-tuning: cross-entropy on demonstrations, the data's or the teacher's (off-policy distillation)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from kibitz.config import SFTConfig
from kibitz.engines.torch import TorchEngine
from kibitz.losses.criteria import CrossEntropy
from kibitz.methods.parts import Parts, token_loss
from kibitz.models import LanguageModel
from kibitz.types import Batch, Prompt, Rollout, Scored, Writer


@dataclass(frozen=True)
class SFT:
    parts: Parts
    teacher_engine: TorchEngine | None

    def rollout(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]:
        if self.teacher_engine is None:
            return [self._demonstration(prompt) for prompt in prompts]
        rollouts = self.teacher_engine.generate(prompts, replace(self.parts.sampling, seed=seed))
        return [replace(r, writer_T=torch.full((r.num_tokens,), Writer.TEACHER, dtype=torch.uint8)) for r in rollouts]

    def _demonstration(self, prompt: Prompt) -> Rollout:
        assert prompt.response is not None
        ids = self.parts.encode_response(prompt.response)
        writer_T = torch.full((len(ids),), Writer.DATASET, dtype=torch.uint8)
        return Rollout(prompt, ids, torch.zeros(len(ids)), finished=True, writer_T=writer_T, text=prompt.response)

    def signal(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        return [Scored(rollout, rollout.weight_T()) for rollout in rollouts]

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return token_loss(student, batch, CrossEntropy(), self.parts.recipe.optim.chunk_tokens)


def build(parts: Parts) -> SFT:
    config = cast(SFTConfig, parts.recipe.method)
    if config.source == "dataset":
        return SFT(parts, None)
    assert parts.teacher is not None
    return SFT(parts, TorchEngine(parts.teacher, parts.recipe.rollout.max_rows))
