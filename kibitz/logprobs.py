"""Arithmetic with log-probabilities: softmax, written tokens, mixtures, and the KL that all divergences are made of.

Tensors end in the support, `[..., V]` or `[..., S]`, unless a docstring says otherwise. Everything is in nats.
"""

import math

import torch
from torch import Tensor

NOTHING = -100.0
"""log-probability of what is ruled out or empty: its probability is 0 in float32, and sums over it stay finite."""


def log_probs(logits_CV: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)."""
    return torch.log_softmax(logits_CV if temperature == 1.0 else logits_CV / temperature, dim=-1)


def gather_tokens(logp_CV: Tensor, token_C: Tensor) -> Tensor:
    """The log-probability of each written token."""
    return logp_CV.gather(-1, token_C.unsqueeze(-1)).squeeze(-1)


def log1mexp(logp: Tensor) -> Tensor:
    """log(1 - e^logp), of a number below 0: the log-probability of all the rest."""
    return torch.log(-torch.expm1(logp))


def kl(left_CS: Tensor, right_CS: Tensor) -> Tensor:
    """sum_s L_s (log L_s - log R_s) - L_s + R_s. The last two terms add up to zero, in value and in gradient; with them
    equal distributions have a gradient of exactly zero. Without them it is p (1 - sum p), rounding noise of 1e-8 that
    Adam, which divides by the gradient's size, turns into steps as long as any other."""
    left_prob_CS = left_CS.exp()
    return (left_prob_CS * (left_CS - right_CS) - left_prob_CS + right_CS.exp()).sum(-1)


def mixture(first_CS: Tensor, second_CS: Tensor, weight: float | Tensor) -> Tensor:
    """log(weight * first + (1 - weight) * second), in the log domain so that nothing underflows. The weight is one
    number, or one for each position `[C]`, above 0 and below 1."""
    if isinstance(weight, Tensor):
        weight_C1 = weight.unsqueeze(-1).to(first_CS.dtype)
        return torch.logaddexp(first_CS + weight_C1.log(), second_CS + (-weight_C1).log1p())
    if weight == 0.0 or weight == 1.0:
        return first_CS if weight == 1.0 else second_CS
    return torch.logaddexp(first_CS + math.log(weight), second_CS + math.log1p(-weight))


def log_mixture(logp_I: Tensor, log_weight_I: Tensor) -> Tensor:
    """log sum_i w_i p_i, along the first dimension, whatever the others are. The weights add up to 1."""
    return torch.logsumexp(logp_I + log_weight_I.view(-1, *[1] * (logp_I.dim() - 1)), dim=0)


def disagreement(logp_ICV: Tensor, log_weight_I: Tensor) -> Tensor:
    """sum_i w_i KL(p_i || mixture), the Jensen-Shannon divergence of several distributions (Lin 1991): 0 where all agree,
    at most the entropy of the weights. In nats, [C]."""
    mixture_CV = log_mixture(logp_ICV, log_weight_I)
    kl_IC = torch.stack([kl(logp_CV, mixture_CV) for logp_CV in logp_ICV])
    return (log_weight_I.exp()[:, None] * kl_IC).sum(0)
