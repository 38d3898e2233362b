"""Learning from the sampled token alone: estimators of the KL, advantages, and policy-gradient losses.

Everything is `[T]`, natural logarithms, over the tokens of one or many sequences. `logp_T` is the student's now, with
its gradient; `sampled_logp_T` the student's when it sampled; `teacher_logp_T` the teacher's of the same token.

What each estimator of the reverse KL gives, for tokens sampled from the student (exact; see the tests):

                                   k1 = ls - lt       k2 = (ls - lt)^2 / 2     k3 = e^(lt-ls) - 1 - (lt-ls)
    value                          reverse KL         biased                   reverse KL, >= 0, less variance
    differentiated, as a loss      gradient zero      gradient of reverse KL   gradient of FORWARD KL
    detached, as minus the reward  reverse KL         wrong                    wrong

So: k1 in the advantage, k3 as the metric, and neither as a loss (Schulman, "Approximating KL Divergence", 2020).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here before they are exponentiated: e^20 is harmless, e^100 is infinite in float32."""


def k1(logp_T: Tensor, teacher_logp_T: Tensor) -> Tensor:
    """log S - log T. Use it in the advantage; as a loss its expected gradient is zero."""
    return logp_T - teacher_logp_T


def k2(logp_T: Tensor, teacher_logp_T: Tensor) -> Tensor:
    """(log S - log T)^2 / 2. As a loss, on policy, exactly the gradient of the reverse KL; its value is biased."""
    return 0.5 * (logp_T - teacher_logp_T).square()


def k3(logp_T: Tensor, teacher_logp_T: Tensor) -> Tensor:
    """e^d - 1 - d with d = log T - log S: the metric. As a loss it trains the forward KL. d is cut at 20."""
    gap_T = (teacher_logp_T - logp_T).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(gap_T) - gap_T


# ----------------------------------------------------------------------------------------------------- advantages


def distillation_advantage(sampled_logp_T: Tensor, teacher_logp_T: Tensor, coefficient: float = 1.0) -> Tensor:
    """-c (log S_sampled - log T): the teacher's comment on each token, as the reward of that token alone.

    (Lu, "On-Policy Distillation", 2025; tinker-cookbook `train_on_policy.py`, kl_penalty_coef = 1.)"""
    return -coefficient * k1(sampled_logp_T, teacher_logp_T).detach()


def extrapolated(teacher_logp_T: Tensor, reference_logp_T: Tensor, factor: float) -> Tensor:
    """log T + (factor - 1) (log T - log R): the score of a teacher that had gone further from the reference R.

    In `distillation_advantage` it gives ExOPD's factor (log T - log R) - (log S - log R) (2602.12125, factor 1.25); at
    1 it is the teacher's own. With the student's start as R, the teacher's advance over it counts `factor` times."""
    return teacher_logp_T + (factor - 1) * (teacher_logp_T - reference_logp_T)


def with_baseline(advantage_T: Tensor, reverse_kl_T: Tensor, coefficient: float = 1.0) -> Tensor:
    """A_t + c KL(S || T)_t, detached (vOPD, 2605.07865).

    The KL is minus the expected advantage of `distillation_advantage`, so what is left has mean zero at every position.
    It does not depend on the sampled token, so the gradient stays unbiased, and its variance falls. A KL over K tokens
    and a tail will do."""
    return advantage_T + coefficient * reverse_kl_T.detach()


def discounted(advantage_T: Tensor, gamma: float) -> Tensor:
    """A_t <- sum_{s >= t} gamma^(s-t) A_s, over ONE sequence; tokens of the environment must hold zero.

    gamma = 0 is the published default; 1 credits each token with all that follows."""
    if gamma == 0.0:
        return advantage_T
    total, credits = 0.0, []
    for advantage in reversed(advantage_T.tolist()):  # on the host: thousands of tiny tensor operations otherwise
        total = advantage + gamma * total
        credits.append(total)
    return torch.tensor(credits[::-1], dtype=advantage_T.dtype, device=advantage_T.device)


def to_come(reward_T: Tensor, weight_T: Tensor, gamma: float, mean: bool = True, own: bool = True) -> Tensor:
    """sum_{s >= t} gamma^(s-t) r_s, over ONE sequence; from t + 1 on without `own`; as a `mean`, divided by the sum of the
    gamma^(s-t), so that long responses are not pushed harder (MiniLLM, 2306.08543, where gamma = 1: the tokens to come).

    Tokens of weight 0 must hold zero; they do not count in the mean. Where nothing is to come it is zero."""
    sum_T, count_T = discounted(reward_T, gamma), discounted((weight_T > 0).to(reward_T.dtype), gamma)
    if not own:
        sum_T, count_T = sum_T - reward_T, count_T - (weight_T > 0).to(reward_T.dtype)
    return torch.where(count_T > 0, sum_T / count_T.clamp(min=1e-6), 0.0) if mean else sum_T


def whitened(advantages: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Less their mean, and over their deviation (its square + 1e-8), of all the learnable tokens of a step."""
    learnt = torch.cat(list(advantages))[torch.cat(list(weights)) > 0]
    if not len(learnt):
        return list(advantages)
    mean, scale = learnt.mean(), (learnt.var(correction=0) + 1e-8).rsqrt()
    return [(advantage_T - mean) * scale for advantage_T in advantages]


def clipped(advantage_T: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The advantage kept between `low` and `high`, and 1 where that changed it.

    Log-ratios have a heavy lower tail: a sharp teacher gives -20 for one token, and that token then decides the step
    (REOPOLD, 2603.11137, clips below)."""
    return advantage_T.clamp(low, high), ((advantage_T < low) | (advantage_T > high)).to(advantage_T.dtype)


def group_advantages(rewards_G: Tensor, divide_by_std: bool = False) -> Tensor:
    """Rewards of the G samples of one prompt, less their mean (GRPO, 2402.03300; any leading shape [..., G]).

    `divide_by_std` divides by the sample standard deviation + 1e-4, as the paper does; Dr. GRPO (2503.20783) does not,
    because that favours prompts which nearly all samples solve or fail. A group with one reward for all gets zeros."""
    centred_G = rewards_G - rewards_G.mean(-1, keepdim=True)
    if not divide_by_std or rewards_G.shape[-1] < 2:
        return centred_G
    return centred_G / (rewards_G.std(-1, keepdim=True) + 1e-4)


# --------------------------------------------------------------------------------------------------------- losses


def importance_ratio(logp_T: Tensor, sampled_logp_T: Tensor) -> Tensor:
    """S_now / S_sampled of the written token, with the student's gradient."""
    return (logp_T - sampled_logp_T.detach()).clamp(max=MAX_LOG_RATIO).exp()


def sampled_token(logp_T: Tensor, sampled_logp_T: Tensor, advantage_T: Tensor) -> Tensor:
    """-ratio_t A_t, the advantage detached: on policy, the policy gradient with value -A_t.

    With `distillation_advantage` this is the published OPD loss ("importance_sampling" of tinker-cookbook)."""
    return -importance_ratio(logp_T, sampled_logp_T) * advantage_T.detach()


def ppo_clip(
    logp_T: Tensor, sampled_logp_T: Tensor, advantage_T: Tensor, low: float = 0.2, high: float = 0.2
) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A) (PPO, 1707.06347; unequal bounds: DAPO, 2503.14476)."""
    ratio_T, advantage_T = importance_ratio(logp_T, sampled_logp_T), advantage_T.detach()
    return -torch.minimum(ratio_T * advantage_T, ratio_T.clamp(1 - low, 1 + high) * advantage_T)


def truncated(logp_T: Tensor, sampled_logp_T: Tensor, advantage_T: Tensor, cap: float = 5.0) -> Tensor:
    """-min(ratio, cap) A, with gradient -min(ratio, cap) A grad log S: a token above the cap still learns, by the cap.

    Truncated importance sampling (Ionides, 2008; cap 5 in ExOPD, 2602.12125)."""
    ratio_T = importance_ratio(logp_T, sampled_logp_T)
    return -ratio_T * (cap / ratio_T.detach()).clamp(max=1) * advantage_T.detach()


def banded(logp_T: Tensor, sampled_logp_T: Tensor, advantage_T: Tensor, low: float = 0.5, high: float = 5.0) -> Tensor:
    """-ratio A where low <= ratio <= high, else 0: tokens on which trainer and engine disagree teach nothing.

    (MiMo MOPD, 2601.02780; IcePop, whose bounds these are.)"""
    ratio_T = importance_ratio(logp_T, sampled_logp_T)
    keep_T = ((ratio_T >= low) & (ratio_T <= high)).to(ratio_T.dtype)
    return -ratio_T * keep_T * advantage_T.detach()


def one_sided(logp_T: Tensor, sampled_logp_T: Tensor, advantage_T: Tensor, drop: float = 0.2) -> Tensor:
    """-ratio A where S_now - S_sampled >= -drop, else 0: tokens whose probability already fell that far are left alone.

    The mask of prime-rl's distillation loss, drop = 0.2."""
    keep_T = (logp_T.detach().exp() - sampled_logp_T.exp() >= -drop).to(logp_T.dtype)
    return -importance_ratio(logp_T, sampled_logp_T) * keep_T * advantage_T.detach()


POLICY_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sampled_token": sampled_token,
    "ppo_clip": ppo_clip,
    "truncated": truncated,
    "banded": banded,
    "one_sided": one_sided,
}
