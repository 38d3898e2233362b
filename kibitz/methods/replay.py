"""Gold responses of the data beside what a method learns from: some of the step's prompts, by cross-entropy."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kibitz.methods.parts import Method, Parts
from kibitz.methods.sft import SFT
from kibitz.methods.sources import Demonstrations
from kibitz.methods.weights import weighted
from kibitz.models import LanguageModel
from kibitz.signals import Batch, Scored
from kibitz.types import Prompt, Rollout, Step

REPLAY = "replay"


@dataclass(frozen=True)
class Replayed:
    """loss = method's + coefficient * mean over gold tokens of -log S, for `share` of the prompts, drawn anew each step."""

    method: Method
    gold: Method
    share: float
    coefficient: float

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        places = range(len(prompts))
        chosen = sorted(random.Random(f"replay|{step.seed}").sample(places, math.ceil(self.share * len(prompts))))
        gold = self.gold.rollout([prompts[place] for place in chosen], step)
        return [*self.method.rollout(prompts, step), *(replace(r, objective=REPLAY) for r in gold)]

    def signal(self, rollouts: Sequence[Rollout], step: Step) -> list[Scored]:
        gold = self.gold.signal([r for r in rollouts if r.objective == REPLAY], step)
        return [
            *self.method.signal([r for r in rollouts if r.objective != REPLAY], step),
            *(replace(s, objective=REPLAY, weight_T=self.coefficient * s.weight_T) for s in gold),
        ]

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The metrics of a step are the method's own: of gold text there is the loss alone."""
        if batch.objective != REPLAY:
            return self.method.loss(student, batch)
        total, values = self.gold.loss(student, batch)
        return total, {"loss": values["loss"], "replay_loss": values["loss"] / self.coefficient}


def replayed(method: Method, parts: Parts) -> Method:
    config = parts.recipe.method
    if not config.replay:
        return method
    gold = SFT(Demonstrations(parts.encode_response), parts.recipe.optim.chunk_tokens)
    return Replayed(method, weighted(gold, parts, select=False), config.replay, config.replay_coef)
