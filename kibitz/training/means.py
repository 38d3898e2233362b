"""The means of a step's values, from the sums of its micro-batches."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kibitz.signals import Tokens

MEASURED, MEASURED_AT_LEAST, MEASURED_NUMBERS = 2048, 256, 2**25


def num_measured(vocab_size: int) -> int:
    """Tokens of a micro-batch for which metrics are taken that cost as much as the loss does; of fewer, all. Fewer of a large
    vocabulary, whose tokens each cost more."""
    return min(MEASURED, max(MEASURED_AT_LEAST, MEASURED_NUMBERS // vocab_size))


def sums_of(values: Mapping[str, Tensor], tokens: Tokens) -> dict[str, float]:
    """The sum of each value over the tokens that are learnt, in float64: all fetched from the device together. Of a value that
    the sample alone has, as many times its mean over the sample's."""
    learnt_T = tokens.weight_T > 0
    learnt, sample_M = learnt_T.nonzero()[:, 0], learnt_T[tokens.sample]

    def total(value: Tensor) -> Tensor:
        if len(value) == len(learnt_T):
            return value[learnt].sum(dtype=torch.float64)
        return torch.where(sample_M, value, 0.0).sum(dtype=torch.float64) / sample_M.sum().clamp(min=1) * len(learnt)

    return dict(zip(values, torch.stack([total(value) for value in values.values()]).tolist(), strict=True))


def means_of(sums: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]) -> dict[str, float]:
    """The mean of each value over the tokens that have it; of the loss, the sum of its objectives' means."""
    means = {
        name: sum(parts.values()) / max(1, sum(counts[objective] for objective in parts))
        for name, parts in sums.items()
    }
    loss = sum(total / max(1, counts[objective]) for objective, total in sums["loss"].items())
    return means | {"loss": loss}
