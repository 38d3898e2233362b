"""Products in bfloat16: rollouts of a rounded student, whose log-probabilities are its own, and a model left as it was."""

import copy
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.models import bare_model, full_logp, of_written, random_prompts
from torch import nn
from transformers import GPT2Config, LlamaConfig, Qwen3Config

from kibitz.config import ModelConfig, Recipe
from kibitz.engines import packed, rounded
from kibitz.engines.torch import TorchEngine
from kibitz.preflight import speed
from kibitz.types import Sampling

VOCAB = 50
SIZES = {"vocab_size": VOCAB, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
MODELS = {
    "llama": LlamaConfig(**SIZES, hidden_size=32, intermediate_size=48, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SIZES, hidden_size=32, intermediate_size=48, num_key_value_heads=2, head_dim=8),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Every matrix is large enough, and no processor too slow."""
    monkeypatch.setattr(packed, "LEAST_NUMBERS", 0)
    monkeypatch.setattr(rounded, "bfloat16_gain", lambda: 2.0)


class Rounding(nn.Module):
    """A layer that rounds all that it multiplies, and the product."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = (x.bfloat16().double() @ self.linear.weight.bfloat16().double().T).bfloat16().float()
        return product if self.linear.bias is None else product + self.linear.bias


def with_rounding(student):
    """A copy of a student whose every layer is such a one."""
    other = copy.deepcopy(student)
    linears = [
        (one, name) for one in other.model.modules() for name, part in one.named_children() if type(part) is nn.Linear
    ]
    for parent, name in linears:
        setattr(parent, name, Rounding(getattr(parent, name)))
    return other


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("most", [10**9, 0], ids=["fused", "cached"])
def test_log_probabilities_are_those_of_a_student_that_is_rounded(name, most, monkeypatch):
    """The fused decoder multiplies by other matrices, with norms in them, and is off by as much in other places."""
    monkeypatch.setattr("kibitz.engines.fused.MAX_PARAMETERS", most)
    student, prompts = bare_model(MODELS[name], std=0.3), random_prompts([3, 9, 1, 5], VOCAB)
    rollouts = TorchEngine(student, rounded=True).generate(prompts, Sampling(max_tokens=12))
    assert rollouts[0].logp_T.dtype == torch.float32

    def gap(reader) -> float:
        told = [of_written(full_logp(reader, one), one) for one in rollouts]
        return torch.cat([(a - b.logp_T).abs() for a, b in zip(told, rollouts, strict=True)]).mean().item()

    exact = gap(student)
    assert 1e-3 < exact < 0.1
    if most == 0 and name != "gpt2":  # whose layers are no nn.Linear, but for the head
        assert gap(with_rounding(student)) < exact / 3


@pytest.mark.parametrize("name", MODELS)
def test_a_rollout_is_the_same_in_any_company_and_the_model_stays_as_it_was(name):
    student = bare_model(MODELS[name], std=0.1)
    before = {name: list(vars(module)) for name, module in student.model.named_modules()}
    prompts, sampling = random_prompts([3, 9, 1, 5] * 5, VOCAB), Sampling(max_tokens=16, stop_ids=(1, 2, 3))
    together = TorchEngine(student, rounded=True).generate(prompts, sampling)
    alone = [TorchEngine(student, rounded=True).generate([prompt], sampling)[0] for prompt in prompts]
    assert {name: list(vars(module)) for name, module in student.model.named_modules()} == before
    same = [one.response_ids == other.response_ids for one, other in zip(together, alone, strict=True)]
    assert sum(same) >= len(same) - 2, "a last bit of bfloat16 may turn a token"


def test_new_weights_are_rounded_anew():
    student = bare_model(MODELS["llama"], std=0.3)
    engine, prompts = TorchEngine(student, rounded=True), random_prompts([4] * 3, VOCAB)
    engine.generate(prompts, Sampling(max_tokens=4))
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(0.5)
    again, wanted = (
        one.generate(prompts, Sampling(max_tokens=8, seed=1)) for one in (engine, TorchEngine(student, rounded=True))
    )
    assert all(torch.equal(a.logp_T, b.logp_T) for a, b in zip(again, wanted, strict=True))


def test_a_kernel_that_is_broken_is_refused(monkeypatch):
    monkeypatch.setattr(rounded._Rounded, "__call__", lambda self, x: self.plain(x).neg())
    with pytest.raises(ValueError, match=r"logits are off by \d+% of their spread: write rollout.dtype=same"):
        TorchEngine(bare_model(MODELS["llama"], std=0.3), rounded=True).generate(
            random_prompts([3], VOCAB), Sampling(max_tokens=2)
        )


def test_a_student_in_bfloat16_is_refused_and_a_slow_processor_warned_of(monkeypatch):
    student = bare_model(MODELS["llama"])
    student.model.bfloat16()
    with pytest.raises(ValueError, match=r"for a float32 student on a CPU.*write rollout.dtype=same"):
        TorchEngine(student, rounded=True)
    monkeypatch.setattr(rounded, "bfloat16_gain", lambda: 0.13)
    with pytest.warns(UserWarning, match=r"in bfloat16 0.1 times as fast.*write rollout.dtype=same"):
        TorchEngine(bare_model(MODELS["llama"]), rounded=True)


def test_the_gain_is_measured_and_positive():
    program = "from kibitz.engines.rounded import bfloat16_gain; print(bfloat16_gain())"
    assert float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout) > 0


# ------------------------------------------------------------------ recipes, and what `kibitz check` says


TREE = {"student": {"model": "a"}, "teacher": {"model": "b"}, "data": {"prompts": "x"}, "output": "o"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rollout": {"engine": "vllm"}}, "servers write in the dtype that they are started with: drop it"),
        ({"method": {"type": "skd"}}, "method skd writes with student and teacher together"),
        ({"method": {"type": "minillm"}}, "method minillm writes with student and teacher together"),
    ],
)
def test_who_does_not_write_with_the_embedded_engine_cannot_be_rounded(changes, says):
    rollout = {"dtype": "bfloat16"} | changes.get("rollout", {})
    with pytest.raises(ValueError, match=re.escape(says)):
        Recipe.model_validate(TREE | changes | {"rollout": rollout})


def shape(dtype: str = "auto", num: int = 10**8):
    return SimpleNamespace(section=ModelConfig(model="a", dtype=dtype), num_parameters=num)


PLAIN, ROUNDED, SMALL = shape(), shape("bfloat16"), shape(num=10**6)
BOTH = "here: teacher.dtype=bfloat16 and rollout.dtype=bfloat16 would save time"


@pytest.mark.parametrize(
    ("gain", "changes", "shapes", "light", "says"),
    [
        (4.6, {}, [PLAIN, PLAIN], "green", f"4.6 times as fast as in float32 {BOTH}"),
        (4.6, {}, [SMALL, PLAIN], "green", "here: teacher.dtype=bfloat16 would"),
        (4.6, {"method": {"type": "skd"}}, [PLAIN, PLAIN], "green", "here: teacher.dtype=bfloat16 would"),
        (4.6, {"rollout": {"dtype": "bfloat16"}}, [PLAIN, ROUNDED], None, ""),
        (4.6, {"rollout": {"engine": "vllm"}}, [PLAIN, ROUNDED], None, ""),
        (4.6, {}, [ROUNDED, ROUNDED], None, ""),
        (4.6, {}, [SMALL, SMALL], None, ""),
        (1.2, {}, [PLAIN, PLAIN], None, ""),
        (0.1, {}, [PLAIN, PLAIN], None, ""),
        (0.1, {"rollout": {"dtype": "bfloat16"}}, [PLAIN, ROUNDED], "amber", "drop teacher.dtype and rollout.dtype"),
        (0.1, {"rollout": {"dtype": "bfloat16"}}, [SMALL, SMALL], "amber", "here: drop rollout.dtype"),
        (0.1, {}, [ROUNDED, SMALL], "amber", "0.1 times as fast as in float32 here: drop student.dtype"),
    ],
)
def test_kibitz_check_says_what_bfloat16_would_save_or_costs(monkeypatch, gain, changes, shapes, light, says):
    monkeypatch.setattr(speed, "bfloat16_gain", lambda: gain)
    found = list(speed.rounding(Recipe.model_validate(TREE | changes), shapes))
    if light is None:
        assert not found
    else:
        (finding,) = found
        assert finding.light == light and says in finding.text and finding.numbers == {"gain": gain}
