"""Arithmetic with log-probabilities: softmax, written tokens, mixtures, and the KL that all divergences are made of.

Tensors end in the support, `[..., V]` or `[..., S]`, unless a docstring says otherwise. Everything is in nats.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    Adam, which divides by the gradient's size, turns into steps as long as any other. The gradients are L (log L - log R)
    and R - L, by hand: autograd would take three times as many passes over the support. They cannot be differentiated again."""
    value_C: Any = _KL.apply(*torch.broadcast_tensors(left_CS, right_CS))
    return value_C


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left_CS: Tensor, right_CS: Tensor) -> Tensor:
        left_prob_CS, right_prob_CS, difference_CS = left_CS.exp(), right_CS.exp(), left_CS - right_CS
        to_left, to_right = ctx.needs_input_grad
        ctx.save_for_backward(left_prob_CS, difference_CS if to_left else None, right_prob_CS if to_right else None)
        return (left_prob_CS * difference_CS).sub_(left_prob_CS).add_(right_prob_CS).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_C: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left_prob_CS, difference_CS, right_prob_CS = ctx.saved_tensors
        grad_C1 = grad_C.unsqueeze(-1)
        to_left = None if difference_CS is None else (left_prob_CS * difference_CS).mul_(grad_C1)
        return to_left, None if right_prob_CS is None else (right_prob_CS - left_prob_CS).mul_(grad_C1)


def reverse_kl_of_logits(logits_CV: Tensor, teacher_CV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(S || T) `[C]` where S = softmax(logits), as `kl` computes it, and log S `[C, V]`, detached. The gradient with respect to
    the logits is S (log S - log T - KL), by hand: through `log_probs` it would take three more passes over the vocabulary."""
    return cast(tuple[Tensor, Tensor], _ReverseKL.apply(logits_CV, teacher_CV))


class _ReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_CV: Tensor, teacher_CV: Tensor) -> tuple[Tensor, Tensor]:
        student_CV = log_probs(logits_CV)
        prob_CV, difference_CV = student_CV.exp(), student_CV - teacher_CV
        term_CV = prob_CV * difference_CV
        mean_C1 = term_CV.sum(-1, keepdim=True)
        ctx.save_for_backward(prob_CV, difference_CV, mean_C1)
        ctx.mark_non_differentiable(student_CV)
        ctx.set_materialize_grads(False)  # of log S: zeros as large
        return term_CV.sub_(prob_CV).add_(teacher_CV.exp()).sum(-1), student_CV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_C: Tensor, _: None) -> tuple[Tensor, None]:
        prob_CV, difference_CV, mean_C1 = ctx.saved_tensors
        return (difference_CV - mean_C1).mul_(prob_CV).mul_(grad_C.unsqueeze(-1)), None


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
