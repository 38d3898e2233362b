"""The section of speculative knowledge distillation."""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from kibitz.config.methods.base import Needs
from kibitz.config.methods.distillation import DistillationConfig, DivergenceName


class SKDConfig(DistillationConfig):
    """Speculative KD: the student drafts, the teacher replaces what is not among its K likeliest tokens, and scores all."""

    title = "Speculative knowledge distillation"
    story = (
        "The student {student} drafted responses to {prompts}, the teacher {teacher} replaced what it found "
        "unlikely and scored every token, and the student learnt from the {divergence}."
    )

    type: Literal["skd"] = "skd"
    divergence: DivergenceName = Field("forward_kl", description="forward_kl: the paper (2410.11325).")
    accept_top_k: int = Field(
        25, ge=1, description="K. 25: the paper; 1 follows the teacher, the vocabulary's size is on-policy."
    )
    draft_tokens: int = Field(
        5, ge=1, description="Drafted between two passes of the teacher; a matter of speed. 5: the paper."
    )
    decay: int | None = Field(
        None,
        ge=1,
        description="Blocks of a response over which K falls to 1: the authors' expected_seq_len. Off: their default.",
    )
    teacher_temperature: float = Field(
        1.0, ge=0, description="Of the teacher's draws; 0: its likeliest. The paper's runs: 0.2."
    )
    teacher_top_p: float = Field(1.0, gt=0, le=1, description="Of the teacher's draws. The paper's runs: 0.5.")

    def needs(self) -> Needs:
        return replace(super().needs(), teacher_writes=True, teacher_judges=True)
