"""MiniLLM (Gu et al., ICLR 2024, 2306.08543): the reverse KL between whole responses, by policy gradient.

    r_t = log T(y_t) - log S(y_t),   y_t ~ M = (1 - a) S + a T
    A_t = mean of r_t .. r_T, from r_(t+1) on with the single-step term, which has the token's own part exactly
    loss_t = clipped(S(y_t) / M(y_t), A_t)  [+ KL(S || T)]

S / M is the paper's w_t times the ratio of PPO. Where this leaves the released code: there A_t counts r_t although the
single-step term does too, is divided by the number of tokens to come whatever the discount is, and is whitened together
with the padding of its batch; here the discount weighs the mean too, and a step's tokens alone are whitened. The paper
weighs the single-step term by w_t and the code does not; in expectation over y_t it is the same, and we do not. Scaling
and clipping of rewards are left out, and the loss on other text is `method.replay`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from kibitz.config import MiniLLMConfig
from kibitz.engines.mixture import MixtureEngine
from kibitz.losses.criteria import PolicyGradient
from kibitz.losses.joint import Sum, single_step
from kibitz.losses.policy_gradient import distillation_advantage, to_come, whitened
from kibitz.methods.parts import Parts, joint_engine, policy_loss, scorer, student_scorer, token_loss, written_logp
from kibitz.methods.sources import Generated, Source
from kibitz.models import LanguageModel
from kibitz.signals import Batch, Scored
from kibitz.teachers import Scorer, prefetch
from kibitz.types import Prompt, Rollout, Step


@dataclass(frozen=True)
class MiniLLM:
    """`student` scores text that it has not written alone; None where it has."""

    config: MiniLLMConfig
    parts: Parts
    source: Source
    teacher: Scorer
    student: Scorer | None

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        return self.source.rollout(prompts, step)

    def signal(self, rollouts: Sequence[Rollout], step: Step) -> list[Scored]:
        signals = self.teacher.score(rollouts)
        own = (
            [r.logp_T for r in rollouts]
            if self.student is None
            else written_logp(rollouts, self.student.score(rollouts))
        )
        weights = [r.weight_T() for r in rollouts]
        advantages = [
            to_come(distillation_advantage(student_T, teacher_T) * weight_T, weight_T, *self._credit())
            for student_T, teacher_T, weight_T in zip(own, written_logp(rollouts, signals), weights, strict=True)
        ]
        if self.config.whiten:
            pairs = list(zip(advantages, weights, strict=True))
            advantages = self.parts.ranks.with_all(lambda all_pairs: whitened(*zip(*all_pairs, strict=True)), pairs)
        parts = zip(rollouts, weights, signals, advantages, strict=True)
        return [Scored(r, weight_T, signal, advantage_T) for r, weight_T, signal, advantage_T in parts]

    def _credit(self) -> tuple[float, bool, bool]:
        return self.config.discount, self.config.length_norm, not self.config.single_step

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        criterion = PolicyGradient(policy_loss(self.config), coefficient=0.0)
        if self.config.single_step:
            criterion = Sum(criterion, single_step)
        return token_loss(student, batch, criterion, self.parts.recipe.optim.chunk_tokens)


def build(config: MiniLLMConfig, parts: Parts) -> MiniLLM:
    teacher = scorer(parts, config)
    if not config.teacher_mixed_alpha:
        own = Generated(parts.engine, parts.sampling, on_ready=prefetch(teacher))
        return MiniLLM(config, parts, own, teacher, None)
    share, max_rows = config.teacher_mixed_alpha, parts.recipe.rollout.max_rows
    engine = joint_engine(parts, partial(MixtureEngine, parts.student, share=share, max_rows=max_rows))
    return MiniLLM(config, parts, Generated(engine, parts.sampling), teacher, student_scorer(parts))
