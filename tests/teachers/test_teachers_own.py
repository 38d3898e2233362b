"""Teachers made of the student, and teachers that read more than the student does."""

import json
import math
from dataclasses import replace

import pytest
import torch
from support.models import full_logp, language_model, make_model, tokenizer
from support.runs import recipe

import kibitz.models.load
from kibitz import config, train
from kibitz.config import ContextConfig, RecipeError, StudentTeacherConfig
from kibitz.engines.torch import TorchEngine
from kibitz.ledger import Ledger
from kibitz.teachers import ScoreRequest
from kibitz.teachers.context import Rendering, in_context, seen_of
from kibitz.teachers.local import local_teacher
from kibitz.training.setup import prepare
from kibitz.training.trainer import NullProgress, Trainer
from kibitz.types import Prompt, Rollout, Sampling

LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "one")):
        make_model(folder / name, seed=seed)
    return folder


def rows(folder, with_hint: bool = True) -> str:
    lines = [{"prompt": f"{a}+{b}", "answer": str((a + b) % 10)} for a in range(3) for b in range(3)]
    lines = [{**line, "hint": line["prompt"] + "="} for line in lines] if with_hint else lines
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "rows.jsonl")


def tree(models, folder, teacher, **sections):
    path = rows(folder)
    base = recipe(
        models / "student", None, folder / "run", teacher=teacher, data={"world": None, "prompts": path, "limit": None}
    )
    base["eval"]["prompts"] = path
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section} if isinstance(section, dict) else section
    return base


def plain_logp(model, rollout, prompt_ids=None):
    return full_logp(model, rollout, prompt_ids).float().detach()


def said(teacher, rollouts):
    return [s.head(s.hidden_TD).log_softmax(-1) for s in teacher.scorer(ScoreRequest()).score(rollouts)]


def hinted(rollout):
    return tuple(tokenizer()(f"<bos>{rollout.prompt.columns['hint']}<assistant>")["input_ids"])


def some_rollouts(prompts):
    return [
        Rollout(p, [5 + i % 4, 9, 2], torch.zeros(3), True, reward=float(i % 2), text=str(i))
        for i, p in enumerate(prompts)
    ]


# ------------------------------------------------------------------ made of the student


def test_start_stays_what_the_run_found_also_when_it_goes_on(models, tmp_path):
    source = tree(models, tmp_path, {"student": "start", "context": "{{ hint }}"}, steps=2)
    fresh = language_model(models / "student")
    trainer = Trainer(prepare(source), NullProgress())
    rollouts = some_rollouts(trainer.setup.stream.prompts[:3])
    trainer.run()
    want = [plain_logp(fresh, r, hinted(r)) for r in rollouts]
    for again in (trainer.setup, prepare({**source, "steps": 3}, resume=True)):
        for a, b in zip(said(again.parts.teacher, rollouts), want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        moved = plain_logp(again.parts.student, rollouts[0], hinted(rollouts[0]))
        assert (moved - want[0]).abs().max() > 1e-3


def test_the_average_is_that_of_the_weights_after_each_step(models, tmp_path):
    setup = prepare(tree(models, tmp_path, {"student": "ema", "decay": 0.75}))
    trainer = Trainer(setup, NullProgress())
    want = {name: p.detach().double().clone() for name, p in setup.parts.student.model.named_parameters()}
    for _ in range(3):
        trainer.step()
        want = {n: 0.75 * want[n] + 0.25 * p.detach().double() for n, p in setup.parts.student.model.named_parameters()}
    average = setup.parts.stateful["teacher"]
    for name, p in average.model.model.named_parameters():
        torch.testing.assert_close(p.double(), want[name], rtol=0, atol=1e-6)
        assert p.grad is None
    r = some_rollouts(setup.stream.prompts[:1])
    assert setup.parts.student.head is not average.model.head
    torch.testing.assert_close(said(setup.parts.teacher, r)[0], plain_logp(average.model, r[0]))


def test_a_run_with_an_average_goes_on_bit_for_bit(models, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    teacher = {"student": "ema", "decay": 0.5, "context": "{{ hint }}"}
    whole = train(tree(models, tmp_path / "a", teacher, steps=4, save={"every": 2}))
    half = tree(models, tmp_path / "b", teacher, steps=4, save={"every": 2})
    setup = prepare(half)
    trainer = Trainer(setup, NullProgress())
    for _ in range(2):
        trainer.step()
    trainer.save()
    setup.folder.lock.release()  # it is dead
    rest = train(half, resume=True)
    assert [row["loss"] for row in rest.metrics] == [row["loss"] for row in whole.metrics]
    for name in ("model.safetensors", "training/teacher.safetensors"):
        assert (rest.checkpoint / name).read_bytes() == (whole.checkpoint / name).read_bytes()


def test_an_adapters_average_shares_the_base(models, tmp_path):
    source = tree(models, tmp_path, {"student": "ema"}, student={"lora": LORA})
    setup = prepare(source)
    average = setup.parts.stateful["teacher"]
    ours, theirs = (dict(m.model.named_parameters()) for m in (setup.parts.student, average.model))
    assert {n for n in ours if ours[n].data_ptr() == theirs[n].data_ptr()} == {n for n in ours if "lora" not in n}
    assert set(average.state()) == {n for n in ours if "lora" in n}
    trainer = Trainer(setup, NullProgress())
    trainer.step()
    a, b = (dict(m.model.named_parameters()) for m in (setup.parts.student, average.model))
    name = next(n for n in a if "lora_B" in n)
    torch.testing.assert_close(b[name], 0.05 * a[name])  # B began at 0


@pytest.mark.parametrize("kind", ["base", "start"])
def test_the_base_teaches_an_adapter_without_a_second_copy(models, tmp_path, kind, monkeypatch):
    loaded, load = [], kibitz.models.load.load_weights
    monkeypatch.setattr("kibitz.models.load.load_weights", lambda *given: loaded.append(given) or load(*given))
    setup = prepare(tree(models, tmp_path, {"student": kind, "context": "{{ hint }}"}, student={"lora": LORA}))
    trainer = Trainer(setup, NullProgress())
    r = some_rollouts(setup.stream.prompts[:2])
    trainer.step()
    monkeypatch.undo()
    fresh = language_model(models / "student")
    for one, logp in zip(r, said(setup.parts.teacher, r), strict=True):
        torch.testing.assert_close(logp, plain_logp(fresh, one, hinted(one)), rtol=0, atol=1e-5)
        assert (plain_logp(setup.parts.student, one, hinted(one)) - logp).abs().max() > 1e-4  # and is on again
    sampling = Sampling(max_tokens=8, seed=3)
    ours = setup.parts.teacher.writer(TorchEngine).generate([r[0].prompt], sampling)
    alone = TorchEngine(fresh).generate([replace(r[0].prompt, ids=hinted(r[0]))], sampling)
    assert ours[0].response_ids == alone[0].response_ids
    (signal,) = setup.parts.teacher.scorer(ScoreRequest()).score(r[:1])
    assert signal.head.projection.weight is setup.parts.student.model.get_output_embeddings().weight
    assert len(loaded) == 1 and setup.parts.teacher.num_parameters == setup.parts.student.num_parameters


def test_the_same_weights_with_the_same_prompt_read_zero(models, tmp_path):
    source = tree(models, tmp_path, {"student": "current", "context": {"prompt": "{{ prompt }}"}}, steps=2)
    run = train(source)
    assert [row["loss"] for row in run.metrics] == [0.0, 0.0]
    assert run.evals[-1]["reverse_kl"] == 0.0
    other = train(
        {**source, "teacher": {"student": "current", "context": "{{ hint }}"}, "output": str(tmp_path / "other")}
    )
    assert other.metrics[0]["loss"] > 1e-3


def test_what_a_student_cannot_be_is_refused():
    def refuse(match, teacher, **student):
        with pytest.raises(RecipeError, match=match):
            config.load({"student": {"model": "s", **student}, "teacher": teacher, "data": {"world": "arithmetic"}})

    refuse("write student.lora, or teacher.student=start", {"student": "base"})
    refuse("write teacher.context", {"student": "current"})
    refuse("write teacher.student=ema", {"student": "start", "decay": 0.9})
    refuse("teacher.context is no Jinja template", {"model": "t", "context": "{% if %}"})


# ------------------------------------------------------------------ privileged context


def test_positions_shift_by_the_length_of_the_teachers_prompt(models):
    """Against one forward pass for each rollout; shorter, equal and longer prompts together in a micro-batch."""
    model = language_model(models / "one", "teacher")
    hints = ["7", "1+2", "(1+2)*3=3*3=", "4*4*4"]
    prompts = [
        Prompt((1, 5, 6, 3), "9+9", str(i), columns={"hint": h}, messages=({"role": "user", "content": "9+9"},))
        for i, h in enumerate(hints)
    ]
    teacher = in_context(local_teacher(model), ContextConfig(prompt="{{ prompt }}={{ hint }}"), model.tokenizer)
    rollouts = some_rollouts(prompts)
    signals = teacher.scorer(ScoreRequest(tokens_per_micro_batch=50)).score(rollouts)
    for hint, r, signal in zip(hints, rollouts, signals, strict=True):
        ids = model.tokenizer(f"<bos>9+9={hint}<assistant>", add_special_tokens=False)["input_ids"]
        got = signal.head(signal.hidden_TD).log_softmax(-1)
        torch.testing.assert_close(got, plain_logp(model, r, tuple(ids)), rtol=0, atol=1e-5)
    theirs = [
        replace(r, prompt=replace(r.prompt, ids=(0,) * (len(h) + 6))) for h, r in zip(hints, rollouts, strict=True)
    ]
    ledger = Ledger()
    teacher.scorer(ScoreRequest(count=ledger.reading("scoring"))).score(rollouts)
    assert ledger.close_step()["flops"] == {"scoring": model.pass_flops(theirs)}, "its own prompts, not the student's"
    written = teacher.writer(TorchEngine).generate(prompts, Sampling(max_tokens=5, num_samples=2, seed=1))
    assert [r.prompt for r in written] == [p for p in prompts for _ in range(2)]
    alone = replace(prompts[2], ids=tuple(model.tokenizer(f"<bos>9+9={hints[2]}<assistant>")["input_ids"]))
    again = TorchEngine(model).generate([alone], Sampling(max_tokens=5, num_samples=2, seed=1))
    assert [r.response_ids for r in written[4:6]] == [r.response_ids for r in again]


def test_the_context_is_rendered_by_the_teachers_own_template(models):
    model = language_model(models / "one", "teacher")
    model.tokenizer.chat_template = (
        "{% for m in messages %}{{ '(' if m['role'] == 'system' else '' }}{{ m['content'] }}"
        "{{ ')' if m['role'] == 'system' else '' }}{% endfor %}{{ tail }}"
    )
    options = ContextConfig(prompt="{{ prompt }}+{{ n }}", system="{{ answer }}", template={"tail": "="})
    before = (
        {"role": "system", "content": "1"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "3"},
    )
    prompt = Prompt((1,), "4", "k", answer="8", columns={"n": 5}, messages=(*before, {"role": "user", "content": "4"}))
    assert model.tokenizer.decode(Rendering(options, model.tokenizer)(prompt).ids) == "(8)234+5="


def test_a_template_knows_the_rollout_and_a_sibling_that_succeeded():
    prompts = [Prompt((1,), "p", key) for key in "aab"]
    a, b, c = some_rollouts(prompts)  # rewards 0, 1, 0
    assert [s["success"] for s in seen_of([a, b, c])] == ["1", None, None]
    text = "{{ prompt }}{% if success %} right: {{ success }}{% endif %} yours: {{ attempt }}, {{ reward }}"
    rendering = Rendering(ContextConfig(prompt=text), None)
    shown = [
        rendering.messages(r.prompt, s)[-1]["content"] for r, s in zip((a, b), seen_of([a, b, c])[:2], strict=True)
    ]
    assert shown == ["p right: 1 yours: 0, 0.0", "p yours: 1, 1.0"]


def test_a_template_is_data_and_cannot_reach_out():
    for text in ("{{ ''.__class__.__mro__ }}", "{{ prompt.__init__.__globals__ }}"):
        with pytest.raises(ValueError, match="cannot be rendered|is unsafe|undefined"):
            Rendering(ContextConfig(prompt=text), None).messages(Prompt((1,), "p", "k"))
    held = Prompt((1,), "{{ 7 * 7 }}", "k")  # a row is no template
    assert Rendering(ContextConfig(prompt="{{ prompt }}"), None).messages(held)[-1]["content"] == "{{ 7 * 7 }}"


def test_a_missing_column_is_refused_before_weights_load(models, tmp_path, monkeypatch):
    monkeypatch.setattr("kibitz.training.setup.load_student", lambda *_: pytest.fail("weights were loaded"))
    source = tree(models, tmp_path, {"model": str(models / "one"), "context": "{{ prompt }}{{ solution }}"})
    with pytest.raises(
        ValueError, match=r"'solution' is undefined in the row of the prompt '0\+0', which has 'answer', .*hint"
    ):
        prepare(source)


def test_a_prompt_that_has_no_room_is_refused(models, tmp_path):
    source = tree(models, tmp_path, {"model": str(models / "one"), "context": "{{ hint * 40 }}"})
    with pytest.raises(RecipeError, match="the longest prompt has 162 tokens and the teacher has 128 positions"):
        prepare(source)


def test_a_world_brings_its_solutions_where_a_context_speaks_of_them(models, tmp_path):
    source = recipe(models / "student", None, tmp_path / "run", steps=1)
    source["teacher"] = {"student": "start", "context": "{{ prompt }}={{ response }}"}
    run = train(source)
    assert math.isfinite(run.metrics[-1]["loss"]) and run.evals[-1]["reverse_kl"] > 0


def test_several_teachers_may_each_read_something_else(models, tmp_path):
    teachers = [{"student": "current", "context": "{{ hint }}", "name": "hinted"}, {"model": str(models / "one")}]
    run = train(tree(models, tmp_path, teachers, steps=2))
    assert run.metrics[-1]["teachers_disagreement"] > 0
    assert config.load(run.folder / "recipe.yaml").teachers[0] == StudentTeacherConfig(
        student="current", context="{{ hint }}", name="hinted"
    )
