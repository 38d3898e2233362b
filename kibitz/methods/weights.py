"""Token weights: how much each token counts, as a recipe asks, around any method.

They are settled for the whole step, before there are micro-batches, so that none depends on how a step is cut up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kibitz.batching import micro_batches, pack
from kibitz.config import DistillationConfig
from kibitz.ledger import Count
from kibitz.losses.token_weights import by_turn, prefix_drift, sequence_mean, tip_score, top_share
from kibitz.methods.parts import Method, Parts
from kibitz.models import LanguageModel
from kibitz.parallel.ranks import Ranks
from kibitz.signals import Batch, Scored
from kibitz.types import Prompt, Rollout, Step, Writer


@dataclass(frozen=True)
class Weighted:
    """`method`, with its tokens weighed. Masked tokens leave first (masked rollouts are gone already), so that shares and
    means are of what remains; turns are weighed; then tokens are chosen; then sequences are evened out."""

    method: Method
    parts: Parts
    selection: "Selection | None"

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        return self.method.rollout(prompts, step)

    def signal(self, rollouts: Sequence[Rollout], step: Step) -> list[Scored]:
        recipe = self.parts.recipe
        scored = [replace(s, weight_T=self._allowed_T(s)) for s in self.method.signal(rollouts, step)]
        if self.selection is not None:
            scored = self.selection(self.method, scored)
        if recipe.method.normalize == "token":
            return scored
        weights = self.parts.ranks.with_all(_by_sequence, [(s.objective, s.weight_T) for s in scored])
        return [replace(s, weight_T=weight_T) for s, weight_T in zip(scored, weights, strict=True)]

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.method.loss(student, batch)

    def _allowed_T(self, scored: Scored) -> Tensor:
        """Without masked tokens, and by turns."""
        masked, rule, rollout = set(self.parts.mask_ids), self.parts.recipe.method.turn_weight, scored.rollout
        weight_T = scored.weight_T * torch.tensor([float(token not in masked) for token in rollout.response_ids])
        if rule == "none" or rollout.writer_T is None:
            return weight_T
        return by_turn(weight_T, rollout.writer_T == Writer.ENVIRONMENT, rule)


def _by_sequence(sequences: Sequence[tuple[str, Tensor]]) -> list[Tensor]:
    """Objectives and weights in, weights out: the mean over responses of each one's mean, within each objective."""
    weights: dict[int, Tensor] = {}
    for objective in {name for name, _ in sequences}:
        members = [i for i, (name, _) in enumerate(sequences) if name == objective]
        weights.update(zip(members, sequence_mean([sequences[i][1] for i in members]), strict=True))
    return [weights[i] for i in range(len(sequences))]


@dataclass(frozen=True)
class Selection:
    """Weights that need the student's entropy or its divergence from the teacher before the loss is made.

    Both come from the method's own loss, on the micro-batches of training but without gradients. That is one more
    forward pass of the student, head included: a third of what training costs. Its seconds count as scoring. The metrics
    of a step are then those of the chosen tokens; the evaluation's are of all.

    "tip" with a teacher that sends its top k takes the divergence over those and the tail; "iw" then takes the tail for
    a token that was not sent.
    """

    rule: Literal["entropy", "tip", "iw"]
    share: float
    student: LanguageModel
    tokens_per_micro_batch: int
    ranks: Ranks
    count: Count

    def __call__(self, method: Method, scored: Sequence[Scored]) -> list[Scored]:
        weights, values = [s.weight_T for s in scored], self._values(method, scored)
        match self.rule:
            case "iw":
                pairs = zip(values["teacher_logp"], values["student_logp"], weights, strict=True)
                weights = [prefix_drift(teacher_T - student_T, weight_T) for teacher_T, student_T, weight_T in pairs]
            case "entropy":
                pairs = list(zip(values["student_entropy"], weights, strict=True))
                weights = self.ranks.with_all(self._most_entropy, pairs)
            case "tip":
                triples = list(zip(values["student_entropy"], values["reverse_kl"], weights, strict=True))
                weights = self.ranks.with_all(self._highest_tip, triples)
        return [replace(s, weight_T=weight_T) for s, weight_T in zip(scored, weights, strict=True)]

    def _most_entropy(self, sequences: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        entropies, weights = zip(*sequences, strict=True)
        return self._kept(torch.cat(entropies), weights)

    def _highest_tip(self, sequences: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
        entropies, divergences, weights = zip(*sequences, strict=True)
        return self._kept(tip_score(torch.cat(entropies), torch.cat(divergences), torch.cat(weights)), weights)

    def _kept(self, score_T: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        return list(
            top_share(score_T, torch.cat(list(weights)), self.share).split([len(weight_T) for weight_T in weights])
        )

    @torch.no_grad()
    def _values(self, method: Method, scored: Sequence[Scored]) -> dict[str, list[Tensor]]:
        """Return the loss's values of each token by name: a `[T]` for each rollout, in the order of the rollouts."""
        found: dict[str, dict[int, Tensor]] = {}
        for indices in micro_batches(scored, self.tokens_per_micro_batch):
            batch = pack([scored[i] for i in indices], self.student.device)
            _, values = method.loss(self.student, batch)
            self.count(self.student, [scored[i].rollout for i in indices])
            sizes = [scored[i].rollout.num_tokens for i in indices]
            for name, value_T in values.items():
                found.setdefault(name, {}).update(zip(indices, value_T.cpu().split(sizes), strict=True))
        return {name: [parts[i] for i in range(len(scored))] for name, parts in found.items()}


def weighted(method: Method, parts: Parts, select: bool = True) -> Method:
    """`method` with the weights of its recipe; itself, where every token counts 1. `select`: with its choice of tokens."""
    config, selection = parts.recipe.method, None
    if select and isinstance(config, DistillationConfig) and config.token_weight != "none":
        tokens, count = parts.recipe.optim.tokens_per_micro_batch, parts.ledger.reading("student_training")
        selection = Selection(config.token_weight, config.token_share, parts.student, tokens, parts.ranks, count)
    plain = config.normalize == "token" and config.turn_weight == "none" and not parts.mask_ids
    if selection is None and plain:
        return method
    return Weighted(method, parts, selection)
