"""The section of grpo, and what it shares with other methods that compare a group's rewards."""

from typing import Literal

from pydantic import Field

from kibitz.config.methods.base import MethodConfig, Needs
from kibitz.config.methods.policy_gradient import PolicyGradientConfig, PolicyLossName
from kibitz.config.sections import RolloutConfig


class GroupConfig(PolicyGradientConfig, MethodConfig):
    """The settings that all methods with group-relative advantages share: they compare the rewards of a prompt's samples."""

    normalize_std: bool = Field(
        False,
        description="Divide advantages by the group's standard deviation. false: that favours extreme prompts (2503.20783).",
    )
    policy_loss: PolicyLossName = Field("ppo_clip", description="ppo_clip: the paper; see opd for the others.")

    def needs(self) -> Needs:
        return Needs(reward=True)

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

    title = "Reinforcement learning with GRPO"
    story = (
        "The student {student} wrote its own responses to {prompts}, each was graded as a whole, and all "
        "tokens of a response shared its reward (GRPO)."
    )

    ahead = True

    type: Literal["grpo"] = "grpo"
