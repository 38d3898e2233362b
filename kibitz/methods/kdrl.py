"""KDRL (2506.02208): GRPO, and beside its loss the reverse KL to the teacher, k2 on the sampled tokens, which fades."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from kibitz.config import KDRLConfig
from kibitz.losses.criteria import PolicyGradient
from kibitz.losses.joint import Sum, sampled_reverse_kl
from kibitz.methods.grpo import GRPO
from kibitz.methods.parts import Parts, policy_loss, scorer, token_loss
from kibitz.methods.sources import Linear
from kibitz.models import LanguageModel
from kibitz.teachers import Scorer
from kibitz.types import Batch, Prompt, Rollout, Scored, Step


@dataclass
class KDRL:
    """`coefficient` is that of the step whose rollouts were written last."""

    config: KDRLConfig
    grpo: GRPO
    teacher: Scorer
    coefficient: float

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        self.coefficient = Linear(self.config.kl_coef, self.config.kl_coef_end).at(step)
        return self.grpo.rollout(prompts, step)

    def signal(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        pairs = zip(self.grpo.signal(rollouts), self.teacher.score(rollouts), strict=True)
        return [
            replace(one, signal=signal, numbers={"kl_coef": self._coefficient_T(one.rollout)}) for one, signal in pairs
        ]

    def _coefficient_T(self, rollout: Rollout) -> Tensor:
        skipped = self.config.skip_correct and rollout.reward is not None and rollout.reward >= 1
        return torch.full((rollout.num_tokens,), 0.0 if skipped else self.coefficient)

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        criterion = Sum(PolicyGradient(policy_loss(self.config), coefficient=0.0), sampled_reverse_kl)
        return token_loss(student, batch, criterion, self.grpo.parts.recipe.optim.chunk_tokens)


def build(parts: Parts) -> KDRL:
    config = cast(KDRLConfig, parts.recipe.method)
    return KDRL(config, GRPO(config, parts), scorer(parts, config), config.kl_coef)
