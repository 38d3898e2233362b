"""Losses: divergences, policy gradients, token weights, and the chunked output head that runs them.

Losses give one number per token and never reduce; `over_chunks` weighs and sums; the trainer divides by the global
count of tokens.
"""

from kibitz.losses.chunked import Criterion, over_chunks
from kibitz.losses.criteria import CrossEntropy, Divergence, PolicyGradient
from kibitz.losses.divergences import DIVERGENCES
from kibitz.losses.policy_gradient import POLICY_LOSSES

__all__ = [
    "DIVERGENCES",
    "POLICY_LOSSES",
    "CrossEntropy",
    "Criterion",
    "Divergence",
    "PolicyGradient",
    "over_chunks",
]
