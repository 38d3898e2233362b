"""On-policy distillation: the student writes, the teacher says at every token what it would have done there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, cast

from torch import Tensor

from kibitz.config import OPDConfig
from kibitz.losses.chunked import Criterion
from kibitz.losses.criteria import Divergence, PolicyGradient
from kibitz.losses.divergences import DIVERGENCES
from kibitz.losses.policy_gradient import clipped, discounted, distillation_advantage
from kibitz.methods.parts import Parts, token_loss
from kibitz.models import LanguageModel
from kibitz.teachers import Teacher
from kibitz.teachers.local import LocalTeacher
from kibitz.types import Batch, Prompt, Rollout, Sampled, Scored, Signal


@dataclass(frozen=True)
class OPD:
    config: OPDConfig
    parts: Parts
    teacher: Teacher
    criterion: Criterion

    def rollout(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]:
        return self.parts.engine.generate(prompts, replace(self.parts.sampling, seed=seed))

    def signal(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        return [self._scored(r, s) for r, s in zip(rollouts, self.teacher.score(rollouts), strict=True)]

    def _scored(self, rollout: Rollout, signal: Signal) -> Scored:
        """With a discount the credit runs over whole sequences, so it is given here; else the criterion gives it."""
        if not isinstance(signal, Sampled) or self.config.discount == 0.0:
            return Scored(rollout, rollout.weight_T(), signal)
        weight_T = rollout.weight_T().to(signal.logp_T.device)
        advantage_T = distillation_advantage(rollout.logp_T.to(weight_T.device), signal.logp_T, self.config.kl_coef)
        if self.config.clip_advantage is not None:
            advantage_T, _ = clipped(advantage_T, -self.config.clip_advantage, self.config.clip_advantage)
        return Scored(rollout, rollout.weight_T(), signal, discounted(advantage_T * weight_T, self.config.discount))

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return token_loss(student, batch, self.criterion, self.parts.recipe.optim.chunk_tokens)


def build(parts: Parts) -> OPD:
    config, optim = cast(OPDConfig, parts.recipe.method), parts.recipe.optim
    assert parts.teacher is not None
    teacher = LocalTeacher(
        parts.teacher,
        kind=_signal_kind(config),
        top_k=config.top_k,
        temperature=config.temperature,
        tokens_per_micro_batch=optim.tokens_per_micro_batch,
    )
    return OPD(config, parts, teacher, _criterion(config, parts))


def _signal_kind(config: OPDConfig) -> Literal["dense", "top_k", "sampled"]:
    """The least that the loss can do with."""
    if config.support == "sampled":
        return "sampled"
    return "top_k" if config.support == "top_k" and config.top_k_of == "teacher" else "dense"


def _criterion(config: OPDConfig, parts: Parts) -> Criterion:
    if config.support == "sampled":
        clip = None if config.clip_advantage is None else (-config.clip_advantage, config.clip_advantage)
        return PolicyGradient(coefficient=0.0 if config.discount else config.kl_coef, advantage_clip=clip)
    function = parts.divergence or _divergence(config)
    support = config.top_k_of if config.support == "top_k" else "full"
    return Divergence(function, support, config.top_k, config.temperature)


def _divergence(config: OPDConfig) -> Callable[[Tensor, Tensor], Tensor]:
    function = DIVERGENCES[config.divergence]
    match config.divergence:
        case "jsd":
            return partial(function, beta=config.beta)
        case "skew_kl" | "skew_reverse_kl":
            return partial(function, alpha=config.alpha)
        case _:
            return function
