"""The section of adversarial moment matching."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from kibitz.config.methods.base import MethodConfig, Needs
from kibitz.config.sections import RolloutConfig


class AMMDConfig(MethodConfig):
    """Adversarial moment matching: action values learn where the two policies differ most, the student closes that gap."""

    title = "Adversarial moment matching"
    story = (
        "The student {student} wrote its own responses to a share of {prompts} and the teacher {teacher} to "
        "the others, and the student learnt to close the largest difference that an adversary found between "
        "the two (AMMD)."
    )
    stories: ClassVar[Mapping[str, str]] = {
        "dataset": (
            "The student {student} wrote its own responses to a share of {prompts} and read given ones to the "
            "others, and it learnt to close the largest difference that an adversary found between it and the "
            "teacher {teacher} (AMMD)."
        ),
    }

    type: Literal["ammd"] = "ammd"
    on_policy: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of a step's prompts that the student answers: they give the on-policy moment, the others the "
        "off-policy one. Each moment is a mean over its own tokens, and both have the same weight. 0.5: ours.",
    )
    source: Literal["dataset", "teacher"] = Field("teacher", description="Who answers the other prompts.")
    q_lr: float = Field(
        1e-2, gt=0, description="Learning rate of the action values, constant. 1e-2: ours, on a toy world."
    )
    q_steps: int = Field(5, ge=1, description="Steps of the action values before each step of the student. 5: ours.")
    q_bound: float = Field(
        1.0, gt=0, description="Bound of the action values, which scales the loss. 1: the moment gap is 2 TV."
    )
    q_width: int = Field(128, ge=1, description="Width of the hidden layer of the action values. 128: ours.")

    def needs(self) -> Needs:
        others = self.on_policy < 1
        return Needs(
            teacher=True,
            signals=("dense",),
            teacher_writes=others and self.source == "teacher",
            responses=others and self.source == "dataset",
            student_scores=True,  # the action values are trained against the student as it is before the step
            adversary=True,
        )

    def check(self, rollout: RolloutConfig) -> None:
        if self.reference_kl:
            raise ValueError(
                "ammd learns a moment and not a loss of each token, which a KL could join: drop method.reference_kl"
            )
        own, all_of_them = round(self.on_policy * rollout.prompts_per_step), rollout.prompts_per_step
        if 0 < self.on_policy < 1 and own in (0, all_of_them):
            raise ValueError(
                f"on_policy: {self.on_policy:g} of {all_of_them} prompts leaves one of the two moments without any: write "
                "more rollout.prompts_per_step, or method.on_policy=1 or 0"
            )
