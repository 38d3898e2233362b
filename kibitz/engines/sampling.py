"""A token is drawn with one uniform number per (seed, prompt key, sample, position), and the inverse of the CDF.

Nothing here depends on the batch, on the device or on torch's generators, so that a prompt gives the same rollout
alone and among others, here and in a re-implementation. The algorithm, completely:

1.  row seed = the first 8 bytes, little-endian, of `blake2b(f"{seed}|{key}|{sample}".encode())`
2.  z = row seed + (position + 1) * 0x9E3779B97F4A7C15, position 0 being the first response token, and then the
    finaliser of splitmix64 (Steele, Lea & Flood 2014), everything modulo 2^64:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;  z = (z ^ z >> 27) * 0x94D049BB133111EB;  z = z ^ z >> 31
3.  u = (z >> 11) / 2^53, in [0, 1)
4.  p = softmax(logits / temperature) in float32, truncated to top-k, then to top-p, and renormalised;
    with epsilon, (1 - epsilon) p + epsilon / V
5.  token = the first one, in the order of ids, whose cumulative probability (float64) is greater than u * (sum of p)

Same up to rounding: a model's logits differ by about 1e-6 between batch sizes, and a uniform that falls into that gap
gives another token. That happens about once in 10^6 tokens in float32, and more often in bfloat16.
"""

import hashlib
import math

import torch
from torch import Tensor

from kibitz.types import Sampling


def _signed(value: int) -> int:
    """The int64 with the same 64 bits. int64 arithmetic in torch wraps, so the hash below is exact."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


MANY = 1024
"""Tokens that top-p is first looked for among: beyond them a distribution is nearly flat, and the vocabulary is sorted."""

_STEP = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def row_seed(seed: int, key: str, sample: int) -> int:
    """The seed of one rollout, as a signed 64-bit integer."""
    digest = hashlib.blake2b(f"{seed}|{key}|{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def uniforms(seed: Tensor, position: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64, one per row seed and position (int64 tensors that broadcast)."""
    z = seed + (position + 1) * _STEP
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    z = z ^ _shift_right(z, 31)
    return _shift_right(z, 11).double() * 2.0**-53


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """`>>` on int64 copies the sign bit, the hash needs zeros there."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def truncate(logits_NV: Tensor, top_k: int, top_p: float) -> Tensor:
    """The logits with -inf outside the top-k and, of what is left and renormalised, outside the top-p.

    top-p keeps the smallest set of likeliest tokens whose probability reaches `top_p`, so never none. Of equal logits
    the lower id comes first, and exactly k tokens stay.
    """
    if (cut_NV := _truncate_the_best(logits_NV, top_k, top_p)) is not None:
        return cut_NV
    vocab = logits_NV.shape[-1]
    by_rank_NV, id_NV = logits_NV.sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < vocab:
        by_rank_NV[:, top_k:] = -torch.inf
    if top_p < 1.0:
        p_NV = by_rank_NV.softmax(-1).double()
        by_rank_NV[p_NV.cumsum(-1) - p_NV >= top_p] = -torch.inf
    return torch.empty_like(logits_NV).scatter_(-1, id_NV, by_rank_NV)


def _truncate_the_best(logits_NV: Tensor, top_k: int, top_p: float) -> Tensor | None:
    """`truncate` without sorting the vocabulary, which costs as much as the model: by the likeliest tokens alone. None where they
    are not enough, or not few."""
    size = top_k if top_k > 0 else MANY
    if 2 * size > logits_NV.shape[-1]:
        return None
    best_NK = logits_NV.topk(size, dim=-1).values
    if top_p < 1.0:
        whole_N1 = (best_NK if top_k > 0 else logits_NV).logsumexp(-1, keepdim=True)
        p_NK = (best_NK - whole_N1).exp().double()
        num_kept_N1 = (p_NK.cumsum(-1) - p_NK < top_p).sum(-1, keepdim=True).clamp(min=1)
        if top_k == 0 and bool((num_kept_N1 == size).any()):
            return None
        last_N1 = best_NK.gather(-1, num_kept_N1 - 1)
    else:
        num_kept_N1, last_N1 = size, best_NK[:, -1:]
    likelier_NV, tied_NV = logits_NV > last_N1, logits_NV == last_N1
    place_NV = tied_NV.cumsum(-1, dtype=torch.int32)  # in the order of ids, among equals
    room_N1 = num_kept_N1 - likelier_NV.sum(-1, keepdim=True)
    return logits_NV.masked_fill(~(likelier_NV | (tied_NV & (place_NV <= room_N1))), -torch.inf)


def log_distribution(logits_NV: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities, float32, of the distribution that tokens are drawn from. Greedy: the one at temperature 1."""
    logits_NV = logits_NV.float()
    if sampling.greedy:
        return logits_NV.log_softmax(-1)
    if sampling.temperature != 1.0:
        logits_NV = logits_NV / sampling.temperature
    if sampling.top_k > 0 or sampling.top_p < 1.0:
        logits_NV = truncate(logits_NV, sampling.top_k, sampling.top_p)
    logp_NV = logits_NV.log_softmax(-1)
    if sampling.epsilon == 0.0:
        return logp_NV
    uniform = logp_NV.new_tensor(sampling.epsilon / logp_NV.shape[-1]).log()
    return torch.logaddexp(logp_NV + math.log1p(-sampling.epsilon), uniform)


def draw(logp_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """One token per row by the inverse of the CDF.

    The cumulative sum is taken in float64 and searched for the first entry *greater* than u times its last one: a
    token of probability 0 adds nothing and is never first, and u < 1 keeps the search inside the vocabulary.
    """
    cdf_NV = logp_NV.exp().cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf_NV, uniform_N[:, None] * cdf_NV[:, -1:], right=True)[:, 0]


def sample(logits_NV: Tensor, uniform_N: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Next tokens and their log-probabilities under the distribution that was really sampled from.

    Greedy takes the likeliest token and reports its log-probability at temperature 1: under the distribution really
    sampled from it would be 0, which no importance ratio can use.
    """
    logp_NV = log_distribution(logits_NV, sampling)
    token_N = logp_NV.argmax(-1) if sampling.greedy else draw(logp_NV, uniform_N)
    # NaN logits make every comparison false, and the search answers with the size of the vocabulary.
    token_N = token_N.clamp_(max=logp_NV.shape[-1] - 1)
    return token_N, logp_NV.gather(-1, token_N[:, None])[:, 0]
