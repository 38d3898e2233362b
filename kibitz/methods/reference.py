"""A frozen model that the student is held to: its own beginning, or another (StableOPD, 2604.08527; RLHF's KL penalty)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from kibitz.config import SignalKind
from kibitz.methods.parts import Method, Parts, training_request
from kibitz.models import LanguageModel
from kibitz.signals import Anchor, Batch, Scored
from kibitz.teachers import Late, Scorer
from kibitz.types import Prompt, Rollout, Step


def reference_scorer(parts: Parts, kind: SignalKind) -> Scorer:
    """The reference model as one that scores, its work counted as `reference_scoring`."""
    assert parts.reference is not None
    return parts.reference.scorer(training_request(parts, kind, "reference_scoring"))


@dataclass(frozen=True)
class Anchored:
    """`method`, with `coefficient` KL(S || R) at every token that it learns. `token_loss` adds it, in the same pass."""

    method: Method
    reference: Scorer | Late
    coefficient: float

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        return self.method.rollout(prompts, step)

    def signal(self, rollouts: Sequence[Rollout], step: Step) -> list[Scored]:
        signals = self.reference.score(rollouts)
        pairs = zip(self.method.signal(rollouts, step), signals, strict=True)
        return [replace(one, anchor=Anchor(signal, self.coefficient)) for one, signal in pairs]

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        total, values = self.method.loss(student, batch)
        if "reference_kl" not in values:
            raise ValueError(
                f"{type(self.method).__name__} makes its loss without token_loss, so method.reference_kl cannot join it: "
                "write method.reference_kl=0"
            )
        return total, values


def anchored(method: Method, parts: Parts) -> Method:
    config = parts.recipe.method
    if not config.reference_kl:
        return method
    scorer = reference_scorer(parts, "dense")
    whole = config.reference is not None and config.reference.offload == "body"  # which is fetched for each call
    return Anchored(method, scorer if whole else Late(scorer), config.reference_kl)
