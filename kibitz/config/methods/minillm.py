"""The section of minillm."""

from typing import Literal

from pydantic import Field

from kibitz.config.methods.base import MethodConfig, Needs
from kibitz.config.methods.policy_gradient import PolicyGradientConfig, PolicyLossName
from kibitz.config.sections import RolloutConfig
from kibitz.config.teachers import SignalKind


class MiniLLMConfig(PolicyGradientConfig, MethodConfig):
    """MiniLLM: the reverse KL between whole responses, by policy gradient, on text that student and teacher write mixed."""

    title = "MiniLLM"
    story = (
        "The student {student} wrote responses to {prompts}, mixed with the teacher {teacher} as far as the recipe says, and "
        "learnt from the reverse KL divergence between whole responses (MiniLLM)."
    )

    type: Literal["minillm"] = "minillm"
    teacher_mixed_alpha: float = Field(
        0.2, ge=0, lt=1, description="The teacher's share in each token's distribution. 0.2: the paper (2306.08543)."
    )
    discount: float = Field(1.0, ge=0, le=1, description="Discount of later tokens' rewards. 1: the paper.")
    length_norm: bool = Field(True, description="The mean over the tokens to come instead of their sum: the paper.")
    whiten: bool = Field(True, description="Advantages of a step get mean 0 and deviation 1: the paper's code.")
    single_step: bool = Field(
        True, description="A token's own part of the gradient exactly, as KL(S || T) over the vocabulary: the paper."
    )
    policy_loss: PolicyLossName = Field("ppo_clip", description="ppo_clip: the paper; see opd for the others.")

    def needs(self) -> Needs:
        mixed = self.teacher_mixed_alpha > 0
        signals: tuple[SignalKind, ...] = ("dense",) if self.single_step else ("sampled",)
        return Needs(teacher=True, signals=signals, teacher_writes=mixed, student_scores=mixed)

    def check(self, rollout: RolloutConfig) -> None:
        if rollout.truncated or rollout.epsilon or rollout.temperature != 1:
            raise ValueError(
                "minillm weighs each token by the distribution that wrote it: "
                "write rollout.temperature=1 without top_p, top_k and epsilon"
            )
        if self.needs().teacher_writes:
            self.check_writes_jointly(rollout)
        if self.mask_tokens and self.discount:
            raise ValueError(
                "discount credits a token with later ones, those of mask_tokens too: write method.discount=0"
            )
