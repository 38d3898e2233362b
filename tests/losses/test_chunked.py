"""The chunked loss is the naive one: value, gradient of the hidden states, gradient of the head."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from support.paths import ROOT
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kibitz.losses import CrossEntropy, Divergence, PolicyGradient, chunked, over_chunks
from kibitz.losses.divergences import jsd
from kibitz.models.head import Head
from kibitz.signals import Dense, Tokens

T, D, V = 7, 5, 11
CRITERIA = {
    "cross-entropy": CrossEntropy(),
    "reverse KL": Divergence(),
    "JSD at temperature 2": Divergence(partial(jsd, beta=0.3), temperature=2.0),
    "top 3 of both": Divergence(support="union", top_k=3),
    "vOPD": PolicyGradient(baseline=True, advantage_clip=(-3.0, 3.0)),
}


class SoftCap(nn.Module):
    """A head with something behind the matrix, as in Gemma."""

    def __init__(self, bias=True):
        super().__init__()
        self.linear = nn.Linear(D, V, bias=bias)

    def forward(self, hidden):
        return 3.0 * torch.tanh(self.linear(hidden) / 3.0)


def example(dtype=torch.float64, num=T):
    torch.manual_seed(0)
    teacher = nn.Linear(D, V).to(dtype)
    tokens = Tokens(
        token_T=torch.randint(0, V, (num,)),
        weight_T=torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 1.0, 1.0])[:num],
        logp_T=-torch.rand(num, dtype=dtype) * 3,
        signal=Dense(torch.randn(num, D, dtype=dtype), teacher),
    )
    return torch.randn(num, D, dtype=dtype, requires_grad=True), SoftCap().to(dtype), tokens


def naive(criterion, hidden_TD, head, tokens):
    values = criterion(head(hidden_TD), tokens)
    return (tokens.weight_T * values["loss"]).sum(), values


def gradients(loss, hidden_TD, head):
    (loss / 3).backward()  # the trainer divides: the gradient that flows in is not 1
    grads = [hidden_TD.grad, *(p.grad for p in head.parameters())]
    hidden_TD.grad = None
    head.zero_grad()
    return grads


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("chunk_size", [1, 3, T, T + 5])
def test_equals_the_naive_loss_for_every_chunk_size(name, chunk_size):
    hidden_TD, head, tokens = example()
    expected, expected_values = naive(CRITERIA[name], hidden_TD, head, tokens)
    expected_grads = gradients(expected, hidden_TD, head)
    loss, values = over_chunks(CRITERIA[name], hidden_TD, head, tokens, chunk_size)
    torch.testing.assert_close(loss, expected)
    assert values.keys() == expected_values.keys()
    for key, value_T in values.items():
        assert not value_T.requires_grad
        torch.testing.assert_close(value_T, expected_values[key].detach())
    for grad, expected_grad in zip(gradients(loss, hidden_TD, head), expected_grads, strict=True):
        assert expected_grad.norm() > 1e-3
        torch.testing.assert_close(grad, expected_grad)


def test_the_gradient_is_the_slope():
    """Central differences in float64, one number of the hidden states after another."""
    hidden_TD, head, tokens = example()
    over_chunks(Divergence(), hidden_TD, head, tokens, 3)[0].backward()

    def at(moved):
        with torch.no_grad():
            return over_chunks(Divergence(), hidden_TD + moved.view(T, D), head, tokens, 3)[0]

    steps = torch.eye(T * D, dtype=torch.float64) * 1e-6
    slopes = torch.stack([(at(step) - at(-step)) / 2e-6 for step in steps])
    torch.testing.assert_close(hidden_TD.grad, slopes.view(T, D), rtol=1e-6, atol=1e-8)


def test_gradients_are_handed_over_once():
    hidden_TD, head, tokens = example()
    loss, _ = over_chunks(Divergence(), hidden_TD, head, tokens, 3)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated already"):
        loss.backward()


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_blocks_of_rows_change_nothing(name, rows, monkeypatch):
    """Values and gradients are the same to the bit: each row is computed by itself. The teacher's head is called once a chunk."""
    hidden_TD, head, tokens = example()
    calls = []
    tokens.signal.head.register_forward_hook(lambda *_: calls.append(1))
    tokens.every, found = 2, []
    for numbers in (2**20, rows * V):
        monkeypatch.setattr(chunked, "BLOCK_NUMBERS", numbers)
        calls.clear()
        loss, values = over_chunks(CRITERIA[name], hidden_TD, head, tokens, 4)
        assert len(calls) == 2 or name == "cross-entropy"  # which asks no teacher
        found.append([loss.detach(), *values.values(), *gradients(loss, hidden_TD, head)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


class Scaled(Head):
    """A head whose logits are no part of what its matrix makes."""

    def __init__(self, projection, vocab_size):
        super().__init__(projection, vocab_size, scale=0.5, softcap=2.0)


class HandedOn(nn.Module):
    """A head that cannot be called alone: the hidden states are the logits."""

    def forward(self, hidden):
        return hidden[..., : V - 2]


@pytest.mark.parametrize("make", [Head, Scaled, None], ids=["cut", "scaled", "handed on"])
def test_gradients_in_the_place_of_logits_are_those_of_a_plain_loss(make, monkeypatch):
    """Heads of a padded vocabulary, and one whose logits belong to somebody else, which stay as they were."""
    monkeypatch.setattr(chunked, "BLOCK_NUMBERS", 2 * V)
    hidden_TD, _, tokens = example()
    torch.manual_seed(4)
    if make is None:
        head, hidden_TD = HandedOn(), torch.randn(T, V, dtype=torch.float64, requires_grad=True)
    else:
        head = make(nn.Linear(D, V).double(), V - 2)
    tokens.signal = Dense(tokens.signal.hidden_TD, Head(tokens.signal.head, V - 2))
    tokens.token_T = tokens.token_T.clamp(max=V - 3)
    before, expected = hidden_TD.detach().clone(), None
    for loss in (
        naive(Divergence(), hidden_TD, head, tokens)[0],
        over_chunks(Divergence(), hidden_TD, head, tokens, 5)[0],
    ):
        found = [loss.detach(), *gradients(loss, hidden_TD, head)]
        expected = expected or found
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    assert torch.equal(hidden_TD.detach(), before)


@pytest.mark.parametrize("vocab_size", [V, V - 2])
def test_a_chunk_has_two_tensors_of_logits(vocab_size, monkeypatch):
    """The student's, in whose place the gradient is written, and the teacher's; cutting off padded columns makes none."""
    monkeypatch.setattr(chunked, "BLOCK_NUMBERS", 2 * V)
    hidden_TD, _, tokens = example()
    tokens.signal = Dense(tokens.signal.hidden_TD, Head(tokens.signal.head, vocab_size))
    tokens.token_T = tokens.token_T.clamp(max=V - 3)
    head = Head(nn.Linear(D, V, bias=False).double(), vocab_size)
    with Sizes(T * V) as made:
        over_chunks(Divergence(), hidden_TD, head, tokens, T)[0].backward()
    assert made.names == ["mm", "addmm"]


class Sizes(TorchDispatchMode):
    """The results of all operations that have as many numbers."""

    def __init__(self, num):
        super().__init__()
        self.num, self.names = num, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.num and not func.is_view:
            self.names.append(func._schema.name.removeprefix("aten::"))
        return result


def test_the_gradient_of_a_matrix_is_one_tensor_for_all_chunks():
    """It is made once, added to by each product, and scaled where it lies; no chunk has one of its own."""
    hidden_TD, _, tokens = example()
    head = nn.Linear(D, V, bias=False).double()
    with Sizes(V * D) as made:
        over_chunks(Divergence(), hidden_TD, head, tokens, 3)[0].backward()
    assert made.names == ["zeros_like", "addmm_", "addmm_", "addmm_", "mul_"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of a process are Linux'")
def test_memory_is_that_of_a_chunk_however_many_there_are():
    """Six chunks in a process of its own, at a vocabulary of 151,936: less than four tensors of a chunk's logits, of which the
    student's, the teacher's and their gradient are three. What blocks leave behind must not keep others out of their place."""
    program = (
        "from benchmarks import loss_forms\n"
        "print(loss_forms.work('kibitz', 'reverse_kl', 151936, 8, 1320, 1, 4)['extra'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4 * 2**25 * 4


def test_a_head_of_two_matrices_and_a_bias():
    """What LoRA makes of a head: products with one parameter each, one of them used twice."""
    hidden_TD, _, tokens = example()
    torch.manual_seed(3)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(D, D).double(), nn.Linear(D, V).double()

        def forward(self, hidden):
            return self.second(self.first(self.first(hidden))) + self.second.weight.sum()

    head = Two()
    expected = gradients(naive(Divergence(), hidden_TD, head, tokens)[0], hidden_TD, head)
    loss, _ = over_chunks(Divergence(), hidden_TD, head, tokens, 3)
    for grad, reference in zip(gradients(loss, hidden_TD, head), expected, strict=True):
        torch.testing.assert_close(grad, reference)


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_tied_embeddings_get_both_gradients(chunk_size):
    _, _, tokens = example()

    def grad(run):
        torch.manual_seed(1)
        embedding, body = nn.Embedding(V, D).double(), nn.Linear(D, D).double()
        head = nn.Linear(D, V, bias=False)
        head.weight = embedding.weight
        loss, _ = run(CrossEntropy(), body(embedding(tokens.token_T.roll(1))), head, tokens)
        loss.backward()
        return embedding.weight.grad, body.weight.grad

    expected, chunked = grad(naive), grad(partial(over_chunks, chunk_size=chunk_size))
    torch.testing.assert_close(chunked, expected)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_all_of_it():
    hidden_TD, head, tokens = example()
    expected = gradients(naive(Divergence(), hidden_TD, head, tokens)[0], hidden_TD, head)[0]
    head.requires_grad_(False)
    loss, _ = over_chunks(Divergence(), hidden_TD, head, tokens, 2)
    loss.backward()
    torch.testing.assert_close(hidden_TD.grad / 3, expected)
    assert all(p.grad is None for p in head.parameters())


def test_frozen_hidden_states_leave_the_gradient_to_the_head():
    hidden_TD, head, tokens = example()
    expected = gradients(naive(Divergence(), hidden_TD, head, tokens)[0], hidden_TD, head)[1:]
    loss, _ = over_chunks(Divergence(), hidden_TD.detach(), head, tokens, 2)
    loss.backward()
    torch.testing.assert_close([p.grad / 3 for p in head.parameters()], expected)


def test_only_the_adapter_of_a_head_learns():
    hidden_TD, head, tokens = example()
    head.linear.weight.requires_grad_(False)
    loss, _ = over_chunks(Divergence(), hidden_TD, head, tokens, 2)
    loss.backward()
    assert head.linear.weight.grad is None
    assert head.linear.bias.grad.norm() > 0


def test_bfloat16_hidden_states_and_head():
    """Logits and losses are float32; gradients come back in the dtype of what they belong to."""
    hidden_TD, head, tokens = example(torch.float32)
    expected = gradients(naive(Divergence(), hidden_TD, head, tokens)[0], hidden_TD, head)
    head, hidden_TD = head.bfloat16(), hidden_TD.detach().bfloat16().requires_grad_()
    seen = []

    def criterion(logits_CV, tokens):
        seen.append(logits_CV.dtype)
        return Divergence()(logits_CV, tokens)

    loss, values = over_chunks(criterion, hidden_TD, head, tokens, 3)
    grads = gradients(loss, hidden_TD, head)
    assert set(seen) == {torch.float32}
    assert values["loss"].dtype == loss.dtype == torch.float32
    for grad, reference in zip(grads, expected, strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad - reference).norm() < 0.03 * reference.norm()


def test_head_gradients_add_up_in_float32():
    """1,024 chunks that each add 1 to a sum: bfloat16 would stop at 256."""
    head = nn.Linear(1, 2, bias=False).bfloat16()
    nn.init.zeros_(head.weight)
    tokens = Tokens(torch.zeros(1024, dtype=torch.long), torch.ones(1024), torch.zeros(1024))
    hidden_TD = torch.full((1024, 1), 2.0, dtype=torch.bfloat16)
    loss, _ = over_chunks(CrossEntropy(), hidden_TD, head, tokens, 1)
    loss.backward()
    assert head.weight.grad.flatten().tolist() == [-1024.0, 1024.0]


def test_no_tokens_give_a_zero_that_is_connected():
    hidden_TD, head, tokens = example()
    empty_TD = hidden_TD[:0]
    for criterion in CRITERIA.values():
        loss, values = over_chunks(criterion, empty_TD, head, tokens[:0])
        loss.backward()
        assert loss == 0.0
        assert hidden_TD.grad.count_nonzero() == 0
        assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in head.parameters())
        assert all(value_T.shape == (0,) for value_T in values.values())


def test_without_grad_there_are_values_only():
    hidden_TD, head, tokens = example()
    expected, expected_values = over_chunks(Divergence(), hidden_TD, head, tokens, 3)
    with torch.no_grad():
        loss, values = over_chunks(Divergence(), hidden_TD, head, tokens, 3)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(values, expected_values)


def test_no_more_than_one_chunk_of_logits_reaches_the_head_or_the_criterion():
    hidden_TD, head, tokens = example()
    shapes = []
    head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    over_chunks(CrossEntropy(), hidden_TD, head, tokens, 3)[0].backward()
    assert shapes == [(3, V), (3, V), (1, V)]


def test_the_weight_multiplies_and_zero_removes():
    hidden_TD, head, tokens = example()
    loss, values = over_chunks(Divergence(), hidden_TD, head, tokens, 3)
    torch.testing.assert_close(loss.detach(), (tokens.weight_T * values["loss"]).sum())
    loss.backward()
    assert hidden_TD.grad[1].count_nonzero() == 0
    assert (hidden_TD.grad[tokens.weight_T > 0].norm(dim=-1) > 0).all()


def test_a_loss_cut_off_from_the_student_is_a_programming_error():
    hidden_TD, head, tokens = example()
    with pytest.raises(AssertionError, match="detached"):
        over_chunks(lambda logits_CV, tokens: {"loss": logits_CV.detach()[:, 0]}, hidden_TD, head, tokens)
