"""Token weights: functions over `[T]` that say which tokens of a step count, and how much, in `over_chunks`.

Weights are set before the loss runs. Those that need the student's entropy or divergence need a pass under
`torch.no_grad` first; `over_chunks` gives both per token. A token of weight 0 keeps weight 0 everywhere.
"""

import math
from typing import Literal

import torch
from torch import Tensor


def top_share(score_T: Tensor, weight_T: Tensor, share: float) -> Tensor:
    """The weights, set to 0 for all but the `share` of the learnable tokens with the highest scores (rounded up).

    With the student's entropy as score and share 0.2, the rule of Revisiting OPD (2603.25562). Scores that agree to four
    decimals are equal, and of those the first tokens are kept: the first tokens of a prompt's samples have one score,
    which another micro-batch changes in its last bits."""
    if not 0.0 < share <= 1.0:
        raise ValueError(f"The share of tokens to keep is {share}; it must be above 0 and at most 1.")
    learnable_T = weight_T > 0
    keep = math.ceil(share * int(learnable_T.sum()) - 1e-9)  # 0.1 * 30 is a little more than 3
    score_T = score_T.round(decimals=4).masked_fill(~learnable_T, -torch.inf)
    best = score_T.sort(descending=True, stable=True).indices[:keep]
    return weight_T * torch.zeros_like(weight_T).index_fill(0, best, 1.0)


def tip_score(entropy_T: Tensor, divergence_T: Tensor, weight_T: Tensor) -> Tensor:
    """h + d - h d, high where the student is uncertain or disagrees with the teacher (TIP, 2604.14084).

    h and d are the student's entropy and the divergence, each scaled to [0, 1] by the least and the greatest of the
    learnable tokens given, so that a confident mistake scores as high as an open choice."""
    h_T, d_T = _scaled(entropy_T, weight_T), _scaled(divergence_T, weight_T)
    return h_T + d_T - h_T * d_T


def prefix_drift(advantage_T: Tensor, weight_T: Tensor, gamma: float = 0.5) -> Tensor:
    """w_t (1 + gamma (1 - sum_{s<t} |A_s| / sum_s |A_s|)), over ONE sequence (IW-OPD, 2606.22600; gamma = 0.5).

    Early tokens count up to 1 + gamma; tokens behind most of the disagreement, where the teacher judges a text that it
    would never have written, count 1."""
    size_T = advantage_T.detach().abs() * (weight_T > 0)
    before_T = size_T.cumsum(0) - size_T
    return weight_T * (1 + gamma * (1 - before_T / size_T.sum().clamp(min=torch.finfo(size_T.dtype).tiny)))


def by_turn(weight_T: Tensor, environment_T: Tensor, rule: Literal["even", "first", "last"]) -> Tensor:
    """The weights of ONE response by its turns: runs of tokens between those of the environment.

    "even": each turn that has something to learn gets the same part of their sum, however many tokens it has. "first" and
    "last" keep the first or last such turn alone."""
    other_T = ~environment_T
    begins_T = other_T & torch.cat([other_T.new_ones(1), environment_T[:-1]])
    turn_T = begins_T.cumsum(0) * (weight_T * other_T > 0)  # from 1 on; 0 where nothing is learnt
    turns = turn_T[turn_T > 0].unique().tolist()
    if not turns:
        return weight_T * other_T
    if rule != "even":
        return weight_T * (turn_T == turns[0 if rule == "first" else -1])
    each, weight_T = (weight_T * other_T).sum() / len(turns), weight_T * other_T
    shares = [(turn_T == turn) * (each / weight_T[turn_T == turn].sum()) for turn in turns]
    return weight_T * torch.stack(shares).sum(0)


def sequence_mean(weights: list[Tensor]) -> list[Tensor]:
    """One weight tensor per sequence, w_t N / (S n): n tokens of the sequence and N of all S sequences have a weight.

    The sum of weight times loss, divided by N, is then the mean over sequences of (1/n) sum_t w_t loss_t; without it, it
    is the mean over tokens of w_t loss_t. Give it every sequence of the step, not those of one micro-batch. A sequence
    with nothing to learn does not count."""
    counts = [int((weight_T > 0).sum()) for weight_T in weights]
    each = sum(counts) / max(sum(count > 0 for count in counts), 1)
    return [weight_T * (each / max(count, 1)) for weight_T, count in zip(weights, counts, strict=True)]


def _scaled(value_T: Tensor, weight_T: Tensor) -> Tensor:
    learnable = value_T[weight_T > 0]
    if not len(learnable):
        return torch.zeros_like(value_T)
    low, high = learnable.min(), learnable.max()
    return ((value_T - low) / (high - low).clamp(min=torch.finfo(value_T.dtype).eps)).clamp(0, 1)
