"""Divergences against their definitions, in float64: values by hand, limits, directions, gradients."""

import math
from functools import partial
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from kibitz.config import DIVERGENCE_TITLES, DivergenceName, GKDConfig
from kibitz.logprobs import log_probs, reverse_kl_of_logits
from kibitz.losses.divergences import (
    DIVERGENCES,
    adaptive_kl,
    entropy,
    forward_kl,
    jsd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from kibitz.methods.distillation import divergence as named


def pair(rows=4, size=7, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, rows, size, dtype=torch.float64, generator=generator) * scale
    return logits[0], torch.log_softmax(logits[1], -1)


def summed(term, student_CS, teacher_CS):
    """sum_s term(S_s, T_s), one row and one token at a time."""
    rows = zip(student_CS.exp().tolist(), teacher_CS.exp().tolist(), strict=True)
    return torch.tensor([math.fsum(term(s, t) for s, t in zip(*row, strict=True)) for row in rows], dtype=torch.float64)


def kl_term(p, q):
    return p * math.log(p / q)


def jsd_term(beta):
    def term(s, t):
        m = beta * t + (1 - beta) * s
        return (beta * kl_term(t, m) + (1 - beta) * kl_term(s, m)) / (beta * (1 - beta))

    return term


DEFINITIONS = {
    "reverse_kl": (reverse_kl, lambda s, t: kl_term(s, t)),
    "forward_kl": (forward_kl, lambda s, t: kl_term(t, s)),
    "jsd": (jsd, jsd_term(0.5)),
    "jsd 0.1": (partial(jsd, beta=0.1), jsd_term(0.1)),
    "jsd 0.9 plain": (partial(jsd, beta=0.9, plain=True), lambda s, t: 0.09 * jsd_term(0.9)(s, t)),
    "skew_kl": (skew_kl, lambda s, t: kl_term(t, 0.1 * t + 0.9 * s)),
    "skew_reverse_kl": (skew_reverse_kl, lambda s, t: kl_term(s, 0.1 * s + 0.9 * t)),
    "total_variation": (total_variation, lambda s, t: abs(s - t) / 2),
    "adaptive_kl below": (partial(adaptive_kl, threshold=99.0), lambda s, t: kl_term(s, t)),
    "adaptive_kl above": (
        partial(adaptive_kl, threshold=0.0, coefficient=0.5),
        lambda s, t: kl_term(s, t) + 0.5 * kl_term(t, s),
    ),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_is_the_sum_of_its_definition(name):
    divergence, term = DEFINITIONS[name]
    logits, teacher = pair()
    student = torch.log_softmax(logits, -1)
    torch.testing.assert_close(divergence(student, teacher), summed(term, student, teacher), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_gradient_by_finite_differences_and_the_teacher_has_none(name):
    divergence, _ = DEFINITIONS[name]
    logits, teacher = pair(rows=2, size=5)
    assert torch.autograd.gradcheck(
        lambda z: divergence(torch.log_softmax(z, -1), teacher), logits.requires_grad_(), eps=1e-6, atol=1e-7
    )
    teacher.requires_grad_()
    divergence(torch.log_softmax(logits, -1), teacher).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", DIVERGENCES)
def test_is_zero_only_where_the_two_are_equal(name):
    logits, teacher = pair()
    student = torch.log_softmax(logits, -1)
    assert (DIVERGENCES[name](student, teacher) > 1e-2).all()
    assert DIVERGENCES[name](teacher, teacher).abs().max() < 1e-15
    logits = teacher.clone().requires_grad_()
    DIVERGENCES[name](torch.log_softmax(logits, -1), teacher).sum().backward()
    assert logits.grad.abs().max() < 1e-15


@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl])
def test_equal_distributions_have_no_gradient_at_all_in_float32(divergence):
    """Adam divides by the gradient's size: rounding noise would move an agreeing student at the full learning rate."""
    logits = pair(rows=50, size=1000)[0].float().requires_grad_()
    divergence(log_probs(logits), log_probs(logits)).sum().backward()
    assert logits.grad.count_nonzero() == 0


def test_direction_is_that_of_torch():
    logits, teacher = pair()
    student = torch.log_softmax(logits, -1)
    into_student = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    into_teacher = F.kl_div(teacher, student, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher), into_student)
    torch.testing.assert_close(reverse_kl(student, teacher), into_teacher)
    assert not torch.allclose(into_student, into_teacher, rtol=0.05)


@pytest.mark.parametrize(("end", "near", "limit"), [(0.0, 1e-6, forward_kl), (1.0, 1 - 1e-6, reverse_kl)])
def test_jsd_reaches_both_kls(end, near, limit):
    logits, teacher = pair()
    student = torch.log_softmax(logits, -1)
    torch.testing.assert_close(jsd(student, teacher, end), limit(student, teacher), rtol=0, atol=0)
    torch.testing.assert_close(jsd(student, teacher, near), limit(student, teacher), rtol=1e-4, atol=1e-8)


def test_jsd_moves_continuously_where_the_published_form_drops_to_nothing():
    logits, teacher = pair()
    student = torch.log_softmax(logits, -1)
    torch.testing.assert_close(jsd(student, teacher, 0.999), reverse_kl(student, teacher), rtol=0.05, atol=0)
    assert (jsd(student, teacher, 0.999, plain=True) < 2e-3 * reverse_kl(student, teacher)).all()
    assert (jsd(student, teacher, 1.0, plain=True) == 0).all()


def test_jsd_of_one_half_is_symmetric_and_its_weight_belongs_to_the_teacher():
    logits, teacher = pair()
    student = torch.log_softmax(logits, -1)
    torch.testing.assert_close(jsd(student, teacher, 0.5), jsd(teacher, student, 0.5))
    torch.testing.assert_close(jsd(student, teacher, 0.2), jsd(teacher, student, 0.8))
    assert not torch.allclose(jsd(student, teacher, 0.2), jsd(student, teacher, 0.8), rtol=0.01)


def test_jsd_refuses_a_beta_outside_its_range():
    _, teacher = pair()
    with pytest.raises(ValueError, match="between 0 and 1"):
        jsd(teacher, teacher, beta=1.5)


def test_bounds():
    student = torch.log_softmax(torch.tensor([[30.0, 0.0]], dtype=torch.float64), -1)
    teacher = student.flip(-1)
    torch.testing.assert_close(skew_kl(student, teacher), torch.tensor([-math.log(0.1)], dtype=torch.float64))
    torch.testing.assert_close(skew_reverse_kl(student, teacher), torch.tensor([-math.log(0.1)], dtype=torch.float64))
    torch.testing.assert_close(total_variation(student, teacher), torch.ones(1, dtype=torch.float64))
    plain = jsd(student, teacher, plain=True)
    torch.testing.assert_close(plain, torch.tensor([math.log(2)], dtype=torch.float64))


def test_skew_kl_of_alpha_zero_is_the_kl():
    logits, teacher = pair()
    student = torch.log_softmax(logits, -1)
    torch.testing.assert_close(skew_kl(student, teacher, 0.0), forward_kl(student, teacher))
    torch.testing.assert_close(skew_reverse_kl(student, teacher, 0.0), reverse_kl(student, teacher))


def test_adaptive_kl_switches_position_by_position():
    flat, sharp = torch.zeros(5), torch.tensor([9.0, 0, 0, 0, 0])
    teacher = torch.log_softmax(torch.stack([flat, sharp]).double(), -1)
    student = torch.log_softmax(pair(2, 5)[0], -1)
    value = adaptive_kl(student, teacher, threshold=0.8)
    torch.testing.assert_close(value[0], (reverse_kl(student, teacher) + forward_kl(student, teacher))[0])
    torch.testing.assert_close(value[1], reverse_kl(student, teacher)[1])


def test_entropy():
    uniform = torch.full((3, 8), -math.log(8), dtype=torch.float64)
    torch.testing.assert_close(entropy(uniform), torch.full((3,), math.log(8), dtype=torch.float64))
    assert entropy(torch.log_softmax(torch.tensor([[1e4, 0.0, 0.0]]), -1)).item() == 0.0


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("student", [[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("teacher", [[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])
def test_extreme_logits_stay_finite_in_float32(name, student, teacher):
    divergence, _ = DEFINITIONS[name]
    logits = torch.tensor([student], requires_grad=True)
    value = divergence(log_probs(logits), log_probs(torch.tensor([teacher])))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_gradients_shrink_as_the_square_of_the_temperature(name):
    """Hence the factor tau^2: the gradient's norm times tau^2 tends to a constant."""
    logits, teacher = pair(rows=1)

    def norm(tau):
        z = logits.clone().requires_grad_()
        DIVERGENCES[name](log_probs(z, tau), log_probs(teacher, tau)).sum().backward()
        return z.grad.norm() * tau**2

    assert abs(norm(64.0) / norm(32.0) - 1) < 0.05
    assert abs(norm(1024.0) / norm(512.0) - 1) < 0.005


def test_any_leading_shape():
    logits, teacher = pair(rows=6)
    student = torch.log_softmax(logits, -1)
    for divergence in DIVERGENCES.values():
        flat = divergence(student, teacher)
        torch.testing.assert_close(divergence(student.view(2, 3, 7), teacher.view(2, 3, 7)), flat.view(2, 3))


# ------------------------------------------------------------------ in a recipe


def test_a_recipe_can_name_each_of_them_and_no_other():
    assert set(get_args(DivergenceName)) == set(DIVERGENCES) == set(DIVERGENCE_TITLES)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_options_of_a_recipe_reach_the_function(name):
    """By the names of its arguments; an option that it does not have changes nothing."""
    student_CS, teacher_CS = pair()
    student_CS = torch.log_softmax(student_CS, -1)
    options = {"beta": 0.3, "alpha": 0.4, "threshold": 10.0}
    own = {"jsd": ["beta"], "skew_kl": ["alpha"], "skew_reverse_kl": ["alpha"], "adaptive_kl": ["threshold"]}
    want = DIVERGENCES[name](student_CS, teacher_CS, **{option: options[option] for option in own.get(name, [])})
    asked = named(GKDConfig.model_validate({"divergence": name, **options}))
    assert torch.equal(asked(student_CS, teacher_CS), want)
    plain = named(GKDConfig.model_validate({"divergence": name}))(student_CS, teacher_CS)
    assert torch.equal(plain, want) != (name in own)


def test_reverse_kl_of_logits_is_reverse_kl_and_its_gradient_autograds():
    """The value to the bit, and log S; the gradient as autograd finds it in float64; of equal distributions exactly zero."""
    generator = torch.Generator().manual_seed(0)
    logits_CV, other_CV = (3 * torch.randn(5, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    logits_CV, teacher_CV = logits_CV.requires_grad_(), log_probs(other_CV)
    weight_C = torch.rand(5, generator=generator, dtype=torch.float64)
    value_C, student_CV = reverse_kl_of_logits(logits_CV, teacher_CV)
    assert torch.equal(value_C, reverse_kl(log_probs(logits_CV), teacher_CV)) and not student_CV.requires_grad
    assert torch.equal(student_CV, log_probs(logits_CV))
    plain_CV = log_probs(logits_CV)
    plain_C = (plain_CV.exp() * (plain_CV - teacher_CV)).sum(-1)
    (found,), (expected,) = (torch.autograd.grad(one, logits_CV, weight_C) for one in (value_C, plain_C))
    assert expected.norm() > 0.1
    torch.testing.assert_close(found, expected)
    same_C, _ = reverse_kl_of_logits(logits_CV, log_probs(logits_CV.detach()))
    assert not same_C.any() and not torch.autograd.grad(same_C.sum(), logits_CV)[0].any()
