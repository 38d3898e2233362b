"""The section of distillm2."""

from typing import Literal

from pydantic import Field

from kibitz.config.methods.base import MethodConfig, Needs


class DistiLLM2Config(MethodConfig):
    """DistiLLM-2: skewed forward KL on the teacher's responses and skewed reverse KL on the student's, together."""

    title = "DistiLLM-2"
    story = (
        "The student {student} and the teacher {teacher} each answered {prompts}, and the student learnt from"
        " a skewed KL divergence on either text (DistiLLM-2)."
    )

    type: Literal["distillm2"] = "distillm2"
    alpha: float = Field(
        0.1, ge=0.01, lt=1, description="Skew of both divergences; with `adaptive`, the largest skew. 0.1: the paper."
    )
    adaptive: bool = Field(
        True, description="Less skew for responses on which the two models nearly agree (2503.07067's curriculum)."
    )
    student_coef: float = Field(
        1.0, ge=0, le=2, description="b: the weight of the student's responses; the teacher's have 2 - b."
    )
    student_coef_end: float = Field(
        1.5, ge=0, le=2, description="b from the middle of the run on, linearly until then. 1.5: the paper."
    )

    def needs(self) -> Needs:
        return Needs(teacher=True, signals=("dense",), teacher_writes=True, student_scores=self.adaptive)
