"""The sections of grpo and kdrl, minillm and distillm2."""

from typing import Literal

from pydantic import Field

from kibitz.config.methods import MethodConfig, PolicyGradientConfig, PolicyLossName
from kibitz.config.sections import RolloutConfig
from kibitz.config.teachers import SignalKind


class GroupConfig(PolicyGradientConfig):
    """What every method shares that compares the rewards of a prompt's samples."""

    normalize_std: bool = Field(
        False, description="Divide by the group's deviation. Off: it favours extreme prompts (2503.20783)."
    )
    policy_loss: PolicyLossName = Field("ppo_clip", description="ppo_clip: the paper; see opd for the others.")

    def needs_reward(self) -> bool:
        return True

    def check(self, rollout: RolloutConfig) -> None:
        name = self.type
        if rollout.samples_per_prompt < 2:
            raise ValueError(f"{name} compares the samples of a prompt: write rollout.samples_per_prompt of 2 or more")
        if rollout.truncated:
            raise ValueError(
                f"{name}'s importance ratio needs untruncated rollouts: drop rollout.top_p and rollout.top_k"
            )
        if rollout.epsilon:
            raise ValueError(f"{name}'s importance ratio starts from the student itself: drop rollout.epsilon")


class GRPOConfig(GroupConfig):
    """RL with a reward per response: advantages centred in the group of a prompt's samples (GRPO, 2402.03300)."""

    type: Literal["grpo"] = "grpo"


class KDRLConfig(GroupConfig):
    """GRPO with the reverse KL to the teacher as a second loss, which fades as the run goes on."""

    type: Literal["kdrl"] = "kdrl"
    kl_coef: float = Field(5e-3, ge=0, description="Of the teacher's loss, at the first step. 5e-3: KDRL (2506.02208).")
    kl_coef_end: float = Field(1e-3, ge=0, description="At the last step, linearly between. 1e-3: KDRL.")
    skip_correct: bool = Field(
        False, description="No teacher's loss on responses of reward 1 or more (KDRL's masking: shorter responses)."
    )

    def needs_teacher(self) -> bool:
        return True

    def asks(self) -> tuple[SignalKind, ...]:
        return ("sampled",)

    def check(self, rollout: RolloutConfig) -> None:
        super().check(rollout)
        if rollout.temperature != 1:
            raise ValueError(
                "kdrl's loss is the reverse KL on tokens of the student's own distribution: write rollout.temperature=1"
            )


class MiniLLMConfig(PolicyGradientConfig):
    """MiniLLM: the reverse KL between whole responses, by policy gradient, on text that student and teacher write mixed."""

    type: Literal["minillm"] = "minillm"
    teacher_mixed_alpha: float = Field(
        0.2, ge=0, lt=1, description="The teacher's share in each token's distribution. 0.2: the paper (2306.08543)."
    )
    discount: float = Field(1.0, ge=0, le=1, description="Of later tokens' rewards. 1: the paper.")
    length_norm: bool = Field(True, description="The mean over the tokens to come instead of their sum: the paper.")
    whiten: bool = Field(True, description="Advantages of a step get mean 0 and deviation 1: the paper's code.")
    single_step: bool = Field(
        True, description="A token's own part of the gradient exactly, as KL(S || T) over the vocabulary: the paper."
    )
    policy_loss: PolicyLossName = Field("ppo_clip", description="ppo_clip: the paper; see opd for the others.")

    def needs_teacher(self) -> bool:
        return True

    def asks(self) -> tuple[SignalKind, ...]:
        return ("dense",) if self.single_step else ("sampled",)

    def writes_with_teacher(self) -> bool:
        return self.teacher_mixed_alpha > 0

    def scores_with_student(self) -> bool:
        return self.teacher_mixed_alpha > 0

    def check(self, rollout: RolloutConfig) -> None:
        if rollout.truncated or rollout.epsilon or rollout.temperature != 1:
            raise ValueError(
                "minillm weighs each token by the distribution that wrote it: "
                "write rollout.temperature=1 without top_p, top_k and epsilon"
            )
        if self.mask_tokens and self.discount:
            raise ValueError(
                "discount credits a token with later ones, those of mask_tokens too: write method.discount=0"
            )


class DistiLLM2Config(MethodConfig):
    """DistiLLM-2: skewed forward KL on the teacher's responses and skewed reverse KL on the student's, together."""

    type: Literal["distillm2"] = "distillm2"
    alpha: float = Field(
        0.1, ge=0.01, lt=1, description="The skew of both divergences, the largest where it adapts. 0.1: the paper."
    )
    adaptive: bool = Field(
        True, description="Less skew for responses on which the two models nearly agree (2503.07067's curriculum)."
    )
    student_coef: float = Field(
        1.0, ge=0, le=2, description="b: how much the student's responses count; the teacher's count 2 - b."
    )
    student_coef_end: float = Field(
        1.5, ge=0, le=2, description="b from the middle of the run on, linearly until then. 1.5: the paper."
    )

    def needs_teacher(self) -> bool:
        return True

    def asks(self) -> tuple[SignalKind, ...]:
        return ("dense",)

    def writes_with_teacher(self) -> bool:
        return True

    def scores_with_student(self) -> bool:
        return self.adaptive
