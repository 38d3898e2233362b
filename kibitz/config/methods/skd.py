"""The section of speculative knowledge distillation."""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from kibitz.config.methods.base import Needs
from kibitz.config.methods.distillation import DistillationConfig, DivergenceName
from kibitz.config.sections import RolloutConfig


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
        25,
        ge=1,
        description="K: a drafted token is kept if it is among the teacher's K likeliest. 25: the paper; 1: the teacher's text; "
        "the vocabulary's size: the student's.",
    )
    draft_tokens: int = Field(
        5, ge=1, description="Tokens drafted between two passes of the teacher; changes the speed only. 5: the paper."
    )
    decay: int | None = Field(
        None,
        ge=1,
        description="Blocks of a response over which K falls to 1 (expected_seq_len in the authors' code). null: constant, "
        "their default.",
    )
    teacher_temperature: float = Field(
        1.0,
        ge=0,
        description="Temperature of the teacher's replacements; 0: its likeliest token. The paper's runs: 0.2.",
    )
    teacher_top_p: float = Field(
        1.0, gt=0, le=1, description="Top-p of the teacher's replacements. The paper's runs: 0.5."
    )

    def check(self, rollout: RolloutConfig) -> None:
        super().check(rollout)
        self.check_writes_jointly(rollout)

    def needs(self) -> Needs:
        return replace(super().needs(), teacher_writes=True, teacher_judges=True)
