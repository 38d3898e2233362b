"""The section of supervised fine-tuning."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from kibitz.config.methods.base import MethodConfig, Needs
from kibitz.config.sections import RolloutConfig


class SFTConfig(MethodConfig):
    """Supervised fine-tuning: cross-entropy on demonstrations, on the teacher's text (off-policy distillation), or its own."""

    title = "Supervised fine-tuning"
    story = "The student {student} learnt to write the given responses to {prompts}, token by token."
    stories: ClassVar[Mapping[str, str]] = {
        "teacher": (
            "The teacher {teacher} wrote responses to {prompts}, and the student {student} learnt to write them too."
        ),
        "student": "The student {student} wrote responses to {prompts}, and learnt to write them again, token by token.",
    }

    type: Literal["sft"] = "sft"
    source: Literal["dataset", "teacher", "student"] = Field(
        "dataset",
        description="Who writes the responses. student: the student itself at each step, a control that teaches nothing.",
    )
    fill: Literal["teacher"] | None = Field(
        None,
        description="Who answers the prompts that have no response in the data, such as chat prompts among documents; the "
        "teacher is then often the old checkpoint.",
    )
    rollouts: str | None = Field(
        None, description="JSONL of stored rollouts instead of the data's responses; rollout.store makes such a file."
    )

    def needs(self) -> Needs:
        asked = "teacher" in (self.source, self.fill)
        responses = self.source == "dataset" and self.rollouts is None
        return Needs(
            teacher=asked,
            teacher_writes=asked,
            responses=responses,
            fills_gaps=self.fill is not None,
            rollouts=self.rollouts,
        )

    def check(self, rollout: RolloutConfig) -> None:
        if self.replay and self.needs().responses:
            raise ValueError("sft learns the data's responses anyway: drop method.replay")
        if self.fill is not None and not self.needs().responses:
            raise ValueError(
                "only the data's responses can have gaps to fill: drop method.fill, or write method.source=dataset"
            )
        if self.rollouts is not None and self.source != "dataset":
            raise ValueError(
                f"rollouts are stored and the {self.source} writes none: drop method.source={self.source} or method.rollouts"
            )
