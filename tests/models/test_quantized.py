"""Bases of 4 bits (QLoRA): the student learns on rounded numbers, and what is saved, merged and planned is of them."""

import json
import subprocess
import sys

import pytest
import torch
from support.models import CPU, language_model, make_model
from support.runs import crash_and_resume, recipe, timeless
from transformers import AutoConfig, AutoModelForCausalLM

import kibitz
from kibitz import config
from kibitz.config import FrozenConfig, LocalTeacherConfig, ModelConfig, RecipeError, StudentConfig
from kibitz.engines.torch import TorchEngine
from kibitz.models import offload, quantized
from kibitz.models.load import load_student, load_tokenizer
from kibitz.preflight import budget
from kibitz.preflight.shapes import shape_of
from kibitz.teachers import ScoreRequest
from kibitz.teachers.local import LocalScorer
from kibitz.training import checkpoint
from kibitz.types import Prompt, Sampling

pytest.importorskip("bitsandbytes")

IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 2, 3]])
QLORA = {"lora": {"rank": 4}, "quantize": "nf4"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """64 wide, so that each row of a matrix is a block with a scale of its own."""
    return make_model(tmp_path_factory.mktemp("base"), hidden_size=64, head_dim=16, intermediate_size=128)


def student_of(folder, resumed_from=None, **options):
    section = StudentConfig.model_validate({"model": str(folder), **QLORA, **options})
    return load_student(section, CPU, load_tokenizer(section, "student"), 0, resumed_from)


def disturbed(student):
    """As if it had learnt: B is no longer 0."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in student.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return student


@torch.no_grad()
def logits(model):
    return model.head(model.hidden(IDS)).float()


def nf4(weight):
    """The nearest of the 16 quantiles of QLoRA's appendix E, times the largest number of each 64; scales are not rounded."""
    quantiles = torch.tensor(
        [
            *(-1.0, -0.6961928, -0.5250731, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
            *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.5626170, 0.72295684, 1.0),
        ]
    )
    blocks = weight.reshape(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks / scales)[..., None].sub(quantiles).abs().argmin(-1)
    return (quantiles[nearest] * scales).reshape(weight.shape)


def test_the_matrices_of_the_layers_are_rounded_to_quantiles_and_nothing_else(base):
    plain = AutoModelForCausalLM.from_pretrained(base)
    student = student_of(base)
    assert student.num_parameters - student.num_trainable == plain.num_parameters()
    rounded = quantized.whole(student_base(base))
    for (name, want), (_, got) in zip(plain.named_parameters(), rounded.named_parameters(), strict=True):
        if name.endswith("proj.weight"):
            torch.testing.assert_close(got, nf4(want), rtol=0, atol=0.01 * want.abs().max().item())
            assert not torch.equal(got, want)
        else:
            assert torch.equal(got, want)


def student_base(folder):
    from kibitz.models.load import load_weights

    return load_weights(ModelConfig(model=str(folder)), "student", CPU, **quantized.loading("nf4", torch.float32, CPU))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_merged_and_exported_is_what_was_trained(base, dtype, tmp_path):
    """Not the update on the base's own numbers, which nobody trained: that is off by the rounding."""
    student = disturbed(student_of(base, dtype=dtype))
    student.save(tmp_path / "adapter")
    again = student_of(base, tmp_path / "adapter", dtype=dtype)
    assert torch.equal(logits(again), logits(student))
    read = language_model(tmp_path / "adapter")
    checkpoint.export(str(tmp_path / "adapter"), tmp_path / "merged", merge=True)
    settings = AutoConfig.from_pretrained(tmp_path / "merged")
    assert getattr(settings, "quantization_config", None) is None
    (tmp_path / "adapter" / quantized.RECORD).unlink()
    other = language_model(tmp_path / "adapter")
    rounding = (logits(other) - logits(student)).abs().mean()
    for model in (read, language_model(tmp_path / "merged")):
        assert (logits(model) - logits(student)).abs().mean() < rounding * (1e-3 if dtype == "float32" else 0.2)


def test_engine_and_loss_agree_and_the_base_stays_readable(base):
    student = disturbed(student_of(base))
    prompts = [Prompt((1, 5, 6), "", "a"), Prompt((1, 9), "", "b")]
    rollouts = TorchEngine(student).generate(prompts, Sampling(max_tokens=10, num_samples=2))
    scored = LocalScorer(student, ScoreRequest("sampled")).score(rollouts)
    for rollout, signal in zip(rollouts, scored, strict=True):
        torch.testing.assert_close(signal.logp_T, rollout.logp_T, rtol=0, atol=1e-4)
    with student.adapter_off():
        assert torch.equal(logits(student), logits(student_of(base)))


@pytest.mark.parametrize(
    "teacher",
    [None, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("base", "ema"))],
)
def test_a_run_learns_and_goes_on_to_the_same_bits(base, small_models, teacher, tmp_path):
    sections = {"student": QLORA, "save": {"every": 1}, "steps": 2, "eval": {"heatmaps": 0, "num_prompts": 2}}
    tree = recipe(base, small_models / "teacher", tmp_path / "a", **sections)
    if teacher:
        tree["teacher"] = {"student": teacher, "context": "0+{{ prompt }}"}
    whole = kibitz.train(tree)
    gone_on = crash_and_resume({**tree, "output": str(tmp_path / "b")}, step=1)
    assert timeless(gone_on.metrics) == timeless(whole.metrics)
    assert all(row["grad_norm"] > 0 for row in whole.metrics)
    info = json.loads((whole.folder / "run.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(base).num_parameters()
    assert plain < info["student_params"] < 2 * plain


@pytest.mark.parametrize("how", [None, "body", "layers"])
def test_a_teacher_of_4_bits_says_what_its_rounded_numbers_say(base, how):
    small = offload.load_frozen(FrozenConfig(model=str(base), quantize="nf4", offload=how), "teacher", CPU)
    rounded = language_model(base)
    rounded.model = quantized.whole(student_base(base))
    torch.testing.assert_close(logits(small), logits(rounded), rtol=0, atol=1e-4)
    assert (logits(small) - logits(language_model(base))).abs().max() > 0.01


# ------------------------------------------------------------------ the plan


def tensors_of(model):
    """All that a model holds, scales included."""
    found = {}
    for parameter in [*model.parameters(), *model.buffers()]:
        state = getattr(parameter, "quant_state", None)
        inner = getattr(state, "state2", None)
        more = [
            vars(one).get(name) for one in (state, inner) if one is not None for name in ("absmax", "code", "offset")
        ]
        found |= {id(t): t for t in [parameter, *more] if isinstance(t, torch.Tensor)}
    return found.values()


def test_the_plan_is_what_the_weights_take(tmp_path):
    """Without the quantiles, which each matrix holds once more: 1.1 KB."""
    folder = make_model(tmp_path, hidden_size=256, intermediate_size=512)
    section = StudentConfig.model_validate({"model": str(folder), **QLORA})
    shape = shape_of(section, torch.float32)
    held = sum(tensor.nbytes for tensor in tensors_of(student_base(folder)))
    assert shape.bytes == pytest.approx(held - 14 * 1088, rel=0.002)
    plain = shape_of(ModelConfig(model=str(folder)), torch.float32)
    assert plain.bytes == 4 * plain.num_parameters > 4 * shape.bytes
    asks = config.load(recipe(folder, None, tmp_path / "run", student=QLORA, method={"type": "grpo"}), [])
    assert budget.memory(asks, budget.Models(shape), 20).held["student weights"] == shape.bytes


# ------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({"quantize": "nf4"}, r"an adapter on them can: write lora=\{rank: 32\}"),
        ({**QLORA, "quantize": "int8"}, "nf4"),
        ({**QLORA, "compile": True}, "cannot be compiled"),
    ],
)
def test_what_cannot_learn_is_refused_before_weights_load(student, said, tmp_path):
    with pytest.raises(RecipeError, match=said):
        config.load(recipe(tmp_path / "none", tmp_path / "none", tmp_path / "run", student=student), [])


def test_what_is_missing_or_small_already_is_named(base, tmp_path, monkeypatch):
    student_base(base).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="student.quantize: .* is quantized already: leave it out"):
        quantized.require("nf4", str(tmp_path / "small"), "student")
    disturbed(student_of(base)).save(tmp_path / "adapter")
    path = tmp_path / "adapter" / quantized.RECORD
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "bnb_4bit_quant_type": "fp4"}))
    with pytest.raises(ValueError, match="asks for a quantization that kibitz does not make"):
        language_model(tmp_path / "adapter")
    path.write_text("{}")
    with pytest.raises(ValueError, match="does not say how the adapter's base was quantized"):
        language_model(tmp_path / "adapter")
    path.write_text(json.dumps(settings))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for asks in (lambda: student_of(base), lambda: language_model(tmp_path / "adapter")):
        with pytest.raises(
            ValueError, match=r"nf4 needs bitsandbytes and accelerate: pip install 'kibitz\[bitsandbytes\]'"
        ):
            asks()
    with pytest.raises(ValueError, match="teacher.quantize: nf4 needs"):
        offload.require(LocalTeacherConfig(model=str(base), quantize="nf4"), "teacher")


def test_several_processes_refuse_a_base_of_4_bits(base):
    section = StudentConfig.model_validate({"model": str(base), **QLORA})
    with pytest.raises(RecipeError, match="student.quantize: .* start one process"):
        quantized.refuse_several(section)
    quantized.refuse_several(StudentConfig.model_validate({"model": str(base), "lora": {"rank": 4}}))


def test_nobody_is_told_of_a_kernel_that_is_optional():
    """On processors with AVX512-BF16, wherever bitsandbytes is imported: peft does so for any adapter."""
    program = "import kibitz.models.load, peft, bitsandbytes.backends.cpu.ops as ops; ops.logger.warning('no kernels')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "kernels" not in done.stdout + done.stderr
