"""The section of kdrl."""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from kibitz.config.methods.base import Needs
from kibitz.config.methods.grpo import GroupConfig
from kibitz.config.sections import RolloutConfig


class KDRLConfig(GroupConfig):
    """GRPO with the reverse KL to the teacher as a second loss, which fades as the run goes on."""

    title = "Reinforcement learning beside a teacher"
    story = (
        "The student {student} wrote its own responses to {prompts}, each was graded as a whole, and the "
        "student learnt from its reward and from what the teacher {teacher} said of every token (KDRL)."
    )

    ahead = True

    type: Literal["kdrl"] = "kdrl"
    kl_coef: float = Field(
        5e-3, ge=0, description="Weight of the teacher's loss at the first step. 5e-3: KDRL (2506.02208)."
    )
    kl_coef_end: float = Field(
        1e-3, ge=0, description="Weight of the teacher's loss at the last step, reached linearly. 1e-3: KDRL."
    )
    skip_correct: bool = Field(
        False, description="No teacher's loss on responses of reward 1 or more (KDRL's masking: shorter responses)."
    )

    def needs(self) -> Needs:
        return replace(super().needs(), teacher=True, signals=("sampled",), scores_late=True)

    def check(self, rollout: RolloutConfig) -> None:
        super().check(rollout)
        if rollout.temperature != 1:
            raise ValueError(
                "kdrl's loss is the reverse KL on tokens of the student's own distribution: write rollout.temperature=1"
            )
