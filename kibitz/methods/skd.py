"""Speculative knowledge distillation: on-policy distillation on text in which the teacher has replaced what it finds
unlikely (Xu et al., ICLR 2025, 2410.11325). The loss covers all of that text, the teacher's tokens included.
"""

from functools import partial

from kibitz.config import SKDConfig
from kibitz.engines.speculative import SpeculativeEngine
from kibitz.methods.distillation import Distillation, distil
from kibitz.methods.parts import Parts, joint_engine, late_scorer
from kibitz.methods.sources import Generated


def build(config: SKDConfig, parts: Parts) -> Distillation:
    make = partial(
        SpeculativeEngine,
        parts.student,
        top_k=config.accept_top_k,
        draft_tokens=config.draft_tokens,
        decay=config.decay,
        max_rows=parts.recipe.rollout.max_rows,
        teacher_temperature=config.teacher_temperature,
        teacher_top_p=config.teacher_top_p,
    )
    return distil(parts, config, Generated(joint_engine(parts, make), parts.sampling), late_scorer(parts, config))
