"""The section of supervised fine-tuning."""

from typing import Literal

from pydantic import Field

from kibitz.config.methods.base import MethodConfig
from kibitz.config.sections import RolloutConfig


class SFTConfig(MethodConfig):
    """Supervised fine-tuning: cross-entropy on demonstrations, on the teacher's text (off-policy distillation), or its own."""

    type: Literal["sft"] = "sft"
    source: Literal["dataset", "teacher", "student"] = Field(
        "dataset", description="Who wrote the responses. student: itself, at each step; it can only drift."
    )
    fill: Literal["teacher"] | None = Field(
        None,
        description="Who answers prompts that have no response in the data, such as chat among documents: the old checkpoint "
        "as the teacher.",
    )
    rollouts: str | None = Field(
        None, description="JSONL of stored rollouts instead of the data's responses; rollout.store makes such a file."
    )

    def needs_teacher(self) -> bool:
        return "teacher" in (self.source, self.fill)

    def writes_with_teacher(self) -> bool:
        return self.needs_teacher()

    def needs_responses(self) -> bool:
        return self.source == "dataset" and self.rollouts is None

    def fills_gaps(self) -> bool:
        return self.fill is not None

    def stored_rollouts(self) -> str | None:
        return self.rollouts

    def check(self, rollout: RolloutConfig) -> None:
        if self.replay and self.needs_responses():
            raise ValueError("sft learns the data's responses anyway: drop method.replay")
        if self.fill is not None and not self.needs_responses():
            raise ValueError(
                "there are gaps in the data's responses alone: drop method.fill, or write method.source=dataset"
            )
        if self.rollouts is not None and self.source != "dataset":
            raise ValueError(
                f"rollouts are stored and the {self.source} writes none: drop method.source={self.source} or method.rollouts"
            )
