"""The section of on-policy distillation."""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from kibitz.config.methods.base import Needs
from kibitz.config.methods.distillation import DistillationConfig
from kibitz.config.methods.opd_alignment import AlignmentConfig
from kibitz.config.methods.opd_policy import PolicyConfig, SampledConfig
from kibitz.config.methods.opd_writing import WritingConfig
from kibitz.config.sections import RolloutConfig
from kibitz.config.teachers import SignalKind, TeacherConfig


class OPDConfig(SampledConfig, WritingConfig, AlignmentConfig, DistillationConfig):
    """On-policy distillation: the student writes, the teacher scores every token, the divergence is the loss."""

    ahead = True

    title = "On-policy distillation"
    story = (
        "The student {student} wrote its own responses to {prompts}, the teacher {teacher} scored every token"
        " of them, and the student learnt from the {divergence}."
    )

    type: Literal["opd"] = "opd"
    support: Literal["full", "top_k", "sampled"] = Field(
        "full",
        description="full: the whole vocabulary, exact (its gradient has no sampling noise); top_k: K tokens, the written one "
        "and a tail bucket; sampled: the published policy gradient on the sampled token.",
    )

    def needs(self) -> Needs:
        policy = self.policy or PolicyConfig()
        return replace(
            super().needs(),
            reward=policy.reward_coef > 0,
            teacher_writes=self.seed_tokens > 0,
            rollouts=self.rollouts,
            reference=policy.extrapolation != 1,
            scores_late=super().needs().scores_late and policy.extrapolation == 1 and not policy.discount,
        )

    def signals(self) -> tuple[SignalKind, ...]:
        if kinds := self.asks_for_spans():
            return kinds
        if self.policy is None:
            return super().signals()
        return ("dense", "top_k") if self.policy.baseline else ("sampled", "spans")

    def check_teacher(self, teacher: TeacherConfig) -> None:
        self.check_aligned(teacher, None if self.policy is None else self.policy.by_token())
        super().check_teacher(teacher)

    def check(self, rollout: RolloutConfig) -> None:
        self.check_writing(rollout, sampled=self.policy is not None)
        self.check_alignment(self.support, self.temperature)
        if self.policy is not None:
            self.policy.check(rollout)
            self._check_with(self.policy)

    def _check_with(self, policy: PolicyConfig) -> None:
        if self.divergence != "reverse_kl":
            raise ValueError(
                "support: sampled estimates reverse_kl only: write method.support=full for another divergence"
            )
        if self.token_weight == "tip" and not policy.baseline:
            raise ValueError(
                "token_weight: tip needs the teacher's distribution, of which support: sampled sees one token: "
                "write method.token_weight=entropy, or method.policy.baseline=true"
            )
        if self.mask_tokens and policy.discount:
            raise ValueError(
                "discount credits a token with later ones, those of mask_tokens too: write method.policy.discount=0"
            )
        if policy.reward_coef and (self.prefix_tokens is not None or self.seed_tokens):
            raise ValueError(
                "reward_coef rewards whole responses of the student: drop method.prefix_tokens and method.seed_tokens"
            )
