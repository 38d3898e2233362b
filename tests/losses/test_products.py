"""The two libraries for products on a CPU: the same numbers in float32, forwards and backwards, whichever multiplies."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.models import make_model
from torch import nn

from kibitz.config import StudentConfig
from kibitz.losses import chunked, products
from kibitz.models.load import load_model, load_tokenizer
from kibitz.signals import Tokens

X = (8, 24, 96)  # rows as a batch has them; 8 x 24 x 96 x 288 multiplications are more than LEAST_SIZE


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN multiplies, on whatever processor the tests run; skipped where it would round."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setenv(products.VARIABLE, "onednn")
    products.onednn_is_faster.cache_clear()
    if not products.onednn_is_faster():
        pytest.skip("oneDNN rounds products here, and is refused")
    yield
    products.onednn_is_faster.cache_clear()


@pytest.fixture
def counted(onednn, monkeypatch) -> list[int]:
    """How often oneDNN was asked."""
    calls, plain = [0], products.onednn

    def watched():
        calls[0] += 1
        return plain()

    monkeypatch.setattr(products, "onednn", watched)
    return calls


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs_learn", [False, True])
@pytest.mark.parametrize("weights_learn", [False, True])
def test_a_linear_layer_and_its_gradients_are_those_of_float64(counted, bias, inputs_learn, weights_learn):
    x, w, b = numbers(*X), numbers(288, 96, seed=1), numbers(288, seed=2) if bias else None
    exact = [one.double().requires_grad_(on) for one, on in ((x, inputs_learn), (w, weights_learn))]
    given = [one.clone().requires_grad_(on) for one, on in ((x, inputs_learn), (w, weights_learn))]
    want = F.linear(*exact, None if b is None else b.double())
    got = products.linear(*given, b)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    assert got.requires_grad == (inputs_learn or weights_learn)
    if got.requires_grad:
        slope = numbers(*got.shape, seed=3)
        got.backward(slope)
        want.backward(slope.double())
    for mine, theirs in zip(given, exact, strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-4)
    assert counted[0] == 1 + inputs_learn + weights_learn


def test_the_bits_do_not_depend_on_gradients(onednn):
    x, w, b = numbers(*X), numbers(288, 96, seed=1).requires_grad_(), numbers(288, seed=2).requires_grad_()
    with torch.no_grad():
        without = products.linear(x, w, b)
    assert torch.equal(products.linear(x, w, b), without)


def test_gradients_of_gradients(onednn):
    x, w = numbers(*X).requires_grad_(), numbers(288, 96, seed=1).requires_grad_()
    found = []
    for linear in (products.linear, F.linear):
        (slope,) = torch.autograd.grad((linear(x, w) ** 2).sum(), x, create_graph=True)
        found.append(torch.autograd.grad((slope**2).sum(), w)[0])
    assert (found[0] - found[1]).norm() < 1e-5 * found[1].norm()


def test_small_products_and_other_numbers_stay_as_they_are(counted):
    w = numbers(288, 96, seed=1)
    for x, weight in (
        (numbers(2, 96), w),  # few rows
        (numbers(8, 8), w[:, :8]),  # a small product
        (numbers(*X).double(), w.double()),
        (numbers(*X).bfloat16(), w.bfloat16()),
    ):
        assert torch.equal(products.linear(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert products.linear(numbers(*X), w).dtype == torch.bfloat16
    assert counted[0] == 0


def test_a_sum_takes_a_product(onednn):
    total, one, other = numbers(300, 96), numbers(128, 300, seed=1).t(), numbers(128, 96, seed=2)
    want = total.double() + one.double() @ other.double()
    products.add_product(total, one, other)
    torch.testing.assert_close(total.double(), want, rtol=1e-5, atol=1e-4)


def test_settings_are_put_back_when_a_product_fails(onednn):
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError):
        products.linear(numbers(64, 100), numbers(512, 99))
    with pytest.raises(RuntimeError):
        products.product(numbers(64, 1000), numbers(999, 1000))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_a_library_that_rounds_is_refused(onednn, monkeypatch):
    class Rounding:
        fp32_precision = "ieee"

    plain = torch.Tensor.__matmul__

    def rounded(one, other):
        if one.dtype == torch.float32 and Rounding.fp32_precision == "bf16":
            return plain(one.bfloat16().float(), other.bfloat16().float())
        return plain(one, other)

    monkeypatch.setattr(torch.backends.mkldnn, "matmul", Rounding)
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    products.onednn_is_faster.cache_clear()
    assert not products.onednn_is_faster()


@pytest.mark.parametrize(
    ("about", "capability", "faster"),
    [
        ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16", "AVX512", True),
        ("vendor_id : AuthenticAMD\nflags : avx2", "AVX2", False),
        ("vendor_id : GenuineIntel\nflags : avx512f", "AVX512", False),
        ("vendor_id : Another\nflags : avx512f amx_tile", "AVX512", False),
        ("CPU implementer : 0x41", "DEFAULT", False),
    ],
)
def test_the_processor_decides(monkeypatch, tmp_path, about, capability, faster):
    (tmp_path / "cpuinfo").write_text(about)
    monkeypatch.setattr(products, "Path", lambda path: tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products._mkl_is_slow() == faster


def test_the_variable_overrules_it(monkeypatch):
    monkeypatch.setenv(products.VARIABLE, "mkl")
    products.onednn_is_faster.cache_clear()
    assert not products.onednn_is_faster()
    monkeypatch.setenv(products.VARIABLE, "blas")
    products.onednn_is_faster.cache_clear()
    with pytest.raises(ValueError, match="write mkl or onednn"):
        products.onednn_is_faster()
    monkeypatch.undo()
    products.onednn_is_faster.cache_clear()


# ------------------------------------------------------------------ models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("products") / "model", hidden_size=96, intermediate_size=288)


def loaded(folder):
    config = StudentConfig(model=str(folder))
    return load_model(config, "student", torch.device("cpu"), load_tokenizer(config, "student"))


def test_a_model_computes_and_learns_the_same(counted, folder, monkeypatch):
    ids = torch.arange(8 * 64).view(8, 64) % 12
    found = {}
    for library in ("onednn", "mkl"):
        monkeypatch.setenv(products.VARIABLE, library)
        products.onednn_is_faster.cache_clear()
        model, before = loaded(folder), counted[0]
        model.head(model.hidden(ids)).logsumexp(-1).mean().backward()
        assert (counted[0] > before) == (library == "onednn")
        found[library] = [p.grad for p in model.model.parameters()]
        with torch.no_grad():
            found[library].append(model.hidden(ids))
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_copy_has_layers_of_its_own(onednn, folder):
    model = loaded(folder)
    twin = copy.deepcopy(model)
    ids = torch.arange(8 * 64).view(8, 64) % 12
    with torch.no_grad():
        before = model.hidden(ids)
        for parameter in twin.model.parameters():
            parameter.zero_()
        assert torch.equal(model.hidden(ids), before)
        assert not twin.hidden(ids).any()


def test_a_layer_whose_pass_is_replaced_stays_so(onednn):
    layer = nn.Linear(96, 288)
    layer.forward = lambda input: input
    products.speed_up(layer)
    x = numbers(*X)
    assert layer(x) is x


def test_a_loss_over_chunks_takes_them(counted):
    torch.manual_seed(0)
    head, hidden = nn.Linear(96, 512, bias=False), numbers(128, 96).requires_grad_()
    tokens = Tokens(torch.arange(128) % 512, torch.ones(128), torch.zeros(128))
    loss, _ = chunked.over_chunks(lambda logits, t: {"loss": logits.logsumexp(-1)}, hidden, head, tokens, 64)
    loss.backward()
    assert counted[0] == 6  # two chunks: the logits and two gradients
    want = head.weight.detach().double().requires_grad_()
    (hidden.detach().double() @ want.t()).logsumexp(-1).sum().backward()
    torch.testing.assert_close(head.weight.grad.double(), want.grad, rtol=1e-4, atol=1e-5)
