"""A frozen model in this process: one forward pass scores whole rollouts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kibitz.batching import group, pack
from kibitz.logprobs import gather_tokens, log_probs
from kibitz.losses.supports import rest_beside
from kibitz.models import LanguageModel
from kibitz.signals import Dense, Sampled, Scored, Signal, TopK, cat_signals, locked
from kibitz.teachers import ScoreRequest, Teacher
from kibitz.teachers.stored import KINDS
from kibitz.types import Rollout, is_gpu

CHUNK_TOKENS = 256
"""Tokens whose logits exist at one time while a whole rollout's are looked through."""
LARGE = 2**30
"""Bytes of hidden states above which `auto` has them wait beside the GPU: so many take seconds to compute, and a tenth to
carry."""


def local_teacher(model: LanguageModel) -> Teacher:
    """A model of this process as a teacher. Its parameters learn nothing any more."""
    model.requires_grad_(False)
    scorer = partial(LocalScorer, model)
    return Teacher(
        kinds=KINDS,
        scorer=scorer,
        examiner=scorer,
        writer=lambda make: make(model),
        num_parameters=model.num_parameters,
        check=model.check_lengths,
        models=(model,),
    )


@dataclass(frozen=True)
class LocalScorer:
    model: LanguageModel
    request: ScoreRequest

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> list[Signal]:
        signals: dict[int, Signal] = {}
        waits = self._waits(rollouts)
        with self.model.loaded():
            for indices in group(rollouts, self.request.tokens_per_micro_batch):
                members = [rollouts[i] for i in indices]
                signal, start = self._score_together(members, waits), 0
                for index, rollout in zip(indices, members, strict=True):
                    signals[index] = signal[start : start + rollout.num_tokens]
                    start += rollout.num_tokens
        self.request.count(self.model, rollouts)
        return [signals[i] for i in range(len(rollouts))]

    def _score_together(self, rollouts: Sequence[Rollout], waits: bool) -> Signal:
        batch = pack([Scored(r, r.weight_T()) for r in rollouts], self.model.device)
        (signal,) = self.model(
            batch, lambda hidden_TD, head: (self._signal(Dense(hidden_TD, head), batch.tokens.token_T, waits),)
        )
        return signal

    def _signal(self, dense: Dense, token_T: Tensor, waits: bool) -> Signal:
        signal = reduced(dense, token_T, self.request, self.model.chunk_tokens)
        return locked(signal) if waits else signal

    def _waits(self, rollouts: Sequence[Rollout]) -> bool:
        """Return whether hidden states are offloaded to the CPU until the loss takes them. Without a head that can be called
        alone the signal holds logits, which stay on the device."""
        request = decided(self.request, [(self.model, rollouts)])
        return request.kind == "dense" and request.hidden_states == "cpu" and self.model.head_stands_alone


def decided(request: ScoreRequest, read: Sequence[tuple[LanguageModel, Sequence[Rollout]]]) -> ScoreRequest:
    """Return the request with `auto` replaced by where the hidden states wait: one decision for all models that read a step,
    because what they say is joined."""
    if request.hidden_states != "auto":
        return request
    size = sum(sum(r.num_tokens for r in rollouts) * _bytes_of_states(model) for model, rollouts in read)
    waits = size > LARGE and all(is_gpu(model.device) for model, _ in read)
    return replace(request, hidden_states="cpu" if waits else "device")


def _bytes_of_states(model: LanguageModel) -> int:
    return model.model.config.get_text_config().hidden_size * model.model.dtype.itemsize


def reduced(dense: Dense, token_T: Tensor, request: ScoreRequest, chunk_tokens: int = CHUNK_TOKENS) -> Signal:
    """Reduce a whole distribution to the requested signal, chunk by chunk: a dense signal as it is, its `top_k` likeliest
    tokens, or the written token's log-probability."""
    if request.kind == "dense":
        return dense
    parts: list[Signal] = []
    for hidden_CD, token_C in zip(dense.hidden_TD.split(chunk_tokens), token_T.split(chunk_tokens), strict=True):
        logp_CV = log_probs(dense.head(hidden_CD).float(), request.temperature)
        if request.kind == "sampled":
            parts.append(Sampled(gather_tokens(logp_CV, token_C.to(logp_CV.device))))
        else:
            logp_CK, ids_CK = logp_CV.topk(min(request.top_k, logp_CV.shape[-1]), dim=-1)
            parts.append(TopK(ids_CK, logp_CK, request.temperature, rest_logp_T=rest_beside(logp_CV, ids_CK)))
    return cat_signals(parts)
