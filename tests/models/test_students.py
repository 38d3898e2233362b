"""Students in bfloat16, with recomputed activations, with moments of 8 bits: less memory, and the same learning."""

import shutil
import sys

import pytest
import torch
from support.models import a_rollout, language_model, make_model
from support.runs import LEAST, recipe
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM

import kibitz
from kibitz.batching import pack
from kibitz.config import OptimConfig, Recipe
from kibitz.engines.torch import TorchEngine
from kibitz.losses.chunked import over_chunks
from kibitz.losses.criteria import CrossEntropy
from kibitz.models.compiled import compile_if_same
from kibitz.models.layers import compile_layers, recomputable
from kibitz.optim import Optimizer
from kibitz.training.room import _leaves_open_compiling
from kibitz.types import Prompt, Sampling

SCORED = [a_rollout([1, 5, 6], [7, 8, 9, 4]), a_rollout([1, 9], [4, 4, 5, 6, 7]), a_rollout([1, 2, 3, 4, 5, 6], [9])]


def loss_of(model, scored=SCORED):
    batch = pack(scored)
    total, _ = model(batch, lambda hidden_TD, head: over_chunks(CrossEntropy(), hidden_TD, head, batch.tokens))
    return total


# ------------------------------------------------------------------ bfloat16


def test_small_steps_move_bfloat16_weights_through_their_masters(tmp_path):
    """100 steps of 1e-5 down a constant gradient: Adam moves each weight by 1e-3 in all. A bfloat16 weight of about 1 has
    neighbours 1/256 and 1/128 away, so it waits while its master goes on; one of 0.01 arrives, and alone it would not."""
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path), dtype=torch.bfloat16)
    norm, matrix = model.model.norm.weight, model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        matrix.fill_(0.01)
    begin, alone = matrix.detach().clone().float(), torch.nn.Parameter(torch.full((4,), 0.01).bfloat16())
    optimizer = Optimizer(model, OptimConfig(lr=1e-5, clip=None))
    without = torch.optim.AdamW([alone], lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(100):
        (norm.sum() + matrix.sum()).backward()
        optimizer.step(1.0)
        alone.sum().backward()
        without.step()
        without.zero_grad()
    assert torch.equal(alone.float(), torch.full((4,), 0.01).bfloat16().float())  # what happens without a master
    assert torch.equal(norm.float(), torch.ones(32))
    torch.testing.assert_close(optimizer.masters[norm].detach(), torch.full((32,), 1 - 1e-3), rtol=0, atol=1e-5)
    torch.testing.assert_close(matrix.float(), begin - 1e-3, rtol=1 / 256, atol=0)


def test_gradients_of_micro_batches_are_summed_in_float32(tmp_path):
    """1 + 255 times 2^-9 is 1.498; in bfloat16 each of the small ones would be lost on 1."""
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path), dtype=torch.bfloat16)
    optimizer, norm = Optimizer(model, OptimConfig(clip=None)), model.model.norm.weight
    for scale in [1.0] + [2.0**-9] * 255:
        (norm * scale).sum().backward()
    assert optimizer.masters[norm].grad[0] == 1 + 255 * 2.0**-9
    assert norm.grad is None
    assert optimizer.step(1.0) == pytest.approx((1 + 255 * 2.0**-9) * 32**0.5, rel=1e-6)
    assert optimizer.masters[norm].grad is None


def test_float32_needs_no_masters_and_masters_come_back(tmp_path):
    folder, config = make_model(tmp_path), OptimConfig(lr=1e-4)
    assert not Optimizer(language_model(folder).model, config).masters

    def steps(model, optimizer, num):
        for _ in range(num):
            loss_of(model).backward()
            optimizer.step(1.0)

    whole = language_model(folder, "bfloat16")
    begun = Optimizer(whole.model, config)
    steps(whole, begun, 3)
    whole.save(tmp_path / "saved")
    again = language_model(tmp_path / "saved", "bfloat16")
    resumed = Optimizer(again.model, config)
    resumed.load_state(begun.state())
    steps(whole, begun, 3)
    steps(again, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(begun.parameters, resumed.parameters, strict=True))


def test_a_bfloat16_run_learns_and_goes_on_bit_for_bit(small_models, tmp_path):
    def run(output, steps=4, resume=False):
        settings = {"optim": {"lr": 1e-3, "schedule": "constant"}, "save": {"every": 2}, "steps": steps}
        plain = recipe(small_models / "student", small_models / "teacher", output, **settings)
        return kibitz.train(plain, ["student.dtype=bfloat16"], resume=resume)

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", steps=2)
    again = run(tmp_path / "parts", resume=True)
    assert [row["loss"] for row in whole.metrics] == [row["loss"] for row in again.metrics]
    assert whole.metrics[-1]["loss"] < whole.metrics[0]["loss"]
    weights = [AutoModelForCausalLM.from_pretrained(r.checkpoint).state_dict() for r in (whole, again)]
    assert all(
        value.dtype == torch.bfloat16 and torch.equal(value, weights[1][key]) for key, value in weights[0].items()
    )


# ------------------------------------------------------------------ recomputed activations


def kept_bytes(model) -> int:
    """What autograd keeps between the passes, each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model).backward()
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_recomputed_activations_change_nothing_and_need_less(kind, tmp_path):
    sizes = (
        {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128} if kind == "gpt2" else {"num_hidden_layers": 4}
    )
    folder = make_model(tmp_path, kind=kind, **sizes)
    plain, spare = language_model(folder), language_model(folder)
    spare.recompute_activations()
    assert torch.equal(loss_of(plain), loss_of(spare))
    memory = kept_bytes(plain), kept_bytes(spare)
    assert memory[1] < memory[0] / 3
    for (name, ours), theirs in zip(plain.model.named_parameters(), spare.model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def test_a_run_that_recomputes_is_the_same_run(small_models, tmp_path):
    def run(output, *overrides):
        plain = recipe(small_models / "student", small_models / "teacher", output, steps=2)
        return kibitz.train(plain, overrides)

    losses = [[row["loss"] for row in run(tmp_path / "plain").metrics]]
    losses.append([row["loss"] for row in run(tmp_path / "spare", "optim.checkpointing=true").metrics])
    assert losses[0] == losses[1]
    adapters = ("student.lora.rank=4", "optim.lr=1e-2")
    losses = [[row["loss"] for row in run(tmp_path / "lora", *adapters).metrics]]
    losses.append([row["loss"] for row in run(tmp_path / "both", *adapters, "optim.checkpointing=true").metrics])
    assert losses[0] == losses[1]


def test_models_that_compute_something_else_then_are_refused(tmp_path):
    """OPT's layers drop out by the very flag that recomputing needs."""
    sizes = {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.5}
    model = language_model(make_model(tmp_path, kind="opt", **sizes))
    with pytest.raises(ValueError, match="computes something else then"):
        model.recompute_activations()
    bare = language_model(make_model(tmp_path / "mamba", kind="qwen3"))
    bare.model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="no layers that can be recomputed"):
        bare.recompute_activations()


# ------------------------------------------------------------------ 8 bits


def test_moments_of_8_bits_learn_nearly_the_same_and_come_back(tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = make_model(
        tmp_path, hidden_size=96, intermediate_size=128
    )  # matrices of 4096 numbers and more are quantised
    losses = {}
    for name in ("adamw", "adamw_8bit"):
        model, config = language_model(folder), OptimConfig(name=name, lr=3e-3)
        optimizer = Optimizer(model.model, config)
        losses[name] = []
        for step in range(12):
            if step == 6:
                state, fresh = optimizer.state(), Optimizer(model.model, config)
                fresh.load_state(state)
                assert all(torch.equal(state[key], value) for key, value in fresh.state().items())
                if name == "adamw_8bit":
                    assert any(value.dtype == torch.uint8 for value in state.values())
                optimizer = fresh
            loss = loss_of(model)
            loss.backward()
            optimizer.step(1.0)
            losses[name].append(loss.item())
    assert losses["adamw_8bit"][0] == losses["adamw"][0]
    assert losses["adamw_8bit"][-1] == pytest.approx(losses["adamw"][-1], rel=0.05)
    assert losses["adamw_8bit"][-1] != losses["adamw"][-1]
    assert losses["adamw"][-1] < 0.5 * losses["adamw"][0]


def test_a_missing_package_is_named_before_anything_loads(small_models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'kibitz\[bitsandbytes\]'"):
        kibitz.train(recipe("/nowhere/at/all", None, tmp_path, method={"type": "grpo"}, optim={"name": "adamw_8bit"}))


# ------------------------------------------------------------------ compiled


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler here")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_student_learns_the_same(tmp_path):
    plain, compiled = (
        language_model(make_model(tmp_path)),
        language_model(tmp_path, compile=True),
    )
    losses = loss_of(plain), loss_of(compiled)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    assert len(list(compiled.parameters())) == len(list(plain.parameters()))
    for ours, theirs in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-4, atol=1e-4)


def are_compiled(model) -> bool:
    return all(layer._compiled_call_impl is not None for layer in recomputable(model.model))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler here")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_body_is_compiled_where_that_changes_nothing_but_rounding(tmp_path):
    model = language_model(make_model(tmp_path))
    ids_BL = torch.arange(20)[None]
    before = model.hidden(ids_BL)
    assert compile_if_same(model)
    assert are_compiled(model)
    torch.testing.assert_close(model.hidden(ids_BL), before, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler here")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_layers_of_one_shape_are_compiled_once(tmp_path):
    """Three layers take as many compiled forms as one, recomputed ones too: one with gradients and one without."""
    forms = []
    for layers in (1, 3):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = language_model(make_model(tmp_path / str(layers), num_hidden_layers=layers), compile=True)
        model.recompute_activations()
        loss_of(model).backward()
        forms.append(torch._dynamo.utils.counters["frames"]["ok"])
    assert forms[0] == forms[1] > 0


def test_an_engine_steps_through_layers_as_they_are(tmp_path, monkeypatch):
    """What is compiled is called for whole sequences alone: by the body, and by an engine that checks itself against it."""
    model, called = language_model(make_model(tmp_path, num_hidden_layers=2)), []

    def compiled(layer, dynamic: bool):
        return lambda *args, **options: (called.append(1), layer(*args, **options))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    compile_layers(model.model)
    TorchEngine(model).generate([Prompt((2, 3), "", "key")], Sampling(max_tokens=4))
    assert len(called) <= 2
    called.clear()
    model.hidden(torch.arange(6)[None])
    assert len(called) == 2


class Precise:
    """What a compiler makes of a layer in bfloat16: it rounds once, at the end."""

    def __init__(self, layer):
        self.layer = layer.__self__

    def __call__(self, *args, **options):
        def widened(value):
            return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        weights = {f"layer.{name}": parameter.float() for name, parameter in self.layer.named_parameters()}
        args, options = tree_map(widened, (args, options))
        return torch.func.functional_call(Forward(self.layer), weights, args, options).bfloat16()


class Forward(torch.nn.Module):
    """A layer's own pass, whatever is compiled in its place."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **options):
        return self.layer.forward(*args, **options)


def test_a_deep_model_in_bfloat16_is_compiled_although_rounding_adds_up(tmp_path, monkeypatch):
    """Twelve layers: the hidden states of both differ by more than one rounding, and each layer by less."""
    model = language_model(make_model(tmp_path, num_hidden_layers=12), dtype="bfloat16")
    ids_BL = torch.arange(20)[None]
    before = model.hidden(ids_BL).float()
    monkeypatch.setattr(torch, "compile", lambda layer, dynamic: Precise(layer))
    assert compile_if_same(model)
    after = model.hidden(ids_BL).float()
    assert (after - before).norm() > torch.finfo(torch.bfloat16).eps * before.norm()


EPS = {torch.float32: 2**-23, torch.bfloat16: 2**-8}


class Wrong:
    """What a compiler made that is not the model."""

    def __init__(self, layer, kind: str):
        self.layer, self.kind = layer, kind

    def __call__(self, *args, **options):
        if self.kind == "fails":
            raise RuntimeError("no compiler")
        far = {"differs": 1.01, "with gradients": 1.0 + EPS[args[0].dtype] * torch.is_grad_enabled()}[self.kind]
        return self.layer(*args, **options) * far


@pytest.mark.parametrize(
    ("kind", "why"),
    [("fails", "no compiler"), ("differs", "is off by"), ("with gradients", "whether there are gradients")],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_body_that_would_compute_something_else_stays_as_it_is(tmp_path, monkeypatch, caplog, kind, why, dtype):
    model = language_model(make_model(tmp_path), dtype=dtype)
    monkeypatch.setattr(torch, "compile", lambda layer, dynamic: Wrong(layer, kind))
    assert not compile_if_same(model)
    assert not are_compiled(model)
    assert why in caplog.text


def test_a_recipe_that_says_anything_about_compiling_is_obeyed():
    def leaves_open(**sections) -> bool:
        return _leaves_open_compiling(Recipe.model_validate({**LEAST, **sections}))

    assert leaves_open()
    for value in (True, False):
        assert not leaves_open(student={"model": "s", "compile": value})
        assert not leaves_open(teacher={"model": "t", "compile": value})
    assert not leaves_open(teacher={"model": "t", "offload": "layers"})
