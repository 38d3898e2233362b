"""Several teachers about one token: sum_i w_i T_i, exactly, in probability space.

A `Dense` signal of it holds the hidden states of its teachers side by side, and a number that identifies their mix; its
head gives each its part, and mixes what comes out. So signals of differently routed rollouts stay cuttable and joinable
like any other, and a token with one teacher has that teacher's logits as they are.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kibitz.engines.cache import Decoder
from kibitz.logprobs import disagreement, log_mixture, log_probs
from kibitz.signals import Dense
from kibitz.teachers.local import CHUNK_TOKENS

Mix = tuple[tuple[int, float], ...]
"""The place of each teacher, and the log of its weight; the weights add up to 1."""


class MixedHead:
    """Hidden states that `packed` made `[C, W]` to logits `[C, V]`; of several teachers, log-probabilities."""

    def __init__(self) -> None:
        self.heads: dict[int, Callable[[Tensor], Tensor]] = {}
        self.widths: dict[int, int] = {}
        self.dtypes: dict[int, torch.dtype] = {}
        self.mixes: list[Mix] = []

    def packed(self, mix: Mix, said: Mapping[int, Dense], width: int) -> Dense:
        """Return one signal of a mix's teachers, `width` numbers a token."""
        for place, signal in said.items():
            self.heads[place], self.dtypes[place] = signal.head, signal.hidden_TD.dtype
            self.widths[place] = signal.hidden_TD.shape[-1]
        if mix not in self.mixes:
            self.mixes.append(mix)
            assert len(self.mixes) <= 256, "more kinds of mixtures than bfloat16 can number"
        parts = [said[place].hidden_TD for place, _ in mix]
        free = width - sum(part.shape[-1] for part in parts)
        parts.append(parts[0].new_full((len(parts[0]), free), self.mixes.index(mix)))
        return Dense(torch.cat(parts, dim=-1), self)

    def __call__(self, hidden_CW: Tensor) -> Tensor:
        number_C = hidden_CW[:, -1].long()
        numbers = number_C.unique().tolist() or [0]
        if len(numbers) == 1:
            return self._one(self.mixes[numbers[0]], hidden_CW)
        logits_CV = None
        for number in numbers:
            row_M = (number_C == number).nonzero()[:, 0]
            part_MV = self._one(self.mixes[number], hidden_CW[row_M])
            if logits_CV is None:
                logits_CV = part_MV.new_empty(len(hidden_CW), part_MV.shape[-1])
            logits_CV[row_M] = part_MV.to(logits_CV.dtype)
        assert logits_CV is not None
        return logits_CV

    def _one(self, mix: Mix, hidden_CW: Tensor) -> Tensor:
        logits = self.each(mix, hidden_CW)
        if len(mix) == 1:
            return logits[0]
        return log_mixture(*_voices(mix, logits))

    def each(self, mix: Mix, hidden_CW: Tensor) -> list[Tensor]:
        """Everybody's logits."""
        start, logits = 0, []
        for place, _ in mix:
            end = start + self.widths[place]
            logits.append(self.heads[place](hidden_CW[:, start:end].to(self.dtypes[place])))
            start = end
        return logits

    def agreement(self, mix: Mix, hidden_TW: Tensor) -> tuple[float, float]:
        """Sums over the tokens: of the disagreement in nats, and of those tokens on whose likeliest successor all agree."""
        nats = same = 0.0
        for hidden_CW in hidden_TW.split(CHUNK_TOKENS):
            logp_ICV, log_weight_I = _voices(mix, self.each(mix, hidden_CW))
            best_IC = logp_ICV.argmax(-1)
            nats += disagreement(logp_ICV, log_weight_I).sum().item()
            same += (best_IC == best_IC[0]).all(0).sum().item()
        return nats, same


def _voices(mix: Mix, logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[I, C, V]` and log-weights `[I]`."""
    logp_ICV = torch.stack([log_probs(logits_CV.float()) for logits_CV in logits])
    return logp_ICV, logp_ICV.new_tensor([log_weight for _, log_weight in mix])


def mix_of(weights: Mapping[int, float]) -> Mix:
    """Teachers by place with weights of any sum; those of weight 0 are silent."""
    total = sum(weights.values())
    return tuple((place, math.log(weight / total)) for place, weight in sorted(weights.items()) if weight > 0)


class MixedDecoder:
    """Several models that write one text: each reads it, and the next token comes from the mixture."""

    def __init__(self, decoders: Sequence[Decoder], mix: Mix, vocab_size: int):
        self.decoders, self.mix, self.vocab_size = decoders, mix, vocab_size

    def start(self, num_rows: int, num_slots: int) -> None:
        for decoder in self.decoders:
            decoder.start(num_rows, num_slots)

    def prefill(self, ids_GP: Tensor, prompt_R: Tensor, row_R: Tensor) -> None:
        for decoder in self.decoders:
            decoder.prefill(ids_GP, prompt_R, row_R)

    def move(self, source_M: Tensor, target_M: Tensor) -> None:
        for decoder in self.decoders:
            decoder.move(source_M, target_M)

    def stop(self) -> None:
        for decoder in self.decoders:
            decoder.stop()

    def step(self, token_N: Tensor, position_N: Tensor, num_slots: int) -> Tensor:
        logits = [decoder.step(token_N, position_N, num_slots)[:, : self.vocab_size] for decoder in self.decoders]
        return log_mixture(*_voices(self.mix, logits))
