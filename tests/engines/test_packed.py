"""Matrices in a kernel's own layout give the same rollouts, and leave the model as it was."""

import os
import subprocess
import sys

import pytest
import torch
from support.models import bare_model, language_model, random_prompts
from torch import nn
from transformers import GPT2Config, Qwen2Config, Qwen3Config

from kibitz.engines import packed
from kibitz.engines import torch as torch_engine
from kibitz.engines.cache import CachedDecoder, decoder_error
from kibitz.engines.fused import FusedDecoder
from kibitz.engines.packed import KINDS, PackedDecoder, choose, packable
from kibitz.engines.torch import TorchEngine
from kibitz.types import Prompt, Sampling

VOCAB = 50
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
MODELS = {
    "qwen3": Qwen3Config(**SIZES, **HEADS, bos_token_id=None, eos_token_id=None),
    "qwen2": Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}, **HEADS),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


@pytest.fixture(params=sorted(KINDS))
def kind(request, monkeypatch):
    """Every matrix is packed, in this way."""
    monkeypatch.setattr(packed, "LEAST_NUMBERS", 0)
    monkeypatch.setattr(packed, "choose", lambda weight, rows: request.param)
    return request.param


@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_are_those_of_a_plain_forward_pass(kind, name):
    """Rows of unequal progress, one of which leaves; three of them fill a layout of sixteen, two are multiplied plainly."""
    model = bare_model(MODELS[name]).model
    for build in (CachedDecoder, FusedDecoder) if name.startswith("qwen") else (CachedDecoder,):
        decoder = build(model)
        modules = decoder.linears if isinstance(decoder, FusedDecoder) else model.modules
        with torch.no_grad():
            assert decoder_error(PackedDecoder(decoder, lambda: packable(modules())), model, VOCAB) < 1e-5  # noqa: B023


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_engine_writes_to_the_bit_what_an_unpacked_one_writes(kind, name, monkeypatch):
    """Whatever a kind sums in another order is left to the plain product. 40 rows of which all but a few leave early, so that
    layouts for 32, 16 and fewer follow each other."""
    student = bare_model(MODELS[name], std=0.1)
    prompts, sampling = random_prompts([3, 9, 1, 5] * 10, VOCAB), Sampling(max_tokens=20, stop_ids=(1, 2, 3))
    before = {name: list(vars(module)) for name, module in student.model.named_modules()}
    ours = TorchEngine(student).generate(prompts, sampling)
    assert {name: list(vars(module)) for name, module in student.model.named_modules()} == before
    monkeypatch.setattr(packed, "LEAST_NUMBERS", 10**9)
    plain = TorchEngine(student).generate(prompts, sampling)
    assert [r.response_ids for r in ours] == [r.response_ids for r in plain]
    assert all(torch.equal(one.logp_T, other.logp_T) for one, other in zip(ours, plain, strict=True))


def test_new_weights_are_packed_anew(kind):
    """What an optimizer step changed in place is what the next responses are written with."""
    student = bare_model(MODELS["gpt2"])
    engine, prompts = TorchEngine(student), random_prompts([4] * 20, VOCAB)
    engine.generate(prompts, Sampling(max_tokens=4))
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(0.5)
    fresh = TorchEngine(student)
    again, wanted = (one.generate(prompts, Sampling(max_tokens=8, seed=1)) for one in (engine, fresh))
    assert all(torch.equal(a.logp_T, b.logp_T) for a, b in zip(again, wanted, strict=True))


def test_a_kind_that_gives_other_numbers_is_not_chosen(monkeypatch):
    """However fast it is."""
    monkeypatch.setattr(packed, "_chosen", {})
    monkeypatch.setattr(packed, "KINDS", {"wrong": lambda weight, bias, rows: lambda x_ND: x_ND[:, :1].expand(-1, 512)})
    assert choose(torch.randn(512, 256), 16) is None


def test_only_large_float32_matrices_are_packed():
    modules = [nn.Linear(512, 512), nn.Linear(8, 8), nn.Linear(512, 512).bfloat16(), nn.LayerNorm(512)]
    assert list(packable(modules)) == modules[:1]


# ------------------------------------------------------------------ memory that was freed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_what_was_freed_goes_back_to_the_system():
    """Blocks of a heap, each followed by a little that stays, so that freeing alone gives nothing back."""
    program = """
import torch
from pathlib import Path
from kibitz.types import give_back_freed

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

blocks = [(torch.ones(2**18), torch.ones(8)) for _ in range(200)]
kept = [small for _, small in blocks]
del blocks
before = resident()
give_back_freed()
print((before - resident()) // 2**20)
"""
    heap = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **heap}, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 150


@pytest.mark.parametrize(("large", "times"), [(1, 2), (2**40, 0)])
def test_room_is_given_back_around_the_rollouts_of_a_large_model(small_models, monkeypatch, large, times):
    given = []
    monkeypatch.setattr(torch_engine, "LARGE", large)
    monkeypatch.setattr(torch_engine, "give_back_freed", lambda: given.append(1))
    model = language_model(small_models / "student")
    torch_engine.TorchEngine(model).generate([Prompt((2, 3), "", "key")], Sampling(max_tokens=2))
    assert len(given) == times
