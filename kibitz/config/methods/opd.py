"""The section of on-policy distillation."""

from typing import Literal

from pydantic import Field

from kibitz.config.methods.distillation import DistillationConfig
from kibitz.config.methods.opd_alignment import AlignmentConfig
from kibitz.config.methods.opd_writing import WritingConfig
from kibitz.config.methods.policy_gradient import PolicyGradientConfig
from kibitz.config.sections import RolloutConfig
from kibitz.config.teachers import SignalKind, TeacherConfig


class OPDConfig(WritingConfig, AlignmentConfig, DistillationConfig, PolicyGradientConfig):
    """On-policy distillation: the student writes, the teacher scores every token, the divergence is the loss."""

    type: Literal["opd"] = "opd"
    support: Literal["full", "top_k", "sampled"] = Field(
        "full",
        description="full: the whole vocabulary, exact (its gradient has no sampling noise); top_k: K tokens, the written one "
        "and a tail bucket; sampled: the published policy gradient on the sampled token.",
    )
    kl_coef: float = Field(1.0, gt=0, description="Of support: sampled; the cookbook's kl_penalty_coef.")
    discount: float = Field(
        0.0, ge=0, le=1, description="Of support: sampled; credit for later tokens. 0: published, more gained nothing."
    )
    clip_advantage: float | None = Field(
        None,
        gt=0,
        description="Of support: sampled; bounds the log-ratio: its lower tail is heavy (REOPOLD). 3 saved toy runs.",
    )
    baseline: bool = Field(
        False,
        description="Of support: sampled; adds KL(S || T) to the advantage: unbiased, less variance (vOPD, 2605.07865).",
    )
    extrapolation: float = Field(
        1.0,
        gt=0,
        description="Of support: sampled; the teacher's advance over the reference counts this much: above 1 goes past the "
        "teacher (ExOPD, 2602.12125: 1.25). 1: off.",
    )
    reward_coef: float = Field(
        0.0,
        ge=0,
        description="Of support: sampled; adds this times the group-centred reward to the advantage (slime, KDRL).",
    )

    def needs_reward(self) -> bool:
        return self.reward_coef > 0

    def asks(self) -> tuple[SignalKind, ...]:
        if kinds := self.asks_for_spans():
            return kinds
        if self.support != "sampled":
            return super().asks()
        return ("dense", "top_k") if self.baseline else ("sampled", "spans")

    def writes_with_teacher(self) -> bool:
        return self.seed_tokens > 0

    def needs_reference(self) -> bool:
        return super().needs_reference() or self.extrapolation != 1

    def check_teacher(self, teacher: TeacherConfig) -> None:
        by_token = "discount" if self.discount else "extrapolation" if self.extrapolation != 1 else None
        self.check_aligned(teacher, by_token)
        super().check_teacher(teacher)

    def check(self, rollout: RolloutConfig) -> None:
        self.check_writing(rollout, sampled=self.support == "sampled")
        self.check_alignment(self.support, self.temperature)
        if self.support != "sampled":
            for name in ("discount", "clip_advantage", "baseline", "reward_coef"):
                if getattr(self, name):
                    raise ValueError(f"{name} belongs to the policy gradient: write method.support=sampled, or drop it")
            if self.extrapolation != 1:
                raise ValueError(
                    "extrapolation belongs to the policy gradient: write method.support=sampled, or drop it"
                )
            if self.policy_loss != "sampled_token":
                raise ValueError("policy_loss belongs to the policy gradient: write method.support=sampled, or drop it")
            return
        if rollout.truncated or rollout.epsilon or rollout.temperature != 1:
            raise ValueError(
                "support: sampled needs rollouts from the student's own distribution: "
                "write rollout.temperature=1 without top_p, top_k and epsilon, or method.support=full"
            )
        if self.divergence != "reverse_kl":
            raise ValueError(
                "support: sampled estimates reverse_kl only: write method.support=full for another divergence"
            )
        if self.token_weight == "tip" and not self.baseline:
            raise ValueError(
                "token_weight: tip needs the teacher's distribution, of which support: sampled sees one token: "
                "write method.token_weight=entropy, or method.baseline=true"
            )
        if self.mask_tokens and self.discount:
            raise ValueError(
                "discount credits a token with later ones, those of mask_tokens too: write method.discount=0"
            )
        if self.baseline and (self.discount or self.extrapolation != 1):
            raise ValueError(
                "the baseline is that of a token's own log-ratio: drop it, or write method.discount=0 without extrapolation"
            )
        if self.reward_coef and (self.prefix_tokens is not None or self.seed_tokens):
            raise ValueError(
                "reward_coef rewards whole responses of the student: drop method.prefix_tokens and method.seed_tokens"
            )
        if self.reward_coef and rollout.samples_per_prompt < 2:
            raise ValueError(
                "reward_coef compares the samples of a prompt: write rollout.samples_per_prompt of 2 or more"
            )
