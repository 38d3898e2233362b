"""Several distributions as one. `logp_ICV` are the log-probabilities of I of them, `log_weight_I` adds up to 1 as weights."""

import torch
from torch import Tensor

from kibitz.losses.divergences import reverse_kl


def log_mixture(logp_I: Tensor, log_weight_I: Tensor) -> Tensor:
    """log sum_i w_i p_i, along the first dimension, whatever the others are."""
    return torch.logsumexp(logp_I + log_weight_I.view(-1, *[1] * (logp_I.dim() - 1)), dim=0)


def disagreement(logp_ICV: Tensor, log_weight_I: Tensor) -> Tensor:
    """sum_i w_i KL(p_i || mixture), the Jensen-Shannon divergence of several distributions (Lin 1991): 0 where all agree,
    at most the entropy of the weights. In nats, [C]."""
    mixture_CV = log_mixture(logp_ICV, log_weight_I)
    kl_IC = torch.stack([reverse_kl(logp_CV, mixture_CV) for logp_CV in logp_ICV])
    return (log_weight_I.exp()[:, None] * kl_IC).sum(0)
