"""Adversarial moment-matching distillation (Jia, NeurIPS 2024, 2406.02959): learnable action values q find the largest
difference between what the two policies do, on the student's text and on the teacher's, and the student closes it.

The authors' code is not published. What is here follows from the performance-difference lemma in both directions and is
our derivation (docs/methods.md): no credit for later tokens, and both expectations over actions taken exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from kibitz.batching import group, pack
from kibitz.config import AMMDConfig
from kibitz.losses.adversarial import MomentMatching, moment_gap
from kibitz.losses.supports import log_probs, teacher_logits
from kibitz.methods.opponent import Opponent, opponent
from kibitz.methods.parts import Parts, scorer, teacher_engine, token_loss
from kibitz.methods.sources import Demonstrations, Sampled, Source, Split
from kibitz.models import LanguageModel
from kibitz.teachers import Scorer
from kibitz.types import Batch, Dense, Prompt, Rollout, Scored, Step, Tokens, Writer


class ActionValues(nn.Module):
    """q(s, a) for all actions at once, within +-`bound`: the student's hidden states [C, D] -> [C, V]. Zero at first."""

    def __init__(self, hidden_size: int, width: int, vocab_size: int, bound: float):
        super().__init__()
        self.bound = bound
        last = nn.Linear(width, vocab_size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        normed = nn.LayerNorm(hidden_size, elementwise_affine=False)
        self.network = nn.Sequential(normed, nn.Linear(hidden_size, width), nn.SiLU(), last)

    def forward(self, hidden_CD: Tensor) -> Tensor:
        return self.bound * torch.tanh(self.network(hidden_CD.float()))


@dataclass(frozen=True)
class AMMD:
    config: AMMDConfig
    parts: Parts
    source: Source
    teacher: Scorer
    values: Mapping[str, Opponent]  # by the moment that they are of, which is the objective of its rollouts

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        return self.source.rollout(prompts, step)

    def signal(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        """Here the action values take their steps, so that all micro-batches of the student's meet the same ones."""
        scored: list[Scored] = []
        for name, values in self.values.items():
            members = [r for r in rollouts if r.has_tokens_of(Writer.STUDENT) == (name == "on_policy")]
            signals = self.teacher.score(members)  # apart, as the student's micro-batches are: equal models read zero
            learnt = [Scored(r, r.weight_T(), s, objective=name) for r, s in zip(members, signals, strict=True)]
            learnt = self._with_states(learnt)
            self._ascend(name, values, pack(learnt, self.parts.student.device).tokens)
            scored += learnt
        return scored

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        criterion = MomentMatching(self.values[batch.objective].module)
        return token_loss(student, batch, criterion, self.parts.recipe.optim.chunk_tokens)

    @torch.no_grad()
    def _with_states(self, scored: Sequence[Scored]) -> list[Scored]:
        """With the student's hidden state before each token, which the action values are a function of."""
        states: dict[int, Tensor] = {}
        for indices in group([s.rollout for s in scored], self.parts.recipe.optim.tokens_per_micro_batch):
            batch = pack([scored[i] for i in indices], self.parts.student.device)
            (hidden_TD,) = self.parts.student(batch, lambda hidden_TD, head: (hidden_TD,))
            parts = hidden_TD.split([scored[i].rollout.num_tokens for i in indices])
            states.update(zip(indices, parts, strict=True))
        return [replace(one, numbers={"state": states[i]}) for i, one in enumerate(scored)]

    def _ascend(self, name: str, values: Opponent, tokens: Tokens) -> None:
        """Raise the mean moment gap over these tokens. Its largest value, and what is reached of it, are noted."""
        student, num_tokens = self.parts.student, len(tokens.token_T)
        size = self.parts.recipe.optim.chunk_tokens or student.chunk_tokens
        for _ in range(self.config.q_steps):
            reached = most = 0.0
            for start in range(0, num_tokens, size):
                chunk = tokens[start : start + size]
                state_CD, signal = chunk.numbers["state"], cast(Dense, chunk.signal)
                with torch.no_grad():
                    student_CV = log_probs(student.head(state_CD).float())
                    teacher_CV = log_probs(teacher_logits(signal, student_CV))
                    best_C = moment_gap(student_CV, teacher_CV, (teacher_CV - student_CV).sign())
                    most += (chunk.weight_T * best_C).sum().item()
                gap = (chunk.weight_T * moment_gap(student_CV, teacher_CV, values.module(state_CD))).sum()
                (-gap / num_tokens).backward()
                reached += gap.item()
            values.optimizer.step()
        notes = self.parts.notes
        notes.metrics[f"moment_gap_{name}"] = reached / num_tokens
        notes.metrics[f"moment_bound_{name}"] = self.config.q_bound * most / num_tokens
        notes.spend("opponent_training", self._flops(values, tokens))

    def _flops(self, values: Opponent, tokens: Tokens) -> float:
        """Forward and backward of the action values and both heads in each of their steps, and once more in the loss. The
        student's body is the pass that `scores_with_student` says."""
        widths = tokens.numbers["state"].shape[-1] + cast(Dense, tokens.signal).hidden_TD.shape[-1]
        heads = 2.0 * widths * self.parts.student.vocab_size
        forward = 2.0 * values.num_parameters
        return len(tokens.token_T) * (self.config.q_steps * (3 * forward + heads) + forward)


def build(parts: Parts) -> AMMD:
    config = cast(AMMDConfig, parts.recipe.method)
    assert parts.teacher is not None
    if config.source == "dataset":
        others: Source = Demonstrations(parts.encode_response)
    else:
        others = Sampled(teacher_engine(parts), parts.sampling, Writer.TEACHER)
    source = Split(Sampled(parts.engine, parts.sampling), others, config.on_policy)
    wanted = {"on_policy": config.on_policy > 0, "off_policy": config.on_policy < 1}
    values = {name: _values(parts, config) for name, is_wanted in wanted.items() if is_wanted}
    parts.keeps.update({f"q_{name}": one for name, one in values.items()})
    return AMMD(config, parts, source, scorer(parts, config), values)


def _values(parts: Parts, config: AMMDConfig) -> Opponent:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(parts.recipe.seed)
        hidden_size = parts.student.hidden(torch.zeros(1, 1, dtype=torch.long, device=parts.student.device)).shape[-1]
        module = ActionValues(hidden_size, config.q_width, parts.student.vocab_size, config.q_bound)
    return opponent(module.to(parts.student.device), config.q_lr, parts.recipe.optim)
