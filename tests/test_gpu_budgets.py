"""What a step asks of a GPU, counted without one: kernels, waits of the host, bytes kept. A budget that grows fails here.

Kernels are operations that compute or copy; views are free. Numbers are those of Qwen3, whose shapes the meta device has."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import make_model
from support.pretended import Clock, Module, gpu, pretended
from support.runs import recipe
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen3Config

from kibitz.batching import pack
from kibitz.config import ModelConfig, Recipe
from kibitz.engines.cache import CachedDecoder
from kibitz.engines.room import cache_bytes, rows_that_fit
from kibitz.engines.sampling import sample
from kibitz.engines.torch import TorchEngine
from kibitz.losses.checks import together
from kibitz.losses.chunked import over_chunks
from kibitz.losses.criteria import Divergence, PolicyGradient
from kibitz.losses.divergences import jsd
from kibitz.models.head import keep_float32
from kibitz.models.kept import kept_bytes_per_token
from kibitz.models.load import load_model, straight_to
from kibitz.preflight.shapes import Shape
from kibitz.signals import Dense, Scored, Tokens
from kibitz.teachers import ScoreRequest
from kibitz.teachers.local import local_teacher
from kibitz.training.memory import DeviceClock
from kibitz.training.room import Room
from kibitz.training.setup import prepare
from kibitz.training.trainer import NullProgress, Trainer
from kibitz.types import Prompt, Sampling

SHAPE_8B = {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8}
FREE = {"empty", "empty_strided", "detach", "alias", "lift_fresh", "_unsafe_view"}


class Kernels(TorchDispatchMode):
    """Counts the operations that a GPU would start a kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name not in FREE and not func.is_view:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def number(self) -> int:
        return sum(self.names.values())


def on_meta(num_layers: int) -> Any:
    config = Qwen3Config(vocab_size=151_936, head_dim=128, num_hidden_layers=num_layers, **SHAPE_8B)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def kernels_of_a_token(num_layers: int, sampling: Sampling) -> int:
    """One step of the engine with 256 rows: the model, and the draw."""
    model = on_meta(num_layers)
    decoder = CachedDecoder(model)
    with torch.no_grad(), torch.device("meta"):
        decoder.start(256, 512)
        token_N, position_N = torch.zeros(256, dtype=torch.long), torch.zeros(256, dtype=torch.long)
        decoder.step(token_N, position_N, 300)  # allocates keys and values
        with Kernels() as kernels:
            logits_NV = decoder.step(token_N, position_N, 300)
            sample(logits_NV, torch.zeros(256, dtype=torch.float64), sampling)
    return kernels.number


def test_kernels_of_a_decoded_token(monkeypatch):
    """Each layer of Qwen3 as transformers writes it, and all else: embedding, angles, mask, head, the draw. Attention is one
    kernel on a GPU, and on meta a dozen."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, key, value, **options: query + 0)
    two, three = (kernels_of_a_token(layers, Sampling()) for layers in (2, 3))
    assert three - two <= 57
    assert two - 2 * (three - two) <= 45


def test_the_draw_sorts_no_vocabulary():
    model_like = torch.zeros(256, 151_669, device="meta")
    # whether the likeliest are enough is a number, and there are none on meta
    with torch.no_grad(), Kernels() as kernels, suppress(RuntimeError):
        sample(model_like, torch.zeros(256, dtype=torch.float64, device="meta"), Sampling(top_p=0.9))
    assert kernels.names["topk"] == 1
    assert not kernels.names.keys() & {"sort", "argsort"}


def test_bytes_kept_for_the_backward_pass():
    """Of each token in each layer of Qwen3-8B, without recomputation: 242 KB, and nothing that grows with the layers before."""
    two, three, four = (Shape(on_meta(layers)).activation_bytes_per_token for layers in (2, 3, 4))
    assert three - two == four - three
    assert three - two <= 242_000


# ------------------------------------------------------------------ waits of the host


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Student and teacher of one layer, in bfloat16 on the device."""
    home = tmp_path_factory.mktemp("budgets")
    folders = [make_model(home / str(seed), seed, num_hidden_layers=1) for seed in range(2)]

    def load() -> list[Any]:
        return [load_model(ModelConfig(model=str(folder)), "model", gpu()) for folder in folders]

    return load


PROMPTS = [Prompt((1, 5, 6), "", "a"), Prompt((1, 7), "", "b")]


def waits_of_tokens(engine: TorchEngine, tokens: int) -> int:
    with pretended() as counts:
        engine.generate(PROMPTS, Sampling(max_tokens=tokens))
    return sum(counts.waits.values())


def test_the_host_waits_once_a_token(pair):
    """For whether a row is done."""
    with pretended():
        engine = TorchEngine(pair()[0])
        engine.generate(PROMPTS, Sampling(max_tokens=3))
    assert waits_of_tokens(engine, 9) - waits_of_tokens(engine, 5) == 4


CRITERIA = {
    "exact": (Divergence(), "dense"),
    "top k of both": (Divergence(support="union", top_k=4), "dense"),
    "top k sent": (Divergence(support="teacher", top_k=4), "top_k"),
    "sampled": (PolicyGradient(), "sampled"),
}


def waits_of_a_loss(pair, name: str, chunk: int) -> int:
    criterion, kind = CRITERIA[name]
    with pretended() as counts:
        student, other = pair()
        rollouts = TorchEngine(student).generate(PROMPTS, Sampling(max_tokens=16))
        signals = local_teacher(other).scorer(ScoreRequest(kind, top_k=4)).score(rollouts)
        batch = pack([Scored(r, r.weight_T(), s) for r, s in zip(rollouts, signals, strict=True)], gpu())
        counts.waits.clear()
        student(batch, lambda hidden_TD, head: over_chunks(criterion, hidden_TD, head, batch.tokens, chunk))
    return counts.of("losses/")


@pytest.mark.parametrize("name", CRITERIA)
def test_the_host_waits_once_a_micro_batch_for_the_loss(pair, name):
    """Not for each chunk: a step of 256 x 1,024 tokens has more than a thousand."""
    assert [waits_of_a_loss(pair, name, chunk) for chunk in (2, 32)] == [1, 1]


# ------------------------------------------------------------------ memory, precision, time


def test_rows_are_as_many_as_fit_and_rollouts_are_the_same(pair, monkeypatch):
    with pretended():
        student = pair()[0]
        wanted = TorchEngine(student).generate(PROMPTS, Sampling(max_tokens=9, num_samples=3))
        a_row = 12 * cache_bytes(student.model) + 32 * student.vocab_size
        monkeypatch.setattr(Module, "memory", (int(2.5 * a_row / 0.8), 80 * 2**30))
        assert rows_that_fit(student.model, gpu(), 12, student.vocab_size) == 2
        engine = TorchEngine(student)
        decoder = engine.decoder()
        begun, start = [], decoder.start
        monkeypatch.setattr(decoder, "start", lambda rows, slots: (begun.append(rows), start(rows, slots)))
        rollouts = engine.generate(PROMPTS, Sampling(max_tokens=9, num_samples=3))
    assert begun == [2]
    assert [r.response_ids for r in rollouts] == [r.response_ids for r in wanted]
    assert rows_that_fit(student.model, torch.device("cpu"), 12, 20) is None


def test_keys_and_values_take_what_the_cache_allocates():
    model = on_meta(2)
    decoder = CachedDecoder(model)
    with torch.no_grad(), torch.device("meta"):
        decoder.start(3, 40)
        decoder.step(torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long), 1)
    held = sum(buffer.nbytes for pair in decoder.cache.buffers.values() for buffer in pair)
    assert held == 3 * 40 * cache_bytes(model)


def test_logits_are_float32_on_a_gpu_and_their_gradients_those_of_the_product():
    """bfloat16 has steps of 0.125 between 16 and 32."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((5, 3, 16), (40, 16)))
    want = (16 * hidden.double()) @ weight.double().t()
    layer = torch.nn.Linear(16, 40, bias=False, dtype=torch.bfloat16)
    keep_float32(layer)
    with torch.no_grad():
        layer.weight.copy_(weight)
        assert layer(hidden).dtype == torch.bfloat16  # on the CPU as ever
    with pretended():
        layer.to(gpu())
        there = (16 * hidden).to(gpu()).requires_grad_()
        logits = layer(there)
        (logits.float() ** 2 / 2).sum().backward()
        assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.held.double(), want, rtol=1e-6, atol=1e-5)
    assert (logits.held.bfloat16().double() - want).abs().max() > 0.05
    torch.testing.assert_close(there.grad.held.double(), want @ weight.double(), rtol=2e-2, atol=1.0)
    want_weight = want.flatten(0, 1).t() @ (16 * hidden.double()).flatten(0, 1)
    torch.testing.assert_close(layer.weight.grad.held.double(), want_weight, rtol=2e-2, atol=30.0)


def test_phases_are_timed_by_events_of_the_device():
    """The pretended clock ticks once for each event that is recorded, a millisecond apart."""
    with pretended():
        clock = DeviceClock(gpu())
        start, end = clock.now(), clock.now()
        assert isinstance(start, Clock)
        assert clock.seconds(start, end) == pytest.approx(0.001)


def test_weights_are_loaded_straight_to_a_gpu_only():
    with pretended():
        assert straight_to(gpu()) == {"device_map": {"": torch.device("gpu", 0)}}
    assert straight_to(torch.device("cpu")) == {}


# ------------------------------------------------------------------ what a recipe leaves open


GIB = 2**30
ROOM = Room(40.0 * GIB, per_token=3.4e6, recomputed_per_token=0.24e6, per_logits=40.0 * 151_669)  # Qwen3-1.7B


def test_a_micro_batch_takes_what_is_free():
    """Counted in bytes: logits and activations together are below the share that may be filled."""
    for gib in (2, 5, 12, 24, 40, 70, 130):
        room = replace(ROOM, free=float(gib * GIB))
        chosen = room.choose(16384, 1224, {})
        per_token = room.recomputed_per_token if chosen["checkpointing"] else room.per_token
        held = chosen["chunk_tokens"] * room.per_logits + chosen["tokens_per_micro_batch"] * per_token
        assert held <= 0.8 * gib * GIB
        assert chosen["checkpointing"] is (gib < 24)
    assert ROOM.choose(16384, 1224, {}) == {
        "tokens_per_micro_batch": 7580,
        "chunk_tokens": 1415,
        "checkpointing": False,
    }
    assert replace(ROOM, free=140.0 * GIB).choose(16384, 1224, {})["tokens_per_micro_batch"] == 16384
    assert ROOM.choose(16384, 12_000, {})["checkpointing"] is True  # one rollout would not fit


def test_what_a_recipe_sets_is_kept():
    given = {"tokens_per_micro_batch": 999_999, "chunk_tokens": 7, "checkpointing": False}
    assert ROOM.choose(999_999, 1224, given) == given
    assert ROOM.choose(16384, 1224, {"checkpointing": True})["tokens_per_micro_batch"] == 16384
    assert replace(ROOM, free=-1.0).choose(16384, 1224, {})["tokens_per_micro_batch"] == 1  # torch says what is lacking


def fitted_recipe(tree: dict[str, Any], memory: int, monkeypatch) -> Recipe:
    monkeypatch.setattr(Module, "memory", (memory, 80 * GIB))
    with pretended():
        setup = prepare(tree)
        setup.folder.lock.release()
        setup.close()
    return setup.parts.recipe


def test_a_run_is_cut_for_its_gpu(tmp_path, monkeypatch):
    """On a small one a micro-batch has fewer tokens, and activations are recomputed; a setting wins; a CPU has the defaults."""
    make_model(tmp_path / "model", 0, num_hidden_layers=2)
    tree = recipe(tmp_path / "model", None, tmp_path / "run", method={"type": "sft"}, device="gpu")
    large = fitted_recipe(tree, 60 * GIB, monkeypatch).optim
    assert (large.tokens_per_micro_batch, large.chunk_tokens, large.checkpointing) == (16384, 2048, False)
    small = fitted_recipe({**tree, "output": str(tmp_path / "2")}, 5_000_000, monkeypatch).optim
    assert 100 < small.tokens_per_micro_batch < 16384
    assert small.checkpointing
    own = {"tokens_per_micro_batch": 16384, "chunk_tokens": 5, "checkpointing": False}
    sections = {**tree, "output": str(tmp_path / "3"), "optim": own}
    assert fitted_recipe(sections, 5_000_000, monkeypatch).optim.model_dump(include={*own}) == own
    setup = prepare({**tree, "output": str(tmp_path / "4"), "device": "cpu"})
    assert setup.parts.recipe.optim.model_dump(include={*own}) == {**own, "chunk_tokens": None}
    setup.folder.lock.release()


def test_a_step_on_a_small_gpu_gives_the_same_numbers(tmp_path, monkeypatch):
    make_model(tmp_path / "model", 0, num_hidden_layers=2)
    make_model(tmp_path / "teacher", 1, num_hidden_layers=1)
    rows = []
    for name, memory in (("large", 60 * GIB), ("small", 5_000_000)):
        monkeypatch.setattr(Module, "memory", (memory, 80 * GIB))
        rollout = {"prompts_per_step": 4, "max_tokens": 20}
        tree = recipe(
            tmp_path / "model", tmp_path / "teacher", tmp_path / name, device="gpu", rollout=rollout, threads=1
        )
        with pretended():
            trainer = Trainer(prepare(tree), NullProgress())
            trainer.step()
            trainer.folder.lock.release()
        rows.append(trainer.folder.metrics.read()[0])
    for name in ("loss", "grad_norm", "reverse_kl", "num_tokens"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=1e-3)


def test_what_is_kept_on_the_device_is_what_is_counted_on_meta(pair):
    """And what the plain attention, which is the pretended device's, keeps besides."""
    with pretended():
        student = pair()[0]
        on_device = kept_bytes_per_token(student.model, student.hidden, gpu())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(student.model.config, dtype=torch.bfloat16)
    assert 1.0 <= on_device / Shape(model).activation_bytes_per_token <= 1.5


def passes_over_the_vocabulary(criterion: Divergence, every: int) -> float:
    """In whole tensors `[1024, V]` that operations without gradients and the loss write."""
    tokens, vocab = 1024, 151_669
    with torch.device("meta"):
        logits_CV = torch.zeros(tokens, vocab, requires_grad=True)
        head = torch.nn.Linear(8, vocab, bias=False)
        signal = Dense(torch.zeros(tokens, 8), head)
        told = Tokens(
            torch.zeros(tokens, dtype=torch.long), torch.ones(tokens), torch.zeros(tokens), signal, every=every
        )
        with Written() as written, together_unchecked():
            criterion(logits_CV, told)
    return written.numbers / (tokens * vocab)


class Written(TorchDispatchMode):
    """Counts the numbers that operations write, views left out."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and isinstance(out, torch.Tensor):
            self.numbers += out.numel()
        return out


@contextmanager
def together_unchecked() -> Iterator[None]:
    """Numbers on meta cannot be checked."""
    with suppress(RuntimeError), together():
        yield


def test_metrics_cost_little_beside_the_loss():
    """Forward, in tensors [chunk, V]: nine for the loss. Metrics of all tokens write four more, and read twice for the largest;
    those of each eighth write half a one. Where the loss is another, its reverse KL costs six more."""
    whole, some, loss = (passes_over_the_vocabulary(Divergence(), every) for every in (1, 8, 1024))
    assert loss <= 9.1
    assert whole - loss <= 4.1
    assert some - loss <= 0.55
    whole, some, loss = (passes_over_the_vocabulary(Divergence(jsd), every) for every in (1, 8, 1024))
    assert 9.0 < whole - loss <= 10.1
    assert some - loss <= 1.3
