"""RL from one reward per response: each token gets the response's reward minus the mean of its prompt's group."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kibitz.config import GroupConfig
from kibitz.engines import OnReady, nobody_waits
from kibitz.losses.criteria import PolicyGradient
from kibitz.losses.policy_gradient import group_advantages
from kibitz.methods.parts import Parts, policy_loss, token_loss
from kibitz.methods.sources import Generated
from kibitz.models import LanguageModel
from kibitz.signals import Batch, Scored
from kibitz.types import Prompt, Rollout, Step


@dataclass(frozen=True)
class GRPO:
    config: GroupConfig
    parts: Parts
    on_ready: OnReady = nobody_waits

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        return Generated(self.parts.engine, self.parts.sampling, on_ready=self.on_ready).rollout(prompts, step)

    def signal(self, rollouts: Sequence[Rollout], step: Step) -> list[Scored]:
        """Every token of a rollout has the rollout's advantage; a group in which all did alike teaches nothing."""
        rewards_GN = torch.tensor([r.reward for r in rollouts]).view(-1, self.parts.sampling.num_samples)
        advantages = group_advantages(rewards_GN, self.config.normalize_std).flatten()
        return [
            Scored(rollout, rollout.weight_T(), advantage_T=advantage.expand(rollout.num_tokens))
            for rollout, advantage in zip(rollouts, advantages, strict=True)
        ]

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        criterion = PolicyGradient(policy_loss(self.config), temperature=self.parts.sampling.temperature)
        return token_loss(student, batch, criterion, self.parts.recipe.optim.chunk_tokens)


def build(config: GroupConfig, parts: Parts) -> GRPO:
    return GRPO(config, parts)
