"""Frozen models in little memory: offloaded weights, 8-bit weights, hidden states kept in host memory.

There is one device here, so that a fetch changes no address: the host tensors are spoilt and what is fetched is right."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import CPU, make_model, tokenizer
from support.runs import recipe, timeless
from transformers import AutoModelForCausalLM

import kibitz
from kibitz import worlds
from kibitz.batching import pack
from kibitz.config import DataConfig, FrozenConfig, LocalTeacherConfig, RecipeError
from kibitz.data import load_prompts
from kibitz.engines.torch import TorchEngine
from kibitz.losses.criteria import Divergence
from kibitz.methods import token_loss
from kibitz.models import LanguageModel, offload
from kibitz.models.head import Head
from kibitz.models.language_model import Placement
from kibitz.models.load import load_model
from kibitz.signals import Dense, Scored
from kibitz.teachers import ScoreRequest
from kibitz.teachers.local import LocalScorer, reduced
from kibitz.types import Prompt, Rollout, Sampling


def rollouts(num: int = 6) -> list[Rollout]:
    draw = torch.Generator().manual_seed(0)
    made = []
    for i in range(num):
        ids = torch.randint(3, 20, (9 + i,), generator=draw).tolist()
        made.append(Rollout(Prompt(tuple(ids[:4]), "", str(i)), ids[4:], torch.zeros(5 + i), finished=True))
    return made


def hidden_of(model, ask: ScoreRequest = ScoreRequest(tokens_per_micro_batch=32)) -> torch.Tensor:  # noqa: B008  # frozen
    return torch.cat([signal.hidden_TD for signal in LocalScorer(model, ask).score(rollouts())])


# ------------------------------------------------------------------ offloaded weights


class Carrier:
    """Fetches the right numbers while the host tensors are spoilt: a right result was computed with what was fetched."""

    def __init__(self, model):
        self.right = {tensor.data_ptr(): tensor.clone() for tensor in [*model.parameters(), *model.buffers()]}
        self.num_fetched = 0

    def __call__(self, host: torch.Tensor) -> torch.Tensor:
        self.num_fetched += 1
        return self.right[host.data_ptr()].clone()

    @staticmethod
    def spoil(model, num_good: int) -> None:
        """Overwrite all host tensors but the head, which is always resident."""
        spoilt = [p for p in [*model.parameters(), *model.buffers()] if p.is_floating_point()]
        spoilt = [p for p in spoilt if p is not model.lm_head.weight]
        assert len(spoilt) > num_good
        for parameter in spoilt:
            parameter.data.fill_(torch.nan)


@pytest.mark.parametrize("tied", [True, False])
def test_a_body_is_fetched_once_for_all_micro_batches(tmp_path, tied):
    folder = make_model(tmp_path, seed=2, tie_word_embeddings=tied)
    plain = load_model(FrozenConfig(model=str(folder)), "teacher", CPU)
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    carrier = Carrier(model)
    made = offload.offloaded(model, tokenizer(), "teacher", "body", CPU, carrier)
    tensors = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    per_fetch = len(tensors) - 1  # the head is resident; where it is the embedding, that too
    assert carrier.num_fetched == per_fetch
    Carrier.spoil(model, num_good=1)
    assert hidden_of(made).equal(hidden_of(plain))
    assert carrier.num_fetched == 2 * per_fetch  # six rollouts of up to 14 tokens are several micro-batches of 32
    assert not any(p.isfinite().any() for p in model.model.layers.parameters())  # and evicted again
    with pytest.raises(IndexError), made.loaded():
        made.hidden(torch.tensor([[1000]]))
    assert not model.model.norm.weight.isfinite().any()


def test_layers_are_fetched_one_after_another(tmp_path):
    folder = make_model(tmp_path, seed=2, num_hidden_layers=3)
    plain = load_model(FrozenConfig(model=str(folder)), "teacher", CPU)
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    carrier = Carrier(model)
    made = offload.offloaded(model, tokenizer(), "teacher", "layers", CPU, carrier)
    for layer in model.model.layers:
        for parameter in layer.parameters():
            parameter.data.fill_(torch.nan)
    here: list[list[int]] = []

    def look(module, *_):
        sound = [all(p.isfinite().all() for p in layer.parameters()) for layer in model.model.layers]
        here.append([place for place, is_sound in enumerate(sound) if is_sound])

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(look)
    assert hidden_of(made).equal(hidden_of(plain))
    num_passes = len(here) // 3
    assert num_passes > 1 and here == [[0], [1], [2]] * num_passes
    assert not any(p.isfinite().any() for p in model.model.layers.parameters())


def test_a_layer_that_fails_is_evicted(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path)).requires_grad_(False)
    made = offload.offloaded(model, tokenizer(), "teacher", "layers", CPU, Carrier(model))
    layer = model.model.layers[1]
    for parameter in layer.parameters():
        parameter.data.fill_(torch.nan)
    layer.mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.hidden(torch.tensor([[1, 2, 3]]))
    assert not any(p.isfinite().any() for p in layer.parameters())


@pytest.mark.parametrize(
    ("section", "optim"),
    [({"offload": "body"}, {}), ({"offload": "layers"}, {}), ({}, {"hidden_states": "cpu"})],
    ids=["body", "layers", "hidden states"],
)
def test_a_run_is_the_same_bit_for_bit(small_models, tmp_path, section, optim):
    """With a reference that is kept in the same way."""
    method = {"type": "opd", "reference_kl": 0.3, "reference": {"model": str(small_models / "student")}}
    tree = recipe(small_models / "student", small_models / "teacher", tmp_path / "plain", method=method, steps=3)
    plain = kibitz.train(tree)
    tree["teacher"] |= section
    tree["method"]["reference"] |= section
    tree["optim"] |= optim
    run = kibitz.train(tree, [f"output={tmp_path / 'run'}"])
    assert timeless(run.metrics) == timeless(plain.metrics) and timeless(run.evals) == timeless(plain.evals)
    first, second = (load_file(r.checkpoint / "model.safetensors") for r in (plain, run))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------ hidden states in host memory


def test_waiting_states_are_copies_with_the_same_loss_and_gradient(small_models):
    teacher, student = (
        load_model(FrozenConfig(model=str(small_models / name)), name, CPU) for name in ("teacher", "student")
    )
    asks = [ScoreRequest(tokens_per_micro_batch=32, hidden_states=where) for where in ("device", "cpu")]
    signals = [LocalScorer(teacher, ask).score(rollouts()) for ask in asks]
    found = []
    for told in signals:
        batch = pack([Scored.from_signal(r, s) for r, s in zip(rollouts(), told, strict=True)])
        total, values = token_loss(student, batch, Divergence(), 7)
        total.backward()
        grads = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        student.zero_grad()
        found.append((total.detach(), values["loss"], grads))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    whole = [sum(s.hidden_TD.nbytes for s in told) for told in signals]
    assert whole[0] == whole[1] == 4 * 48 * sum(r.num_tokens for r in rollouts())
    held = {s.hidden_TD.untyped_storage().data_ptr(): s.hidden_TD.untyped_storage().nbytes() for s in signals[1]}
    assert sum(held.values()) == whole[1]  # nothing of a micro-batch is kept alive beside them


def test_a_head_brings_its_chunk_to_where_it_stands():
    """Another device that every machine has: `meta`, which computes shapes alone."""
    head = Head(torch.nn.Linear(8, 20, device="meta"), 20)
    waiting = torch.randn(5, 8)
    assert head(waiting).device.type == "meta"
    signal = reduced(Dense(waiting, head), torch.arange(5), ScoreRequest("sampled"), 2)
    assert signal.logp_T.shape == (5,) and signal.logp_T.device.type == "meta"
    assert head.requires_grad_(False)(waiting[:2]).shape == (2, 20)


def test_auto_waits_on_a_gpu_from_a_size_on(small_models, monkeypatch):
    model = load_model(FrozenConfig(model=str(small_models / "teacher")), "teacher", CPU)
    scorer = LocalScorer(model, ScoreRequest(hidden_states="auto"))
    assert not scorer._waits(rollouts())
    on_gpu = LanguageModel(model.model, model.tokenizer, placement=Placement(torch.device("cuda")))
    scorer = LocalScorer(on_gpu, scorer.request)
    size = 4 * 48 * sum(r.num_tokens for r in rollouts())
    for large, waits in ((size - 1, True), (size, False)):
        monkeypatch.setattr("kibitz.teachers.local.LARGE", large)
        assert scorer._waits(rollouts()) == waits
    assert not LocalScorer(on_gpu, replace(scorer.request, hidden_states="device"))._waits(rollouts())


# ------------------------------------------------------------------ weights of 8 bits


def shipped() -> str:
    return str(worlds.get("arithmetic").checkpoint("teacher"))


def rollouts_of(model) -> list[Rollout]:
    prompts = load_prompts(DataConfig(world="arithmetic", limit=16), model.tokenizer, 0, False)
    return TorchEngine(model).generate(prompts, Sampling(max_tokens=24, stop_ids=(model.tokenizer.eos_token_id,)))


@pytest.mark.parametrize("how", [None, "body", "layers"])
def test_eight_bits_are_the_teacher_up_to_rounding(how):
    """On text that it writes itself; and it takes one byte for each number of a layer's matrices."""
    pytest.importorskip("bitsandbytes")
    whole = load_model(FrozenConfig(model=shipped()), "teacher", CPU)
    small = offload.load_frozen(FrozenConfig(model=shipped(), quantize="int8", offload=how), "teacher", CPU)
    matrices = sum(p.numel() for p in whole.model.model.layers.parameters() if p.dim() == 2)
    sizes = [sum(p.nbytes for p in model.model.parameters()) for model in (whole, small)]
    assert sizes[0] - sizes[1] == 3 * matrices
    assert whole.num_parameters == small.num_parameters
    text = rollouts_of(whole)
    logps = [torch.cat([s.logp_T for s in LocalScorer(m, ScoreRequest("sampled")).score(text)]) for m in (whole, small)]
    assert 1e-4 < (logps[0] - logps[1]).abs().mean() < 0.05


def test_a_run_learns_from_eight_bits(small_models, tmp_path):
    pytest.importorskip("bitsandbytes")
    tree = recipe(small_models / "student", small_models / "teacher", tmp_path / "run", steps=2)
    plain = kibitz.train(tree)
    run = kibitz.train(tree, ["teacher.quantize=int8", f"output={tmp_path / 'small'}"])
    gap = run.metrics[0]["reverse_kl"] - plain.metrics[0]["reverse_kl"]
    assert 0 < abs(gap) < 0.1 * plain.metrics[0]["reverse_kl"]
    sizes = [json.loads((r.folder / "run.json").read_text())["teacher_params"] for r in (plain, run)]
    assert sizes[0] == sizes[1]


# ------------------------------------------------------------------ what cannot be


def test_what_cannot_be_is_refused_in_words(small_models, tmp_path, monkeypatch):
    def train(*overrides, **sections):
        kibitz.train(
            recipe(small_models / "student", small_models / "teacher", tmp_path / "run", **sections), overrides
        )

    with pytest.raises(RecipeError, match="cannot be compiled"):
        train("teacher.quantize=int8", "teacher.compile=true")
    for setting in ("quantize=int8", "offload=body"):
        with pytest.raises(RecipeError, match="lets the teacher write, and this one cannot: choose one that can"):
            train(f"teacher.{setting}", method={"type": "sft", "source": "teacher"})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="takes no update: write a whole folder by `kibitz export FOLDER --merge"):
        offload.require(LocalTeacherConfig(model=str(adapter), quantize="int8"), "teacher")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"int8 needs bitsandbytes and accelerate: pip install 'kibitz\[bitsandbytes\]'"
    ):
        train("teacher.quantize=int8")
    assert not Path(tmp_path / "run" / "checkpoints").exists()
