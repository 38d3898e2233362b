"""On-policy distillation: the student writes, the teacher scores every token that it wrote.

With `support: sampled` the teacher scores the written token only, and the student learns by policy gradient: the
published form, which rewards, a discount and a baseline can join.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kibitz.config import OPDConfig, PolicyConfig
from kibitz.engines import OnReady
from kibitz.losses.criteria import PolicyGradient
from kibitz.losses.policy_gradient import clipped, discounted, distillation_advantage, extrapolated, group_advantages
from kibitz.methods.distillation import distil, distil_spans
from kibitz.methods.parts import Method, Parts, late_scorer, policy_loss, teacher_engine, token_loss
from kibitz.methods.reference import reference_scorer
from kibitz.methods.sources import Generated, Linear, Seeded, Source, Stored
from kibitz.models import LanguageModel
from kibitz.signals import Batch, Deferred, Sampled, Scored, Signal
from kibitz.teachers import Late, Scorer, prefetch
from kibitz.types import Prompt, Rollout, Step, Writer


@dataclass(frozen=True)
class SampledTokenOPD:
    config: PolicyConfig
    source: Source
    teacher: Scorer | Late
    chunk_tokens: int | None
    group_size: int
    reference: Scorer | None = None

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        return self.source.rollout(prompts, step)

    def signal(self, rollouts: Sequence[Rollout], step: Step) -> list[Scored]:
        """A token's own credit is the criterion's to give; what needs whole rollouts, rewards or a discount, is given here."""
        scored = [Scored.from_signal(r, s) for r, s in zip(rollouts, self.teacher.score(rollouts), strict=True)]
        if self.reference is not None:
            references = self.reference.score(rollouts)
            scored = [
                replace(one, advantage_T=self._credited(one.rollout, one.signal, reference))
                for one, reference in zip(scored, references, strict=True)
            ]
        elif self.config.discount:
            scored = [replace(one, advantage_T=self._credited(one.rollout, one.signal)) for one in scored]
        return self._rewarded(scored) if self.config.reward_coef else scored

    def _rewarded(self, scored: list[Scored]) -> list[Scored]:
        """Add each response's reward, minus the mean of its prompt's group, to the advantage of its tokens."""
        rewards_GN = torch.tensor([one.rollout.reward for one in scored]).view(-1, self.group_size)
        added = []
        for one, advantage in zip(scored, group_advantages(rewards_GN).flatten(), strict=True):
            reward_T = self.config.reward_coef * advantage.expand(one.rollout.num_tokens)
            added.append(replace(one, advantage_T=reward_T if one.advantage_T is None else one.advantage_T + reward_T))
        return added

    def _credited(self, rollout: Rollout, signal: Signal | Deferred | None, reference: Signal | None = None) -> Tensor:
        """A token's whole advantage: extrapolated beyond the teacher, clipped, with credit for what follows."""
        assert isinstance(signal, Sampled)
        teacher_T = signal.logp_T
        if reference is not None:
            assert isinstance(reference, Sampled)
            teacher_T = extrapolated(teacher_T, reference.logp_T.to(teacher_T.device), self.config.extrapolation)
        advantage_T = distillation_advantage(rollout.logp_T, teacher_T.cpu(), self.config.kl_coef)
        if self.config.clip_advantage is not None:
            advantage_T, _ = clipped(advantage_T, -self.config.clip_advantage, self.config.clip_advantage)
        return discounted(advantage_T * rollout.weight_T(), self.config.discount)

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        clip = None if config.clip_advantage is None else (-config.clip_advantage, config.clip_advantage)
        coefficient = 0.0 if config.discount or self.reference is not None else config.kl_coef
        criterion = PolicyGradient(policy_loss(config), coefficient, config.baseline, clip)
        return token_loss(student, batch, criterion, self.chunk_tokens)


def build(config: OPDConfig, parts: Parts) -> Method:
    teacher = late_scorer(parts, config)
    source = _source(parts, config, prefetch(teacher))
    if config.alignment != "spans":
        return distil_spans(parts, config, source, teacher)
    if config.policy is None:
        return distil(parts, config, source, teacher)
    reference = reference_scorer(parts, "sampled") if config.policy.extrapolation != 1 else None
    chunk_tokens, group_size = parts.recipe.optim.chunk_tokens, parts.sampling.num_samples
    return SampledTokenOPD(config.policy, source, teacher, chunk_tokens, group_size, reference)


def _source(parts: Parts, config: OPDConfig, on_ready: OnReady) -> Source:
    """The student, whole or cut to a prefix, alone or after the teacher; or what was written earlier."""
    if parts.stored is not None:
        return Stored(parts.stored, parts.sampling.num_samples)
    limit = None
    if config.prefix_tokens is not None:
        end = parts.sampling.max_tokens if config.prefix_grows else config.prefix_tokens
        limit = Linear(config.prefix_tokens, end)
    if not config.seed_tokens:
        return Generated(parts.engine, parts.sampling, limit=limit, on_ready=on_ready)
    student = Generated(parts.engine, parts.sampling, limit=limit)  # what it writes is no whole response
    teacher = Generated(teacher_engine(parts), parts.sampling, Writer.TEACHER)
    end = 0 if config.seed_decays else config.seed_tokens
    return Seeded(teacher, student, Linear(config.seed_tokens, end), config.learn_seed)
