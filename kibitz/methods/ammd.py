"""Adversarial moment-matching distillation (Jia, NeurIPS 2024, 2406.02959): learnable action values q find the largest
difference between what the two policies do, on the student's text and on the teacher's, and the student closes it.

The authors' code is not published. What is here follows from the performance-difference lemma in both directions and is
our derivation (docs/methods.md): no credit for later tokens, and both expectations over actions taken exactly.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from kibitz.batching import group, pack
from kibitz.config import AMMDConfig
from kibitz.losses.adversarial import MomentMatching, moment_gap
from kibitz.losses.supports import log_probs, teacher_logits
from kibitz.methods.adversary import Adversary, adversary
from kibitz.methods.parts import Parts, scorer, teacher_engine, token_loss
from kibitz.methods.sources import Demonstrations, Generated, Source, Split
from kibitz.models import LanguageModel
from kibitz.teachers import Scorer
from kibitz.types import Batch, Dense, Prompt, Rollout, Scored, Step, Tokens, Writer


class ActionValues(nn.Module):
    """q(s, a) for all actions at once, within +-`bound` and zero at first. The state is what both policies would do in it,
    which is all that the largest gap depends on: each distribution becomes the mean embedding of its tokens."""

    def __init__(self, vocab_size: int, width: int, bound: float):
        super().__init__()
        self.bound = bound
        self.embedding, self.values = nn.Linear(2 * vocab_size, width), nn.Linear(width, vocab_size)
        nn.init.normal_(self.embedding.weight)
        for zeros in (self.embedding.bias, self.values.weight, self.values.bias):
            nn.init.zeros_(zeros)

    def forward(self, student_CV: Tensor, teacher_CV: Tensor) -> Tensor:
        hidden_CD = self.embedding(torch.cat([student_CV, teacher_CV], -1).exp())
        return self.bound * torch.tanh(self.values(nn.functional.silu(hidden_CD)))


@dataclass(frozen=True)
class AMMD:
    config: AMMDConfig
    parts: Parts
    source: Source
    teacher: Scorer
    values: Mapping[str, Adversary]  # by the moment that they are of, which is the objective of its rollouts

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        return self.source.rollout(prompts, step)

    def signal(self, rollouts: Sequence[Rollout], step: Step) -> list[Scored]:
        """Here the action values take their steps, so that all micro-batches of the student's meet the same ones."""
        scored: list[Scored] = []
        for name, values in self.values.items():
            members = [r for r in rollouts if r.has_tokens_of(Writer.STUDENT) == (name == "on_policy")]
            signals = self.teacher.score(members)  # apart, as the student's micro-batches are: equal models read zero
            learnt = [Scored(r, r.weight_T(), s, objective=name) for r, s in zip(members, signals, strict=True)]
            self._ascend(name, values, learnt)
            scored += learnt
        return scored

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        criterion = MomentMatching(self.values[batch.objective].module)
        return token_loss(student, batch, criterion, self.parts.recipe.optim.chunk_tokens)

    def _ascend(self, name: str, values: Adversary, scored: Sequence[Scored]) -> None:
        """Raise the mean moment gap over these tokens. Its largest value, and what is reached of it, are noted."""
        chunks, num_tokens = list(self._chunks(scored)), sum(s.rollout.num_tokens for s in scored)
        for _ in range(self.config.q_steps):
            reached = most = 0.0
            for hidden_CD, tokens in chunks:
                with torch.no_grad():
                    student_CV = log_probs(self.parts.student.head(hidden_CD).float())
                    teacher_CV = log_probs(teacher_logits(cast(Dense, tokens.signal), student_CV))
                    best_C = moment_gap(student_CV, teacher_CV, (teacher_CV - student_CV).sign())
                    most += (tokens.weight_T * best_C).sum().item()
                gap_C = moment_gap(student_CV, teacher_CV, values.module(student_CV, teacher_CV))
                gap = (tokens.weight_T * gap_C).sum()
                (-gap / num_tokens).backward()
                reached += gap.item()
            values.optimizer.step()
        notes = self.parts.notes
        notes.metrics[f"moment_gap_{name}"] = reached / num_tokens
        notes.metrics[f"moment_bound_{name}"] = self.config.q_bound * most / num_tokens
        notes.spend("opponent_training", self._flops(values, chunks))

    @torch.no_grad()
    def _chunks(self, scored: Sequence[Scored]) -> Iterator[tuple[Tensor, Tokens]]:
        """The student's hidden states, and the tokens: as many as the heads may take at one time."""
        student, optim = self.parts.student, self.parts.recipe.optim
        size = optim.chunk_tokens or student.chunk_tokens
        for indices in group([s.rollout for s in scored], optim.tokens_per_micro_batch):
            batch = pack([scored[i] for i in indices], student.device)
            (hidden_TD,) = student(batch, lambda hidden_TD, head: (hidden_TD,))
            for start in range(0, len(hidden_TD), size):
                chunk = slice(start, start + size)
                yield hidden_TD[chunk], batch.tokens[chunk]

    def _flops(self, values: Adversary, chunks: Sequence[tuple[Tensor, Tokens]]) -> float:
        """Forward and backward of the action values and both heads in each of their steps, and once more in the loss. The
        student's body is the pass that `Needs.student_scores` says."""
        num_tokens = sum(len(hidden_CD) for hidden_CD, _ in chunks)
        hidden_CD, tokens = chunks[0]
        width = hidden_CD.shape[-1] + cast(Dense, tokens.signal).hidden_TD.shape[-1]
        heads, forward = 2.0 * width * self.parts.student.vocab_size, 2.0 * values.num_parameters
        return num_tokens * (self.config.q_steps * (3 * forward + heads) + forward)


def build(config: AMMDConfig, parts: Parts) -> AMMD:
    assert parts.teacher is not None
    if config.source == "dataset":
        others: Source = Demonstrations(parts.encode_response)
    else:
        others = Generated(teacher_engine(parts), parts.sampling, Writer.TEACHER)
    source = Split(Generated(parts.engine, parts.sampling), others, config.on_policy)
    wanted = {"on_policy": config.on_policy > 0, "off_policy": config.on_policy < 1}
    values = {name: _values(parts, config) for name, is_wanted in wanted.items() if is_wanted}
    parts.stateful.update({f"q_{name}": one for name, one in values.items()})
    return AMMD(config, parts, source, scorer(parts, config), values)


def _values(parts: Parts, config: AMMDConfig) -> Adversary:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(parts.recipe.seed)
        module = ActionValues(parts.student.vocab_size, config.q_width, config.q_bound)
    return adversary(module.to(parts.student.device), config.q_lr, parts.recipe.optim)
