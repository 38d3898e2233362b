"""KDRL (2506.02208): GRPO, and beside its loss the reverse KL to the teacher, k2 on the sampled tokens, which fades."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kibitz.config import KDRLConfig
from kibitz.losses.criteria import PolicyGradient
from kibitz.losses.joint import Sum, sampled_reverse_kl
from kibitz.methods.grpo import GRPO
from kibitz.methods.parts import Parts, late_scorer, policy_loss, token_loss
from kibitz.methods.sources import Linear
from kibitz.models import LanguageModel
from kibitz.signals import Batch, Scored
from kibitz.teachers import Late, Scorer, prefetch
from kibitz.types import Prompt, Rollout, Step


@dataclass(frozen=True)
class KDRL:
    config: KDRLConfig
    grpo: GRPO
    teacher: Scorer | Late

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        return self.grpo.rollout(prompts, step)

    def signal(self, rollouts: Sequence[Rollout], step: Step) -> list[Scored]:
        coefficient = Linear(self.config.kl_coef, self.config.kl_coef_end).at(step)
        pairs = zip(self.grpo.signal(rollouts, step), self.teacher.score(rollouts), strict=True)
        return [
            replace(one, signal=signal, numbers={"kl_coef": self._coefficient_T(one.rollout, coefficient)})
            for one, signal in pairs
        ]

    def _coefficient_T(self, rollout: Rollout, coefficient: float) -> Tensor:
        skipped = self.config.skip_correct and rollout.reward is not None and rollout.reward >= 1
        return torch.full((rollout.num_tokens,), 0.0 if skipped else coefficient)

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        criterion = Sum(PolicyGradient(policy_loss(self.config), coefficient=0.0), sampled_reverse_kl)
        return token_loss(student, batch, criterion, self.grpo.parts.recipe.optim.chunk_tokens)


def build(config: KDRLConfig, parts: Parts) -> KDRL:
    teacher = late_scorer(parts, config)
    return KDRL(config, GRPO(config, parts, prefetch(teacher)), teacher)
