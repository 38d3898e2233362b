"""A frozen model in this process: one forward pass scores whole rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kibitz.batching import group, pack
from kibitz.models import LanguageModel
from kibitz.types import Dense, Rollout, Sampled, Scored, Signal, TopK, cat_signals, slice_signal


@dataclass(frozen=True)
class LocalTeacher:
    """`kind` is what it hands on: `dense` (hidden states and head), `top_k` (its K likeliest tokens), `sampled`.

    `tokens_per_micro_batch` should be the student's, so that equal models give bit-equal numbers."""

    model: LanguageModel
    kind: Literal["dense", "top_k", "sampled"] = "dense"
    top_k: int = 64
    temperature: float = 1.0
    tokens_per_micro_batch: int = 16384

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[Signal]:
        signals: dict[int, Signal] = {}
        for indices in group(rollouts, self.tokens_per_micro_batch):
            members = [rollouts[i] for i in indices]
            signal, start = self._score_together(members), 0
            for index, rollout in zip(indices, members, strict=True):
                signals[index] = slice_signal(signal, slice(start, start + rollout.num_tokens))
                start += rollout.num_tokens
        return [signals[i] for i in range(len(rollouts))]

    def _score_together(self, rollouts: Sequence[Rollout]) -> Signal:
        batch = pack([Scored(r, r.weight_T()) for r in rollouts], self.model.device)
        (signal,) = self.model(batch, lambda hidden_TD, head: (self._signal(hidden_TD, head, batch.tokens.token_T),))
        return signal

    def _signal(self, hidden_TD: Tensor, head: nn.Module, token_T: Tensor) -> Signal:
        if self.kind == "dense":
            return Dense(hidden_TD, head)
        parts: list[Signal] = []
        size = self.model.chunk_tokens
        for hidden_CD, token_C in zip(hidden_TD.split(size), token_T.split(size), strict=True):
            logp_CV = torch.log_softmax(head(hidden_CD).float() / self.temperature, dim=-1)
            if self.kind == "sampled":
                parts.append(Sampled(logp_CV.gather(-1, token_C[:, None])[:, 0]))
            else:
                logp_CK, ids_CK = logp_CV.topk(min(self.top_k, logp_CV.shape[-1]), dim=-1)
                parts.append(TopK(ids_CK, logp_CK, self.temperature))
        return cat_signals(parts)
