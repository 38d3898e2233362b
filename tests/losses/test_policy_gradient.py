"""Estimators, advantages and token weights by exact enumeration: every token once, weighted by its probability."""

import math
from functools import partial

import pytest
import torch

from kibitz.logprobs import log_probs
from kibitz.losses import token_weights
from kibitz.losses.criteria import Divergence, PolicyGradient
from kibitz.losses.divergences import forward_kl, reverse_kl
from kibitz.losses.policy_gradient import (
    POLICY_LOSSES,
    banded,
    clipped,
    discounted,
    distillation_advantage,
    group_advantages,
    importance_ratio,
    k1,
    k2,
    k3,
    one_sided,
    ppo_clip,
    sampled_token,
    truncated,
    with_baseline,
)
from kibitz.signals import Dense, Sampled, Tokens, TopK

V = 6


def state(seed=0, scale=1.5):
    """Logits of student and teacher at one position."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, V, dtype=torch.float64, generator=generator) * scale).unbind()


def gradient(fn, student_V):
    student_V = student_V.clone().requires_grad_()
    (grad,) = torch.autograd.grad(fn(student_V), student_V)
    return grad


def expected_gradient(loss_of_tokens, student_V, sampler_V=None):
    """The mean gradient of a loss [V], one entry per token, over the tokens that the sampler draws."""
    p_V = log_probs(student_V if sampler_V is None else sampler_V).exp()
    return gradient(lambda z: (p_V * loss_of_tokens(log_probs(z))).sum(), student_V)


# ------------------------------------------------------------------------------------------------------ estimators


def test_values_of_the_estimators():
    student, teacher = (log_probs(z) for z in state())
    mean = {name: (student.exp() * k(student, teacher)).sum() for name, k in {"k1": k1, "k2": k2, "k3": k3}.items()}
    truth = reverse_kl(student, teacher)
    torch.testing.assert_close(mean["k1"], truth)
    torch.testing.assert_close(mean["k3"], truth)
    assert abs(mean["k2"] / truth - 1) > 0.1
    assert (k3(student, teacher) >= 0).all()
    assert (k1(student, teacher) < 0).any()


@pytest.mark.parametrize("seed", range(3))
def test_estimators_as_losses(seed):
    student, teacher = state(seed)
    teacher = log_probs(teacher)
    grads = {k: expected_gradient(lambda logp, k=k: k(logp, teacher), student) for k in (k1, k2, k3)}
    reverse = gradient(lambda z: reverse_kl(log_probs(z), teacher), student)
    forward = gradient(lambda z: forward_kl(log_probs(z), teacher), student)
    assert grads[k1].abs().max() < 1e-15
    torch.testing.assert_close(grads[k2], reverse)
    torch.testing.assert_close(grads[k3], forward)
    assert (forward - reverse).norm() > 0.1 * reverse.norm()


@pytest.mark.parametrize("seed", range(3))
def test_estimators_as_rewards(seed):
    student, teacher = state(seed)
    teacher = log_probs(teacher)
    grads = {k: expected_gradient(lambda logp, k=k: k(logp, teacher).detach() * logp, student) for k in (k1, k2, k3)}
    reverse = gradient(lambda z: reverse_kl(log_probs(z), teacher), student)
    torch.testing.assert_close(grads[k1], reverse)
    for wrong in (k2, k3):
        assert (grads[wrong] - reverse).norm() > 0.1 * reverse.norm()


# ------------------------------------------------------------------------------------------------------ advantages


def test_the_published_loss_is_the_policy_gradient_of_the_reverse_kl():
    student, teacher = state()
    sampled, teacher = log_probs(student), log_probs(teacher)
    advantage_V = distillation_advantage(sampled, teacher, coefficient=0.7)
    torch.testing.assert_close(advantage_V, 0.7 * (teacher - sampled))
    grad = expected_gradient(lambda logp: sampled_token(logp, sampled, advantage_V), student)
    torch.testing.assert_close(grad, 0.7 * gradient(lambda z: reverse_kl(log_probs(z), teacher), student))


def test_the_ratio_corrects_for_another_sampler():
    student, sampler = state(1)
    reward_V = torch.arange(V, dtype=torch.float64)
    grad = expected_gradient(lambda logp: sampled_token(logp, log_probs(sampler), reward_V), student, sampler)
    torch.testing.assert_close(grad, -gradient(lambda z: (log_probs(z).exp() * reward_V).sum(), student))


def test_the_baseline_is_unbiased_and_lowers_the_variance():
    """Mean over 30 states of the gradient's exact variance. The KL is not the best baseline at every single state."""
    variances = torch.zeros(2, dtype=torch.float64)
    for seed in range(30):
        student, teacher = state(seed)
        sampled, teacher = log_probs(student), log_probs(teacher)
        plain_V = distillation_advantage(sampled, teacher)
        centred_V = with_baseline(plain_V, reverse_kl(sampled, teacher))
        assert abs((sampled.exp() * centred_V).sum()) < 1e-14
        means = []
        for i, advantage_V in enumerate((plain_V, centred_V)):
            jacobian_VV = torch.autograd.functional.jacobian(
                lambda z, a=advantage_V, s=sampled: sampled_token(log_probs(z), s, a), student
            )
            mean_V = sampled.exp() @ jacobian_VV
            variances[i] += sampled.exp() @ jacobian_VV.square().sum(-1) - mean_V.square().sum()
            means.append(mean_V)
        torch.testing.assert_close(*means)
    assert variances[1] < 0.8 * variances[0]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_discounted_is_the_sum_over_later_tokens(gamma):
    advantage_T = torch.tensor([1.0, -2.0, 0.0, 3.0])
    expected = [sum(gamma ** (s - t) * float(advantage_T[s]) for s in range(t, 4)) for t in range(4)]
    assert discounted(advantage_T, gamma).tolist() == expected
    assert discounted(torch.zeros(0), gamma).tolist() == []


def test_clipped_counts_what_it_changed():
    value_T, was_T = clipped(torch.tensor([-20.0, -3.0, 0.5, 4.0]), -3.0, 3.0)
    assert value_T.tolist() == [-3.0, -3.0, 0.5, 3.0]
    assert was_T.tolist() == [1.0, 0.0, 0.0, 1.0]


def test_group_advantages():
    assert group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0])).tolist() == [0.5, -0.5, -0.5, 0.5]
    assert group_advantages(torch.ones(2, 4), divide_by_std=True).abs().max() == 0
    assert group_advantages(torch.ones(1), divide_by_std=True).tolist() == [0.0]
    divided = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), divide_by_std=True)
    torch.testing.assert_close(divided, torch.tensor([0.5, -0.5, -0.5, 0.5]) / (math.sqrt(1 / 3) + 1e-4))


# ---------------------------------------------------------------------------------------------------------- losses

RATIOS = [0.1, 0.6, 0.9, 1.0, 1.1, 1.5, 8.0]


def weights_of(loss, sampled_p=0.1, advantage=1.0):
    """For each ratio: -loss / A, and the gradient of -loss / A by log S."""
    sampled_T = torch.full((len(RATIOS),), math.log(sampled_p), dtype=torch.float64)
    logp_T = (sampled_T + torch.tensor(RATIOS, dtype=torch.float64).log()).requires_grad_()
    value_T = -loss(logp_T, sampled_T, torch.full_like(sampled_T, advantage)) / advantage
    (grad_T,) = torch.autograd.grad(value_T.sum(), logp_T)
    return [[round(x, 9) for x in y.tolist()] for y in (value_T, grad_T)]


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_unclipped_ratio(advantage):
    assert weights_of(sampled_token, advantage=advantage) == [RATIOS, RATIOS]


def test_ppo_clips_where_the_gain_is_already_taken():
    value, grad = weights_of(partial(ppo_clip, low=0.2, high=0.3))
    assert value == [0.1, 0.6, 0.9, 1.0, 1.1, 1.3, 1.3]
    assert grad == [0.1, 0.6, 0.9, 1.0, 1.1, 0.0, 0.0]
    value, grad = weights_of(partial(ppo_clip, low=0.2, high=0.3), advantage=-1.0)
    assert value == [0.8, 0.8, 0.9, 1.0, 1.1, 1.5, 8.0]
    assert grad == [0.0, 0.0, 0.9, 1.0, 1.1, 1.5, 8.0]


def test_truncated_tokens_still_learn():
    expected = [0.1, 0.6, 0.9, 1.0, 1.1, 1.2, 1.2]
    assert weights_of(partial(truncated, cap=1.2)) == [expected, expected]


def test_banded_tokens_do_not():
    expected = [0.0, 0.6, 0.9, 1.0, 1.1, 0.0, 0.0]
    assert weights_of(partial(banded, low=0.5, high=1.2)) == [expected, expected]


def test_one_sided_mask_is_on_the_fall_of_the_probability():
    assert weights_of(one_sided) == [RATIOS, RATIOS]  # from 0.1 nothing can fall by 0.2
    expected = [0.0, 0.6, 0.9, 1.0, 1.1, 1.5, 8.0]
    assert weights_of(partial(one_sided, drop=0.05), sampled_p=0.1) == [expected, expected]


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("advantage", [-5.0, 5.0])
def test_extreme_ratios_stay_finite(name, advantage):
    logp_T = torch.tensor([-2e4, 0.0, -50.0], requires_grad=True)
    sampled_T = torch.tensor([0.0, -2e4, -50.0])
    loss_T = POLICY_LOSSES[name](logp_T, sampled_T, torch.full((3,), advantage))
    loss_T.sum().backward()
    assert torch.isfinite(loss_T).all()
    assert torch.isfinite(logp_T.grad).all()


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_the_advantage_is_a_constant(name):
    logp_T = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantage_T = torch.tensor([1.0, -1.0], requires_grad=True)
    POLICY_LOSSES[name](logp_T, logp_T.detach(), advantage_T).sum().backward()
    assert advantage_T.grad is None
    torch.testing.assert_close(logp_T.grad, torch.tensor([-1.0, 1.0]))


def test_a_hopeless_token_does_not_make_the_metric_infinite():
    assert torch.isfinite(k3(torch.tensor(-1e4), torch.tensor(0.0)))
    assert importance_ratio(torch.tensor(0.0), torch.tensor(-1e4)) < 1e9


# ------------------------------------------------------------------------------------------------------- criterion


def every_token(student, signal=None, advantage_V=None, temperature=1.0):
    """All tokens of one state as a micro-batch, weighted by the student's probabilities."""
    sampled = log_probs(student, temperature)
    return Tokens(torch.arange(V), sampled.exp(), sampled, signal, advantage_V)


def signals_of(teacher, temperature=1.0):
    """One teacher, as each kind of signal."""
    logits_VV, logp_V = teacher.expand(V, V), log_probs(teacher, temperature)
    ids_VK = torch.cat([logp_V.topk(2).indices.expand(V, 2), torch.arange(V).unsqueeze(-1)], -1)  # as a server does
    return {
        "dense": Dense(logits_VV, torch.nn.Identity()),
        "top-k": TopK(ids_VK, logp_V[ids_VK], temperature),
        "sampled": Sampled(logp_V),
    }


def criterion_gradient(criterion, student, tokens):
    return gradient(lambda z: (tokens.weight_T * criterion(z.expand(V, V), tokens)["loss"]).sum(), student)


@pytest.mark.parametrize(
    ("kind", "baseline"),
    [("dense", False), ("dense", True), ("top-k", False), ("top-k", True), ("sampled", False)],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_in_expectation_it_is_the_full_reverse_kl(kind, baseline, temperature):
    student, teacher = state()
    tokens = every_token(student, signals_of(teacher, temperature)[kind], temperature=temperature)
    criterion = PolicyGradient(baseline=baseline, temperature=temperature)
    reverse = gradient(lambda z: reverse_kl(log_probs(z, temperature), log_probs(teacher, temperature)), student)
    torch.testing.assert_close(criterion_gradient(criterion, student, tokens), reverse)
    dense_tokens = every_token(student, signals_of(teacher)["dense"])
    exact = criterion_gradient(Divergence(temperature=temperature), student, dense_tokens)
    torch.testing.assert_close(exact, temperature**2 * reverse)


def test_the_coefficient_multiplies_the_baseline_too():
    student, teacher = state()
    tokens = every_token(student, signals_of(teacher)["dense"])
    once, half = (PolicyGradient(coefficient=c, baseline=True)(student.expand(V, V), tokens) for c in (1.0, 0.5))
    torch.testing.assert_close(half["advantage"], 0.5 * once["advantage"])


def test_metrics_of_a_dense_teacher_are_at_temperature_one():
    student, teacher = state()
    signal = signals_of(teacher)["dense"]
    warm = PolicyGradient(temperature=2.0)(student.expand(V, V), every_token(student, signal, temperature=2.0))
    plain = Divergence()(student.expand(V, V), every_token(student, signal))
    for name in plain.keys() - {"loss"}:
        torch.testing.assert_close(warm[name], plain[name])


def test_the_baseline_of_a_server_lowers_the_variance_too():
    """Mean over 30 states; the baseline from two tokens and the tail is below the full one, and helps all the same."""

    def second_moment(student, tokens, baseline):
        advantage_V = PolicyGradient(baseline=baseline)(student.expand(V, V), tokens)["advantage"]
        score_VV = torch.eye(V) - log_probs(student).exp()
        return (tokens.weight_T * advantage_V.square() * score_VV.square().sum(-1)).sum()

    plain, centred = 0.0, 0.0
    for seed in range(30):
        student, teacher = state(seed)
        tokens = every_token(student, signals_of(teacher)["top-k"])
        plain += second_moment(student, tokens, False)
        centred += second_moment(student, tokens, True)
    assert centred < 0.9 * plain


def test_rewards_and_the_teacher_add_up():
    student, teacher = state()
    reward_V = torch.arange(V, dtype=torch.float64)
    tokens = every_token(student, Sampled(log_probs(teacher)), reward_V)
    values = PolicyGradient(coefficient=0.5)(student.expand(V, V), tokens)
    torch.testing.assert_close(values["advantage"], reward_V + 0.5 * (log_probs(teacher) - log_probs(student)))
    torch.testing.assert_close(values["loss"], -values["advantage"])
    torch.testing.assert_close(values["ratio"], torch.ones(V, dtype=torch.float64))
    torch.testing.assert_close(values["reverse_kl"], k3(log_probs(student), log_probs(teacher)))
    rewards_only = PolicyGradient(coefficient=0.0)(student.expand(V, V), tokens)
    torch.testing.assert_close(rewards_only["advantage"], reward_V)
    no_teacher = PolicyGradient()(student.expand(V, V), every_token(student, None, reward_V))
    torch.testing.assert_close(no_teacher["loss"], rewards_only["loss"])


def test_only_the_distillation_part_is_clipped_with_its_baseline():
    student, teacher = state(scale=4.0)
    reward_V = torch.full((V,), 10.0, dtype=torch.float64)
    tokens = every_token(student, Dense(teacher.expand(V, V), torch.nn.Identity()), reward_V)
    values = PolicyGradient(baseline=True, advantage_clip=(-0.5, 0.5))(student.expand(V, V), tokens)
    sampled, teacher = log_probs(student), log_probs(teacher)
    distilled = teacher - sampled + reverse_kl(sampled, teacher)
    torch.testing.assert_close(values["advantage"], 10 + distilled.clamp(-0.5, 0.5))
    assert values["advantage_clipped"].tolist() == (distilled.abs() > 0.5).double().tolist()
    assert values["advantage_clipped"].sum() > 0


def test_the_clipped_share_of_the_ratio_is_seen_whatever_the_loss():
    student, sampler = state(scale=1.0)
    tokens = Tokens(torch.arange(V), torch.ones(V), log_probs(sampler), None, torch.ones(V, dtype=torch.float64))
    ratio_V = (log_probs(student) - log_probs(sampler)).exp()
    for loss, touched_V in [
        (sampled_token, ratio_V < 0),
        (ppo_clip, ratio_V > 1.2),
        (partial(truncated, cap=1.5), ratio_V > 1.5),
        (partial(banded, low=0.9, high=2.0), (ratio_V < 0.9) | (ratio_V > 2.0)),
    ]:
        values = PolicyGradient(loss)(student.expand(V, V), tokens)
        assert values["ratio_clipped"].tolist() == touched_V.double().tolist()
        torch.testing.assert_close(values["ratio"], ratio_V)


def test_what_cannot_be_learnt_from_is_refused():
    student, teacher = state()
    signals = signals_of(teacher)
    lacking = TopK(torch.zeros(V, 2, dtype=torch.long), log_probs(teacher)[torch.zeros(V, 2, dtype=torch.long)])
    impossible = Sampled(log_probs(teacher).masked_fill(torch.arange(V) == 2, -torch.inf))
    for criterion, signal, message in [
        (PolicyGradient(), None, "neither an advantage nor"),
        (PolicyGradient(coefficient=0.0), signals["dense"], "neither an advantage nor"),
        (PolicyGradient(baseline=True), signals["sampled"], "sampled token only"),
        (PolicyGradient(), lacking, "lacks tokens that were sampled"),
        (PolicyGradient(), impossible, "probability zero"),
        (PolicyGradient(temperature=2.0), signals["top-k"], "make the two equal"),
    ]:
        with pytest.raises(ValueError, match=message):
            criterion(student.expand(V, V), every_token(student, signal))


# --------------------------------------------------------------------------------------------------- token weights


def test_top_share_keeps_the_best_of_the_learnable_tokens():
    score_T, weight_T = torch.tensor([5.0, 1.0, 4.0, 3.0, 2.0]), torch.tensor([0.0, 1.0, 0.5, 1.0, 1.0])
    assert token_weights.top_share(score_T, weight_T, 0.5).tolist() == [0.0, 0.0, 0.5, 1.0, 0.0]
    assert token_weights.top_share(score_T, weight_T, 1.0).tolist() == weight_T.tolist()
    ties = token_weights.top_share(torch.ones(100), torch.ones(100), 0.07)  # 0.07 * 100 is a little more than 7
    assert ties.sum() == 7
    assert token_weights.top_share(score_T, torch.zeros(5), 0.5).sum() == 0
    with pytest.raises(ValueError, match="share of tokens"):
        token_weights.top_share(score_T, weight_T, 0.0)


def test_tip_scores_high_for_uncertain_or_mistaken_tokens():
    entropy_T, kl_T = torch.tensor([0.0, 2.0, 0.0, 1.0, 99.0]), torch.tensor([0.0, 0.0, 4.0, 2.0, 99.0])
    weight_T = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    score_T = token_weights.tip_score(entropy_T, kl_T, weight_T)
    assert score_T[:4].tolist() == [0.0, 1.0, 1.0, 0.75]
    assert token_weights.tip_score(torch.ones(3), torch.ones(3), torch.ones(3)).tolist() == [0.0] * 3


def test_prefix_drift_falls_from_one_plus_gamma_towards_one():
    advantage_T, weight_T = torch.tensor([0.0, -3.0, 100.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    weights = token_weights.prefix_drift(advantage_T, weight_T, gamma=0.5)
    torch.testing.assert_close(weights, torch.tensor([1.5, 1.5, 0.0, 1.125, 1.0]))
    assert token_weights.prefix_drift(torch.zeros(2), torch.ones(2)).tolist() == [1.5, 1.5]


def test_sequence_mean_divided_by_the_total_weight_is_the_mean_of_means():
    losses = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0]), torch.tensor([7.0, 7.0])]
    weights = [torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0]), torch.zeros(2)]
    rescaled = token_weights.sequence_mean(weights)
    total = sum(float(w.sum()) for w in weights)
    assert sum(float(w.sum()) for w in rescaled) == total
    mean = sum(float(w @ loss) for w, loss in zip(rescaled, losses, strict=True)) / total
    assert mean == pytest.approx((2.0 + 10.0) / 2)
