"""LoRA: the student starts as its base, only adapters learn, and what is saved is what was trained."""

import json
import math
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.models import CPU, language_model, make_model
from support.runs import recipe
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import kibitz
from kibitz.batching import pack
from kibitz.cli import app
from kibitz.config import ModelConfig, RecipeError, StudentConfig, load
from kibitz.engines.torch import TorchEngine
from kibitz.losses.chunked import over_chunks
from kibitz.losses.criteria import CrossEntropy
from kibitz.models import lora
from kibitz.models.load import load_student, load_tokenizer
from kibitz.signals import Scored
from kibitz.training import checkpoint
from kibitz.training.setup import prepare
from kibitz.types import Prompt, Sampling

# Of peft alone, where the tests use it as others do; kibitz has to load it without one.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 2, 3]])
KINDS = {"qwen3": {"tie_word_embeddings": True}, "llama": {"tie_word_embeddings": False}}


def student_of(folder, resumed_from=None, seed=0, **options):
    config = StudentConfig.model_validate({"model": str(folder), "lora": {"rank": 4, **options}})
    return load_student(config, CPU, load_tokenizer(config, "student"), seed, resumed_from)


def disturb(student, seed=0):
    """As if it had learnt: B is no longer 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in student.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return student


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@torch.no_grad()
def seen_by_the_loss(student):
    return student.head(student.hidden(IDS))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_student_is_its_base(kind, tmp_path):
    folder = make_model(tmp_path, kind=kind, **KINDS[kind])
    base = language_model(folder)
    student = student_of(folder)
    assert torch.equal(seen_by_the_loss(student), seen_by_the_loss(base))
    disturb(student)
    assert (seen_by_the_loss(student) - seen_by_the_loss(base)).abs().max() > 0.1
    with student.adapter_off():
        assert torch.equal(seen_by_the_loss(student), seen_by_the_loss(base))
    assert (seen_by_the_loss(student) - seen_by_the_loss(base)).abs().max() > 0.1
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in student.model.named_parameters())


@pytest.mark.parametrize(
    ("student", "teacher", "allowed"),
    [("bfloat16", "bfloat16", True), ("bfloat16", "float32", False), ("float32", "float32", False)],
)
def test_a_gpu_may_multiply_the_halves_in_tf32_where_all_else_is_less_precise(
    models, tmp_path, student, teacher, allowed
):
    """And only while the run lasts: torch has one setting for all runs of a process."""
    matmul = torch.backends.cuda.matmul
    assert matmul.allow_tf32 is False
    sections = recipe(*models, tmp_path, student={"lora": {"rank": 2}, "dtype": student}, teacher={"dtype": teacher})
    setup = prepare(sections)
    assert matmul.allow_tf32 is allowed
    setup.close()
    assert matmul.allow_tf32 is False


def test_all_linear_is_every_matrix_but_the_head(tmp_path):
    """2 layers of q, k, v, o, gate, up, down; each adds rank x (in + out)."""
    student = student_of(make_model(tmp_path), rank=3)
    sizes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert student.num_trainable == 2 * sum(3 * (a + b) for a, b in sizes)
    assert student.num_parameters > 5 * student.num_trainable


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / math.sqrt(4))])
def test_scale_of_the_update(rslora, scale, tmp_path):
    """W + s B A by hand in one matrix equals what the adapted layer computes."""
    student = disturb(student_of(make_model(tmp_path), rank=4, alpha=8, rslora=rslora))
    layer = student.model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    matrix = layer.base_layer.weight + scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer(x), x @ matrix.T, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_nothing_warns(tmp_path):
    student = student_of(make_model(tmp_path / "base"))
    student.save(tmp_path / "adapter")
    again = language_model(tmp_path / "adapter")
    assert torch.equal(seen_by_the_loss(again), seen_by_the_loss(student))


def test_seeds_decide_the_adapter(tmp_path):
    folder = make_model(tmp_path)

    def first(seed):
        return next(p for name, p in student_of(folder, seed=seed).model.named_parameters() if "lora_A" in name)

    state = torch.random.get_rng_state()
    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"], ["lm_head"]])
def test_the_engine_samples_from_the_adapted_student(targets, tmp_path):
    """Its log-probabilities are the trainer's; an adapter on the head alone must not be overlooked by a fast path."""
    student = student_of(make_model(tmp_path, kind="llama"), targets=targets)
    engine = TorchEngine(student)
    sampling = Sampling(max_tokens=10, num_samples=3, seed=1)
    prompts = [Prompt((1, 5, 6), "", "a"), Prompt((1, 9), "", "b")]
    engine.generate(prompts, sampling)  # the decoder is chosen while B is still 0
    disturb(student)
    engine.sync(student)
    scored = [Scored(r, r.weight_T()) for r in engine.generate(prompts, sampling)]
    batch = pack(scored)
    with torch.no_grad():
        _, values = student(batch, lambda hidden_TD, head: over_chunks(CrossEntropy(), hidden_TD, head, batch.tokens))
    torch.testing.assert_close(values["student_logp"], batch.tokens.logp_T, rtol=0, atol=1e-5)


def test_the_base_as_its_own_teacher_keeps_its_head(tmp_path):
    """Signals keep the head for later, when the adapter is on again."""
    student = disturb(student_of(make_model(tmp_path, kind="llama"), targets=["lm_head"]))
    with student.adapter_off():
        head, hidden = student.head, student.hidden(IDS)
    base = language_model(tmp_path)
    assert torch.equal(head(hidden), seen_by_the_loss(base))
    assert not torch.allclose(student.head(hidden), head(hidden))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rslora", [False, True])
def test_saved_and_merged_students_are_the_trained_one(kind, rslora, tmp_path, monkeypatch):
    """In plain peft from any folder, in plain transformers after merging, and read by kibitz either way."""
    folder = make_model(tmp_path / "base", kind=kind, **KINDS[kind])
    monkeypatch.chdir(tmp_path)
    student = disturb(student_of("base", rslora=rslora))
    want = logits(student.model)
    student.save(tmp_path / "adapter")
    monkeypatch.chdir("/")
    alone = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    torch.testing.assert_close(logits(alone), want, rtol=0, atol=1e-5)
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(found), want, rtol=0, atol=1e-5)
    checkpoint.export(str(tmp_path / "adapter"), tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), want, rtol=0, atol=1e-4)  # each merged weight is rounded once more
    assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    assert not lora.is_adapter(tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == student.tokenizer.get_vocab()
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template == student.tokenizer.chat_template
    for name in ("adapter", "merged"):
        read = language_model(tmp_path / name, "teacher")
        assert read.adapter is None
        torch.testing.assert_close(logits(read.model), want, rtol=0, atol=1e-4)


def test_bfloat16_bases_are_merged_with_one_rounding(tmp_path):
    folder = make_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    student = disturb(student_of(folder))
    student.save(tmp_path / "adapter")
    checkpoint.export(str(tmp_path / "adapter"), tmp_path / "merged", merge=True)
    merged = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    layer = student.model.model.layers[0].self_attn.q_proj
    want = layer.base_layer.weight + 8.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.equal(merged, want.detach().bfloat16())


def run(small_models, output, resume=False, **sections):
    settings = {"optim": {"lr": 1e-2, "schedule": "constant"}, "save": {"every": 2}, **sections}
    plain = recipe(small_models / "student", small_models / "teacher", output, **settings)
    return kibitz.train(plain, ["student.lora.rank=4"], resume=resume)


def test_a_run_learns_with_adapters_alone(small_models, tmp_path):
    """And a run that goes on ends with the same bits as one that never stopped."""
    whole = run(small_models, tmp_path / "whole")
    assert whole.metrics[-1]["loss"] < whole.metrics[0]["loss"]
    assert json.loads((whole.folder / "run.json").read_text())["trainable_params"] == 4 * 2 * (64 * 2 + 48 * 2 + 96 * 3)
    run(small_models, tmp_path / "parts", steps=2)
    again = run(small_models, tmp_path / "parts", resume=True)
    for name in (lora.WEIGHTS, "training/optimizer.safetensors"):
        ours, theirs = load_file(whole.checkpoint / name), load_file(again.checkpoint / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [row["loss"] for row in whole.metrics] == [row["loss"] for row in again.metrics]
    student = student_of(small_models / "student", again.checkpoint)
    base = language_model(small_models / "student")
    with student.adapter_off():
        assert torch.equal(seen_by_the_loss(student), seen_by_the_loss(base))


def test_the_command_line_exports_and_evaluates(small_models, tmp_path):
    done = run(small_models, tmp_path / "run", steps=2)

    def kibitz_says(*line):
        answer = CliRunner().invoke(app, ["--json", *map(str, line)])
        return answer.exit_code, answer.stdout + answer.stderr

    assert kibitz_says("export", done.folder, "--merge", "--output", tmp_path / "merged")[0] == 0
    assert kibitz_says("export", done.folder, "--output", tmp_path / "adapter")[0] == 0
    assert not (tmp_path / "adapter" / "training").exists() and lora.is_adapter(tmp_path / "adapter")
    rows = []
    for model in (done.folder, tmp_path / "merged"):
        code, text = kibitz_says("eval", model, "--world", "arithmetic", "eval.num_prompts=8", "rollout.max_tokens=12")
        assert code == 0, text
        rows.append(json.loads(text)["response_tokens"])
    assert rows[0] == rows[1]
    code, text = kibitz_says("export", tmp_path / "merged", "--merge", "--output", tmp_path / "more")
    assert code == 2 and "leave out --merge" in text
    code, text = kibitz_says("export", done.folder, "--output", tmp_path / "adapter")
    assert code == 2 and "is there already" in text


def test_what_cannot_be_is_refused_in_words(small_models, tmp_path, monkeypatch):
    base = {"student": {"model": "m", "lora": {"rank": 4}}, "data": {"world": "arithmetic"}, "method": {"type": "grpo"}}
    with pytest.raises(RecipeError, match=r"student\.lora: dropout would make the student disagree"):
        load(base, ["student.lora.dropout=0.1"])
    with pytest.raises(RecipeError, match="nothing would learn"):
        load(base, ["student.lora.targets=[]"])
    with pytest.raises(ValueError, match=r"student\.lora\.targets: .*q_porj"):
        student_of(small_models / "student", targets=["q_porj"])
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head shares its matrix"):
        student_of(tied, targets=["q_proj", "lm_head"])
    student_of(tied).save(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter itself"):
        student_of(tmp_path / "adapter")
    with (
        pytest.raises(ValueError, match="has no adapter"),
        language_model(tied).adapter_off(),
    ):
        pass
    weights = tmp_path / "adapter" / lora.WEIGHTS
    weights.rename(weights.with_name("adapter_model.bin"))
    with pytest.raises(ValueError, match="pickled adapters are not loaded"):
        load_tokenizer(ModelConfig(model=str(tmp_path / "adapter")), "student")
    settings = tmp_path / "adapter" / lora.CONFIG
    settings.write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "adapter")}))
    with pytest.raises(ValueError, match="which is an adapter itself"):
        load_tokenizer(ModelConfig(model=str(tmp_path / "adapter")), "student")
    settings.write_text("[")
    with pytest.raises(ValueError, match="is not JSON"):
        load_tokenizer(ModelConfig(model=str(tmp_path / "adapter")), "student")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"pip install 'kibitz\[lora\]'"):
        run(small_models, tmp_path / "run")


def test_the_preflight_reads_the_base_of_an_adapter(tmp_path):
    from kibitz.preflight import texts

    folder = make_model(tmp_path / "base")
    student_of(folder).save(tmp_path / "adapter")
    adapter, base = (ModelConfig(model=str(tmp_path / name)) for name in ("adapter", "base"))
    tok = load_tokenizer(adapter, "teacher")
    assert texts.stop_tokens(adapter, tok, []) == texts.stop_tokens(base, tok, [])
    assert lora.base_or_self(str(folder)) == str(folder)
