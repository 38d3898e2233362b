"""Learning a divergence to the teacher at each token, whoever wrote the tokens: what opd, gkd and skd have in common."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature

from torch import Tensor

from kibitz.config import DistillationConfig, OPDConfig
from kibitz.losses.chunked import Criterion
from kibitz.losses.criteria import Divergence, SpanLoss
from kibitz.losses.divergences import DIVERGENCES
from kibitz.losses.spans import MergedDistributions, SpanLikelihood
from kibitz.methods.parts import Parts, token_loss
from kibitz.methods.sources import Source
from kibitz.models import LanguageModel
from kibitz.signals import Batch, Scored
from kibitz.teachers import Late, Scorer
from kibitz.types import Prompt, Rollout, Step


@dataclass(frozen=True)
class Distillation:
    source: Source
    teacher: Scorer | Late
    criterion: Criterion
    chunk_tokens: int | None

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        return self.source.rollout(prompts, step)

    def signal(self, rollouts: Sequence[Rollout], step: Step) -> list[Scored]:
        return [Scored.from_signal(r, s) for r, s in zip(rollouts, self.teacher.score(rollouts), strict=True)]

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return token_loss(student, batch, self.criterion, self.chunk_tokens)


def distil(parts: Parts, config: DistillationConfig, source: Source, teacher: Scorer | Late) -> Distillation:
    """The method that learns `config`'s divergence to `teacher` on what `source` writes."""
    top_k = config.support == "top_k"
    function = parts.divergence or divergence(config)
    criterion = Divergence(function, config.top_k_of if top_k else "full", config.top_k, config.temperature)
    return Distillation(source, teacher, criterion, parts.recipe.optim.chunk_tokens)


def distil_spans(parts: Parts, config: OPDConfig, source: Source, teacher: Scorer | Late) -> Distillation:
    """The same with a loss of spans, for a teacher with a tokenizer of its own."""
    loss = SpanLikelihood(config.alm_tau)
    if config.alignment != "alm":
        loss = MergedDistributions(None if config.alignment == "uld" else parts.divergence or divergence(config))
    return Distillation(source, teacher, SpanLoss(loss), parts.recipe.optim.chunk_tokens)


def divergence(config: DistillationConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The function that a section names, with its options: those of its arguments that are settings of the section."""
    function = DIVERGENCES[config.divergence]
    options = signature(function).parameters.keys() & type(config).model_fields.keys()
    return partial(function, **{name: getattr(config, name) for name in options}) if options else function
