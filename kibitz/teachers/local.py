"""A frozen model in this process: one forward pass scores whole rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kibitz.batching import group, pack
from kibitz.config import SignalKind
from kibitz.models import LanguageModel
from kibitz.teachers import Ask, Teacher
from kibitz.teachers.stored import identity
from kibitz.types import Dense, Rollout, Sampled, Scored, Signal, TopK, cat_signals, slice_signal

KINDS: tuple[SignalKind, ...] = ("dense", "top_k", "sampled")


def local_teacher(model: LanguageModel) -> Teacher:
    """A model of this process as a teacher. Its parameters learn nothing any more."""
    model.requires_grad_(False)
    return Teacher(
        name=model.name,
        kinds=KINDS,
        scorer=lambda ask: LocalScorer(model, ask),
        writer=lambda make: make(model),
        num_parameters=model.num_parameters,
        flops=model.pass_flops,
        check=model.check_lengths,
        models=(model,),
        identity=lambda: identity(model),
    )


@dataclass(frozen=True)
class LocalScorer:
    model: LanguageModel
    ask: Ask

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[Signal]:
        signals: dict[int, Signal] = {}
        for indices in self.model.as_many(group(rollouts, self.ask.tokens_per_micro_batch)):
            members = [rollouts[i] for i in indices]
            signal, start = self._score_together(members), 0
            for index, rollout in zip(indices, members, strict=True):
                signals[index] = slice_signal(signal, slice(start, start + rollout.num_tokens))
                start += rollout.num_tokens
        return [signals[i] for i in range(len(rollouts))]

    def _score_together(self, rollouts: Sequence[Rollout]) -> Signal:
        batch = pack([Scored(r, r.weight_T()) for r in rollouts], self.model.device)
        (signal,) = self.model(
            batch, lambda hidden_TD, head: (self._signal(Dense(hidden_TD, head), batch.tokens.token_T),)
        )
        return signal

    def _signal(self, dense: Dense, token_T: Tensor) -> Signal:
        return narrowed(dense, token_T, self.ask, self.model.chunk_tokens)


def narrowed(dense: Dense, token_T: Tensor, ask: Ask, chunk_tokens: int) -> Signal:
    """What was asked for, of a whole distribution, chunk by chunk: a dense signal as it is, its `top_k` likeliest tokens,
    or the written token's log-probability."""
    if ask.kind == "dense":
        return dense
    parts: list[Signal] = []
    for hidden_CD, token_C in zip(dense.hidden_TD.split(chunk_tokens), token_T.split(chunk_tokens), strict=True):
        logp_CV = torch.log_softmax(dense.head(hidden_CD).float() / ask.temperature, dim=-1)
        if ask.kind == "sampled":
            parts.append(Sampled(logp_CV.gather(-1, token_C[:, None])[:, 0]))
        else:
            logp_CK, ids_CK = logp_CV.topk(min(ask.top_k, logp_CV.shape[-1]), dim=-1)
            parts.append(TopK(ids_CK, logp_CK, ask.temperature))
    return cat_signals(parts)
