"""Truncated supports and the criteria that use them, against brute force over the whole vocabulary."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from kibitz.logprobs import log_probs
from kibitz.losses.criteria import CrossEntropy, Divergence
from kibitz.losses.divergences import DIVERGENCES, entropy, forward_kl, jsd, reverse_kl
from kibitz.losses.policy_gradient import k3
from kibitz.losses.supports import find_token, most_likely_but_one, signal_buckets, top_k_buckets
from kibitz.signals import Dense, Sampled, Tokens, TopK
from kibitz.teachers import ScoreRequest
from kibitz.teachers.local import reduced
from kibitz.teachers.mixture import MixedHead

C, V = 5, 12


def example(seed=0, dtype=torch.float64, scale=2.0, rows=C, size=V):
    """Student logits, teacher logits, written tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, rows, size, dtype=torch.float64, generator=generator).to(dtype) * scale
    return logits[0], logits[1], torch.randint(0, size, (rows,), generator=generator)


def tokens_of(token_C, signal=None):
    zeros = torch.zeros(len(token_C))
    return Tokens(token_C, torch.ones(len(token_C)), zeros, signal)


def dense(teacher_logits_CV):
    return Dense(teacher_logits_CV, torch.nn.Identity())


def top_k_signal(teacher_logits_CV, token_C, k, temperature=1.0):
    """What a server sends: its k most likely tokens and the written one, which may stand there twice."""
    teacher_CV = log_probs(teacher_logits_CV, temperature)
    ids_CK = torch.cat([token_C.unsqueeze(-1), teacher_CV.topk(k).indices], -1)
    return TopK(ids_CK, teacher_CV.gather(-1, ids_CK), temperature)


def merged(logp_V, kept):
    """A distribution by hand: the kept tokens in order, and the sum of the others."""
    rest = [v for v in range(len(logp_V)) if v not in kept]
    return torch.cat([logp_V[sorted(kept)], logp_V[rest].logsumexp(0, keepdim=True)])


def gradient(fn, logits_CV):
    logits_CV = logits_CV.clone().requires_grad_()
    (grad,) = torch.autograd.grad(fn(logits_CV).sum(), logits_CV)
    return grad


@pytest.mark.parametrize("of", ["student", "teacher", "union"])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_buckets_are_the_chosen_tokens_once_each_and_all_the_others_together(of, k):
    student_logits, teacher_logits, token_C = example()
    student_CV, teacher_CV = log_probs(student_logits), log_probs(teacher_logits)
    buckets = top_k_buckets(student_CV, teacher_CV, token_C, of, k)
    for name, divergence in DIVERGENCES.items():
        value_C = divergence(buckets.student_CS, buckets.teacher_CS)
        for c in range(C):
            kept = {int(token_C[c])}
            if of != "teacher":
                kept |= set(student_CV[c].topk(k).indices.tolist())
            if of != "student":
                kept |= set(teacher_CV[c].topk(k).indices.tolist())
            student_S, teacher_S = merged(student_CV[c], kept), merged(teacher_CV[c], kept)
            torch.testing.assert_close(value_C[c], divergence(student_S, teacher_S), msg=name)
            torch.testing.assert_close(buckets.student_mass_C[c], student_S[:-1].exp().sum())
            torch.testing.assert_close(buckets.teacher_mass_C[c], teacher_S[:-1].exp().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_all_tokens_are_the_full_vocabulary_in_loss_and_gradient(name, dtype):
    student_logits, teacher_logits, token_C = example(dtype=dtype)
    signal = top_k_signal(teacher_logits, token_C, V)
    criteria = [Divergence(DIVERGENCES[name], support, top_k=99) for support in ("student", "teacher", "union")]
    runs = [(criterion, dense(teacher_logits)) for criterion in criteria] + [(criteria[1], signal)]
    full = Divergence(DIVERGENCES[name])
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-13)

    def loss(z, criterion, signal):
        return criterion(z, tokens_of(token_C, signal))["loss"]

    for criterion, given in runs:
        close(loss(student_logits, criterion, given), loss(student_logits, full, dense(teacher_logits)))
        close(
            gradient(partial(loss, criterion=criterion, signal=given), student_logits),
            gradient(partial(loss, criterion=full, signal=dense(teacher_logits)), student_logits),
        )


@pytest.mark.parametrize("of", ["student", "teacher", "union"])
@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl, jsd])
def test_truncated_divergences_rise_from_zero_to_the_full_one(of, divergence):
    """Data processing: merging tokens loses information, and more tokens lose less."""
    for seed in range(5):
        student_logits, teacher_logits, token_C = example(seed)
        student_CV, teacher_CV = log_probs(student_logits), log_probs(teacher_logits)
        values = [torch.zeros(C, dtype=torch.float64)]
        for k in range(1, V + 1):
            buckets = top_k_buckets(student_CV, teacher_CV, token_C, of, k)
            values.append(divergence(buckets.student_CS, buckets.teacher_CS))
        values.append(divergence(student_CV, teacher_CV))
        assert all((after >= before - 1e-12).all() for before, after in pairwise(values))


def test_a_server_says_the_same_as_a_local_teacher():
    student_logits, teacher_logits, token_C = example()
    for k in (1, 3, 6):
        local = Divergence(support="teacher", top_k=k)(student_logits, tokens_of(token_C, dense(teacher_logits)))
        signal = top_k_signal(teacher_logits, token_C, k)
        remote = Divergence(support="teacher")(student_logits, tokens_of(token_C, signal))
        for name in ("loss", "teacher_logp", "student_logp", "student_entropy", "student_mass", "teacher_mass"):
            torch.testing.assert_close(remote[name], local[name])
        assert (remote["reverse_kl"] <= local["reverse_kl"]).all()


@pytest.mark.parametrize("of", ["student", "teacher", "union"])
def test_gradient_by_finite_differences(of):
    student_logits, teacher_logits, token_C = example(rows=2, size=6)
    criterion = Divergence(support=of, top_k=2, temperature=1.5)

    def loss(z):
        return criterion(z, tokens_of(token_C, dense(teacher_logits)))["loss"]

    assert torch.autograd.gradcheck(loss, student_logits.requires_grad_())


def cosine_to_the_true_gradient(k, of, how):
    """Mean over 50 states of the cosine between a truncated reverse KL's gradient and the full one's."""
    student_logits, teacher_logits, _ = example(rows=50, scale=1.5)
    teacher_CV = log_probs(teacher_logits)
    ids_CK = (student_logits if of == "student" else teacher_logits).topk(k).indices

    def truncated(z):
        student_CV = log_probs(z)
        student_CK, teacher_CK = student_CV.gather(-1, ids_CK), teacher_CV.gather(-1, ids_CK)
        if how == "tail":
            buckets = top_k_buckets(student_CV, teacher_CV, ids_CK[:, 0], of, k)
            return reverse_kl(buckets.student_CS, buckets.teacher_CS)
        if how == "renormalised":
            student_CK, teacher_CK = log_probs(student_CK), log_probs(teacher_CK)
        return (student_CK.exp() * (student_CK - teacher_CK)).sum(-1)

    true = gradient(lambda z: reverse_kl(log_probs(z), teacher_CV), student_logits)
    return torch.cosine_similarity(gradient(truncated, student_logits), true, dim=-1).mean()


@pytest.mark.parametrize(("of", "k"), [("student", 2), ("student", 4), ("teacher", 4), ("teacher", 8)])
def test_the_tail_keeps_the_gradient_that_other_truncations_lose(of, k):
    tail, raw, renormalised = (cosine_to_the_true_gradient(k, of, how) for how in ("tail", "raw", "renormalised"))
    assert tail > 0.75
    assert tail > max(raw, renormalised)
    if of == "teacher":  # the student's mass lies elsewhere
        assert tail > max(raw, renormalised) + 0.3


def test_a_tiny_tail_is_exact_in_float32():
    """1 - sum of p would give nothing below 1e-7; the tail here holds 1e-11, and pulls with its full strength."""
    student_logits = torch.tensor([[25.0, 20.0, 0.0, -1.0]])
    teacher_logits = torch.tensor([[0.0, 0.0, 2.0, 1.0]])
    token_C = torch.tensor([0])
    criterion = Divergence(forward_kl, support="student", top_k=2)

    def run(dtype):
        z = student_logits.to(dtype).requires_grad_()
        values = criterion(z, tokens_of(token_C, dense(teacher_logits.to(dtype))))
        (grad,) = torch.autograd.grad(values["loss"].sum(), z)
        return values["loss"].double(), grad.double()

    torch.testing.assert_close(run(torch.float32), run(torch.float64), rtol=1e-5, atol=1e-6)


def by_hand(student_logits, teacher_logits, k):
    """The reverse KL of each row on the teacher's k likeliest tokens and the tail, and its gradient, in float64."""
    z = student_logits.double().requires_grad_()
    student_CV, teacher_CV = log_probs(z), log_probs(teacher_logits.double())
    kept = [set(row.topk(k).indices.tolist()) for row in teacher_CV]
    pairs = [(merged(s, some), merged(t, some)) for s, t, some in zip(student_CV, teacher_CV, kept, strict=True)]
    loss_C = torch.stack([(s.exp() * (s - t)).sum() for s, t in pairs])
    (grad,) = torch.autograd.grad(loss_C.sum(), z)
    return loss_C.detach(), grad


@pytest.mark.parametrize("scale", [1.0, 6.0, 12.0])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_top_k_of_a_teacher_in_this_process_has_its_exact_tail(scale, mixed):
    """Where the teacher is far from the student its tail is 1e-20 and the student's mass is there: 1 - sum p, which is 1.2e-7
    at least in float32, would give another loss and another gradient."""
    student_logits, teacher_logits, token_C = example(dtype=torch.float32, rows=40, size=30)
    teacher_logits = teacher_logits * scale
    said = dense(teacher_logits)
    if mixed:
        head, second = MixedHead(), dense(teacher_logits.flip(-1))
        said = head.packed(((0, math.log(0.25)), (1, math.log(0.75))), {0: said, 1: second}, 61)
        both = [log_probs(one.double()) for one in (teacher_logits, teacher_logits.flip(-1))]
        teacher_logits = torch.logaddexp(both[0] + math.log(0.25), both[1] + math.log(0.75))
    signal = reduced(said, token_C, ScoreRequest("top_k", top_k=4), chunk_tokens=7)
    z = student_logits.clone().requires_grad_()
    values = Divergence(support="teacher")(z, tokens_of(token_C, signal))
    (grad,) = torch.autograd.grad(values["loss"].sum(), z)
    loss_C, wanted = by_hand(student_logits, teacher_logits, 4)
    torch.testing.assert_close(values["loss"].double(), loss_C, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values["reverse_kl"].double(), loss_C, rtol=1e-5, atol=1e-5)
    assert (grad.double() - wanted).norm() < 1e-5 * wanted.norm()
    for support in ("teacher", "union"):  # dense: the written token joins the K
        dense_C = Divergence(support=support, top_k=4)(student_logits, tokens_of(token_C, said))["loss"]
        assert (dense_C.double() > loss_C - 1e-4).all()
    cut = TopK(signal.ids_TK, signal.logp_TK)  # what a server could tell
    other_C = Divergence(support="teacher")(student_logits, tokens_of(token_C, cut))["loss"].double()
    assert (scale < 6) == torch.allclose(other_C, loss_C, rtol=1e-3, atol=1e-3), "the test wants tails below 1e-7"


def test_fewer_tokens_of_a_signal_have_a_tail_that_holds_the_one_left_out():
    _, teacher_logits, token_C = example(scale=20.0)
    whole = reduced(dense(teacher_logits), token_C, ScoreRequest("top_k", top_k=4))
    fewer, wanted = (
        most_likely_but_one(whole),
        reduced(dense(teacher_logits), token_C, ScoreRequest("top_k", top_k=3)),
    )
    torch.testing.assert_close(fewer.rest_logp_T, wanted.rest_logp_T)
    logp_C, found_C = find_token(whole, whole.ids_TK[:, -1])
    torch.testing.assert_close(logp_C, whole.logp_TK[:, -1])
    absent_C = torch.tensor([next(v for v in range(V) if v not in row) for row in whole.ids_TK.tolist()])
    logp_C, found_C = find_token(whole, absent_C)
    torch.testing.assert_close(logp_C, whole.rest_logp_T)
    assert not found_C.any()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("support", ["full", "student", "teacher", "union"])
def test_extreme_logits_stay_finite(name, support):
    student_logits = torch.tensor([[1e4, -1e4, 0.0, 5e3], [0.0, 0.0, 0.0, 0.0], [-1e4, 1e4, 1e4, 0.0]])
    teacher_logits = student_logits.flip(-1)
    criterion = Divergence(DIVERGENCES[name], support, top_k=2)
    runs = [(criterion, dense(teacher_logits))]
    if support == "teacher":
        runs.append((criterion, top_k_signal(teacher_logits, torch.tensor([1, 0, 3]), 2)))
    for criterion, signal in runs:
        z = student_logits.clone().requires_grad_()
        values = criterion(z, tokens_of(torch.tensor([1, 0, 3]), signal))
        values["loss"].sum().backward()
        assert all(torch.isfinite(value_C).all() for value_C in values.values())
        assert torch.isfinite(z.grad).all()


def test_duplicates_in_a_signal_count_once():
    student_logits, teacher_logits, _ = example()
    teacher_CV = log_probs(teacher_logits)
    once, twice = torch.tensor([[3, 1, 7]] * C), torch.tensor([[7, 3, 1, 3, 7]] * C)
    student_CV = log_probs(student_logits)
    a = signal_buckets(student_CV, TopK(once, teacher_CV.gather(-1, once)))
    b = signal_buckets(student_CV, TopK(twice, teacher_CV.gather(-1, twice)))
    torch.testing.assert_close(reverse_kl(*a[:2]), reverse_kl(*b[:2]))
    torch.testing.assert_close(a[2:], b[2:])


def test_a_token_that_the_teacher_did_not_send_gets_the_tail():
    _, teacher_logits, _ = example(dtype=torch.float32)
    teacher_CV = log_probs(teacher_logits)
    ids_CK = torch.tensor([[2, 5, 5]] * C)
    logp_C, found_C = find_token(TopK(ids_CK, teacher_CV.gather(-1, ids_CK)), torch.tensor([5, 2, 0, 5, 11]))
    assert found_C.tolist() == [True, True, False, True, False]
    rest_C = teacher_CV[:, [v for v in range(V) if v not in (2, 5)]].logsumexp(-1)
    expected = [teacher_CV[0, 5], teacher_CV[1, 2], rest_C[2], teacher_CV[3, 5], rest_C[4]]
    torch.testing.assert_close(logp_C, torch.stack(expected))


# -------------------------------------------------------------------------------------------------------- criteria


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_loss_temperature_scales_by_its_square_and_leaves_the_metrics_alone(tau):
    student_logits, teacher_logits, token_C = example()
    tokens = tokens_of(token_C, dense(teacher_logits))
    values, plain = Divergence(jsd, temperature=tau)(student_logits, tokens), Divergence()(student_logits, tokens)
    expected = tau**2 * jsd(log_probs(student_logits / tau), log_probs(teacher_logits / tau))
    torch.testing.assert_close(values["loss"], expected)
    for name in ("reverse_kl", "student_entropy", "teacher_entropy", "student_logp", "teacher_logp"):
        torch.testing.assert_close(values[name], plain[name])


def test_metrics_are_what_their_names_say():
    student_logits, teacher_logits, token_C = example()
    student_CV, teacher_CV = log_probs(student_logits), log_probs(teacher_logits)
    values = Divergence(forward_kl)(student_logits, tokens_of(token_C, dense(teacher_logits)))
    rows = torch.arange(C)
    torch.testing.assert_close(values["loss"], forward_kl(student_CV, teacher_CV))
    torch.testing.assert_close(values["reverse_kl"], reverse_kl(student_CV, teacher_CV))
    torch.testing.assert_close(values["student_entropy"], entropy(student_CV))
    torch.testing.assert_close(values["teacher_entropy"], entropy(teacher_CV))
    torch.testing.assert_close(values["student_logp"], student_CV[rows, token_C])
    torch.testing.assert_close(values["teacher_logp"], teacher_CV[rows, token_C])


def test_cross_entropy():
    student_logits, _, token_C = example()
    values = CrossEntropy()(student_logits, tokens_of(token_C))
    expected = torch.nn.functional.cross_entropy(student_logits, token_C, reduction="none")
    torch.testing.assert_close(values["loss"], expected)
    torch.testing.assert_close(values["student_logp"], -expected)


@pytest.mark.parametrize("support", ["full", "union"])
def test_a_function_of_your_own_is_a_divergence(support):
    def chi_squared(student_CS, teacher_CS):
        return ((student_CS - teacher_CS).exp() * student_CS.exp()).sum(-1) - 1

    student_logits, teacher_logits, token_C = example(scale=0.5)
    values = Divergence(chi_squared, support, top_k=V)(student_logits, tokens_of(token_C, dense(teacher_logits)))
    student, teacher = log_probs(student_logits).exp(), log_probs(teacher_logits).exp()
    torch.testing.assert_close(values["loss"], ((student - teacher) ** 2 / teacher).sum(-1))


def test_the_teachers_graph_is_never_built():
    student_logits, teacher_logits, token_C = example()
    head = torch.nn.Linear(V, V).double()
    values = Divergence(lambda student_CS, teacher_CS: (student_CS - teacher_CS).square().sum(-1))(
        student_logits.requires_grad_(), tokens_of(token_C, Dense(teacher_logits, head))
    )
    values["loss"].sum().backward()
    assert head.weight.grad is None


def test_numbers_that_are_no_log_probabilities_are_refused():
    student_logits, teacher_logits, token_C = example()
    broken = teacher_logits.clone()
    broken[0, 0] = float("nan")
    impossible = teacher_logits.masked_fill(torch.arange(V) == 3, -torch.inf)
    ids_CK = torch.tensor([[0, 1, 3]] * C)
    logits = TopK(ids_CK, teacher_logits.abs().gather(-1, ids_CK))
    renormalised = TopK(ids_CK, log_probs(teacher_logits).gather(-1, ids_CK) + 1.0)
    for signal, message in [
        (dense(broken), "logits hold NaN"),
        (dense(impossible), "very negative finite value"),
        (TopK(ids_CK, log_probs(impossible).gather(-1, ids_CK)), "log-probabilities hold NaN"),
        (logits, "add up to"),
        (renormalised, "add up to"),
        (dense(teacher_logits[:, :-1]), "scores 11 tokens and the student 12"),
    ]:
        with pytest.raises(ValueError, match=message):
            Divergence(support="teacher")(student_logits, tokens_of(token_C, signal))


def test_signals_that_cannot_answer_are_refused():
    student_logits, teacher_logits, token_C = example()
    signal = top_k_signal(teacher_logits, token_C, 3)
    for criterion, given, message in [
        (Divergence(), signal, "write support: teacher"),
        (Divergence(support="student"), signal, "write support: teacher"),
        (Divergence(support="teacher", temperature=2.0), signal, "make the two equal"),
        (Divergence(), Sampled(torch.zeros(C)), "the signal is Sampled"),
        (Divergence(), None, "the signal is NoneType"),
    ]:
        with pytest.raises(ValueError, match=message):
            criterion(student_logits, tokens_of(token_C, given))


def test_a_top_k_signal_at_another_temperature_is_compared_at_it():
    student_logits, teacher_logits, token_C = example()
    signal = top_k_signal(teacher_logits, token_C, V, temperature=2.0)
    values = Divergence(support="teacher", temperature=2.0)(student_logits, tokens_of(token_C, signal))
    expected = reverse_kl(log_probs(student_logits, 2.0), log_probs(teacher_logits, 2.0))
    torch.testing.assert_close(values["loss"], 4 * expected)
    torch.testing.assert_close(values["reverse_kl"], expected)


def test_settings_are_checked_before_anything_runs():
    for options, message in [
        ({"support": "top"}, "full, student, teacher or union"),
        ({"top_k": 0}, "at least 1"),
        ({"temperature": 0.0}, "above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Divergence(**options)


def test_k3_of_the_sampled_token_is_the_reverse_kl_on_average():
    """Exact: every token once, weighted by the student's probability."""
    student_logits, teacher_logits, _ = example(rows=1)
    student_V, teacher_V = log_probs(student_logits)[0], log_probs(teacher_logits)[0]
    value = (student_V.exp() * k3(student_V, teacher_V)).sum()
    torch.testing.assert_close(value, reverse_kl(student_V, teacher_V))
