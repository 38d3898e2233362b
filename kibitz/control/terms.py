"""The teacher's term of the loss: what it costs that the student would not have done what the teacher would have.

Pure functions of a mini-batch: [B] out, no weight and no mean inside. The teacher has no gradient.
"""

import math

import torch


def squared(mean_BA: torch.Tensor, action_BA: torch.Tensor) -> torch.Tensor:
    """RPD's term (2503.05833): the squared difference of the student's mean action and the teacher's, mean over its numbers.

    MSE = 1/A sum_a (mu_a(o) - a_T,a(o))^2
    """
    return (mean_BA - action_BA).square().mean(-1)


def absolute(mean_BA: torch.Tensor, action_BA: torch.Tensor) -> torch.Tensor:
    """The same with the absolute difference: one answer far off counts less."""
    return (mean_BA - action_BA).abs().mean(-1)


def gaussian_kl(
    mean_BA: torch.Tensor, std_BA: torch.Tensor, other_mean_BA: torch.Tensor, other_std_BA: torch.Tensor
) -> torch.Tensor:
    """KL(first, second) of two diagonal Gaussians in nats, summed over the numbers of an action.

    sum_a log(s2/s1) + (s1^2 + (m1 - m2)^2) / (2 s2^2) - 1/2
    """
    distance = (std_BA.square() + (mean_BA - other_mean_BA).square()) / (2 * other_std_BA.square())
    return (other_std_BA.log() - std_BA.log() + distance - 0.5).sum(-1)


def categorical_kl(logp_BK: torch.Tensor, other_logp_BK: torch.Tensor) -> torch.Tensor:
    """KL(first, second) in nats; an action that the first never takes adds nothing."""
    return (logp_BK.exp() * (logp_BK - other_logp_BK)).nan_to_num(0.0).sum(-1)


def cross_entropy(logp_BK: torch.Tensor, teacher_logp_BK: torch.Tensor) -> torch.Tensor:
    """-sum_k p_T(k) log p_S(k), in nats."""
    return -(teacher_logp_BK.exp() * logp_BK).sum(-1)


def proximal(divergence_B: torch.Tensor, ratio_B: torch.Tensor, clip: float) -> torch.Tensor:
    """Proximal policy distillation (2407.15134): a divergence times max(ratio, 1 - eps), where ratio = pi(a|o) / pi_old(a|o) has
    its gradient: the divergence is weighed by how likely the state's action has become."""
    return divergence_B * ratio_B.clamp(min=1 - clip)


def cosine(done: float, until: float | None) -> float:
    """RPD's anneal of lambda: 0.5 cos(pi t / t_max) + 0.5 until t_max, then 0. `done` and `until` are shares of the run; 1
    without `until`."""
    if until is None:
        return 1.0
    return 0.5 * math.cos(math.pi * done / until) + 0.5 if done < until else 0.0
