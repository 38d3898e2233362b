"""Speculative knowledge distillation: on-policy distillation on text in which the teacher has replaced what it finds
unlikely (Xu et al., ICLR 2025, 2410.11325). The loss covers all of that text, the teacher's tokens included.
"""

from dataclasses import replace
from typing import Literal, cast

from pydantic import Field

from kibitz.config import DivergenceName, MethodConfig, OPDConfig
from kibitz.engines.speculative import SpeculativeEngine
from kibitz.engines.torch import TorchEngine
from kibitz.methods import opd
from kibitz.methods.parts import Parts


class SKDConfig(MethodConfig):
    """Speculative KD: the student drafts, the teacher replaces what is not among its K likeliest tokens, and scores all."""

    type: Literal["skd"] = "skd"
    accept_top_k: int = Field(
        25, ge=1, description="K. 25: the paper; 1 follows the teacher, the vocabulary is on-policy."
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
    divergence: DivergenceName = Field("forward_kl", description="forward_kl: the paper.")
    beta: float = Field(0.5, gt=0, lt=1, description="Of jsd: near 0 forward KL, near 1 reverse KL (GKD, 2306.13649).")
    alpha: float = Field(0.1, gt=0, lt=1, description="Of the skewed divergences (DistiLLM, 2402.03898: 0.1).")
    temperature: float = Field(
        1.0, gt=0, description="Divides both models' logits in the loss; gradients times its square."
    )

    def needs_teacher(self) -> bool:
        return True

    def scores_with_teacher(self) -> bool:
        return True


def build(parts: Parts) -> opd.OPD:
    """OPD over the full vocabulary, with another writer."""
    config = cast(SKDConfig, parts.recipe.method)
    assert parts.teacher is not None
    if not isinstance(parts.engine, TorchEngine):
        raise ValueError("skd drafts with a student in this process: write rollout.engine: torch")
    engine = SpeculativeEngine(
        parts.engine.student,
        parts.teacher,
        top_k=config.accept_top_k,
        draft_tokens=config.draft_tokens,
        decay=config.decay,
        max_rows=parts.recipe.rollout.max_rows,
        teacher_temperature=config.teacher_temperature,
        teacher_top_p=config.teacher_top_p,
    )
    loss = OPDConfig(divergence=config.divergence, beta=config.beta, alpha=config.alpha, temperature=config.temperature)
    recipe = parts.recipe.model_copy(update={"method": loss})
    return opd.build(replace(parts, recipe=recipe, engine=engine))
