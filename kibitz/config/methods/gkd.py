"""The section of generalised knowledge distillation."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field

from kibitz.config.methods.base import Needs
from kibitz.config.methods.distillation import DistillationConfig, DivergenceName


class GKDConfig(DistillationConfig):
    """Generalised KD: a share of the steps on the student's own text, the rest on the data's or the teacher's."""

    title = "Generalised knowledge distillation"
    story = (
        "In some steps the student {student} wrote its own responses to {prompts}, in the others it read "
        "given ones; the teacher {teacher} scored every token of them, and the student learnt from the "
        "{divergence}."
    )
    stories: ClassVar[Mapping[str, str]] = {
        "teacher": (
            "In some steps the student {student} wrote its own responses to {prompts}, in the others the teacher "
            "{teacher} did; the teacher scored every token of them, and the student learnt from the {divergence}."
        ),
    }

    type: Literal["gkd"] = "gkd"
    divergence: DivergenceName = Field("jsd", description="jsd: the paper (2306.13649).")
    on_policy: float = Field(
        0.5, ge=0, le=1, description="Lambda: the share of steps on the student's text. 0.5: the paper."
    )
    on_policy_end: float | None = Field(
        None, ge=0, le=1, description="on_policy at the last step, reached linearly. null: constant, as in the paper."
    )
    source: Literal["dataset", "teacher"] = Field("dataset", description="Who writes the text of the other steps.")

    def needs(self) -> Needs:
        end = self.on_policy if self.on_policy_end is None else self.on_policy_end
        responses = self.source == "dataset" and min(self.on_policy, end) < 1
        return replace(super().needs(), responses=responses, teacher_writes=self.source == "teacher")
