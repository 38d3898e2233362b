"""Generalised KD (Agarwal et al., ICLR 2024, 2306.13649): some steps on the student's own text, the others on text of
the data or the teacher; the same divergence on both, and no gradient through the writing.
"""

from kibitz.config import GKDConfig
from kibitz.methods.distillation import Distillation, distil
from kibitz.methods.parts import Parts, late_scorer, teacher_engine
from kibitz.methods.sources import Demonstrations, Generated, Linear, Mix
from kibitz.teachers import prefetch
from kibitz.types import Writer


def build(config: GKDConfig, parts: Parts) -> Distillation:
    if config.source == "dataset":
        others = Demonstrations(parts.encode_response)
    else:
        others = Generated(teacher_engine(parts), parts.sampling, Writer.TEACHER)
    end = config.on_policy if config.on_policy_end is None else config.on_policy_end
    teacher = late_scorer(parts, config)
    own = Generated(parts.engine, parts.sampling, on_ready=prefetch(teacher))
    return distil(parts, config, Mix(own, others, Linear(config.on_policy, end)), teacher)
