"""Supervised fine-tuning: cross-entropy on text of the data, of the teacher (off-policy distillation), or of the student."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kibitz.config import SFTConfig
from kibitz.losses.criteria import CrossEntropy
from kibitz.methods.parts import Parts, teacher_engine, token_loss
from kibitz.methods.sources import Demonstrations, Filled, Generated, Source, Stored
from kibitz.models import LanguageModel
from kibitz.signals import Batch, Scored
from kibitz.types import Prompt, Rollout, Step, Writer


@dataclass(frozen=True)
class SFT:
    source: Source
    chunk_tokens: int | None

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        return self.source.rollout(prompts, step)

    def signal(self, rollouts: Sequence[Rollout], step: Step) -> list[Scored]:
        return [Scored(rollout, rollout.weight_T()) for rollout in rollouts]

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return token_loss(student, batch, CrossEntropy(), self.chunk_tokens)


def build(config: SFTConfig, parts: Parts) -> SFT:
    chunk_tokens = parts.recipe.optim.chunk_tokens
    if parts.stored is not None:
        return SFT(Stored(parts.stored, parts.sampling.num_samples), chunk_tokens)
    if config.source == "student":
        return SFT(Generated(parts.engine, parts.sampling), chunk_tokens)
    data = Demonstrations(parts.encode_response)
    if not config.needs().teacher:
        return SFT(data, chunk_tokens)
    teacher = Generated(teacher_engine(parts), parts.sampling, Writer.TEACHER)
    return SFT(Filled(data, teacher) if config.fill else teacher, chunk_tokens)
