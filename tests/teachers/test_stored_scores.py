"""A store of signals: the same numbers, no second reading, and nothing of another teacher."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import CPU, language_model, make_model
from support.runs import recipe
from typer.testing import CliRunner

import kibitz
from kibitz.cli import app
from kibitz.config import LocalTeacherConfig, StoredTeacherConfig
from kibitz.data import load_prompts
from kibitz.engines.torch import TorchEngine
from kibitz.ledger import Ledger
from kibitz.models.load import load_tokenizer
from kibitz.signals import Dense, Sampled, TopK
from kibitz.teachers import ScoreRequest, build
from kibitz.teachers.local import LocalScorer
from kibitz.teachers.stored import Store
from kibitz.types import Prompt, Sampling

ASKS = [ScoreRequest("dense"), ScoreRequest("top_k", 3), ScoreRequest("top_k", 3, 2.0), ScoreRequest("sampled")]


@pytest.fixture
def rollouts(small_models):
    student = language_model(small_models / "student")
    prompts = [Prompt(ids=(3, 4 + i, 5), text=f"p{i}", key=str(i)) for i in range(3)]
    return TorchEngine(student).generate(prompts, Sampling(max_tokens=5, num_samples=2, stop_ids=(2,)))


def teacher_of(small_models, store: Path | None, **settings):
    config = LocalTeacherConfig(
        model=str(small_models / "teacher"), store=None if store is None else str(store), **settings
    )
    return build.load(config, CPU)


def numbers(signal):
    match signal:
        case Dense(hidden_TD, head):
            return [head(hidden_TD)]
        case TopK(ids_TK, logp_TK, temperature, rest_logp_T=rest_T):
            return [ids_TK, logp_TK, rest_T, torch.tensor(temperature)]
        case Sampled(logp_T):
            return [logp_T]


def same(one, other) -> bool:
    return all(
        torch.equal(x, y) for a, b in zip(one, other, strict=True) for x, y in zip(numbers(a), numbers(b), strict=True)
    )


@pytest.mark.parametrize("ask", ASKS, ids=lambda ask: f"{ask.kind}-{ask.temperature}")
def test_what_is_read_is_what_was_said(ask, small_models, rollouts, tmp_path):
    direct = teacher_of(small_models, None).scorer(ask).score(rollouts)
    first = teacher_of(small_models, tmp_path / "s").scorer(ask).score(rollouts)
    again = teacher_of(small_models, tmp_path / "s").scorer(ask).score(list(reversed(rollouts)))
    assert same(direct, first)
    assert same(direct, list(reversed(again)))


def test_a_second_run_makes_no_forward_of_the_teacher(small_models, rollouts, tmp_path, monkeypatch):
    teacher_of(small_models, tmp_path / "s").scorer(ASKS[0]).score(rollouts)
    teacher = teacher_of(small_models, tmp_path / "s")
    monkeypatch.setattr(LocalScorer, "score", lambda *_: pytest.fail("the teacher was asked again"))
    teacher.scorer(ASKS[0]).score(rollouts)
    metrics = teacher.metrics()
    assert metrics["stored_share"] == 1.0
    assert metrics["store_bytes"] == sum(path.stat().st_size for path in (tmp_path / "s").iterdir())
    with pytest.raises(BaseException, match="asked again"):  # another question is another entry
        teacher.scorer(ASKS[1]).score(rollouts)


def test_only_what_is_missing_is_asked_and_counted(small_models, rollouts, tmp_path):
    teacher, ledger = teacher_of(small_models, tmp_path / "s"), Ledger()
    ask = replace(ASKS[0], count=ledger.reading("scoring"))
    teacher.scorer(ask).score(rollouts[:4])
    assert ledger.close_step()["flops"] == {"scoring": teacher.models[0].pass_flops(rollouts[:4])}
    teacher.metrics()
    both = teacher.scorer(ask).score([*rollouts, replace(rollouts[4])])  # a text that stands there twice is read once
    assert ledger.close_step()["flops"] == {"scoring": teacher.models[0].pass_flops(rollouts[4:])}
    assert teacher.metrics()["stored_share"] == pytest.approx(5 / 7)
    heads = {id(signal.head) for signal in both}
    assert len(heads) == 1, "signals of several rollouts are joined, which takes one head"


def test_an_evaluation_fills_no_store(small_models, rollouts, tmp_path):
    teacher = teacher_of(small_models, tmp_path / "s")
    assert same(teacher.score(rollouts), teacher_of(small_models, None).score(rollouts))
    assert teacher.metrics()["store_bytes"] == (tmp_path / "s" / "store.json").stat().st_size


def changed_weight(folder: Path) -> None:
    model = language_model(folder, "teacher")
    with torch.no_grad():
        next(model.model.parameters())[0, 0] += 1e-3
    model.model.save_pretrained(folder)


def changed_template(folder: Path) -> None:
    tokenizer = load_tokenizer(LocalTeacherConfig(model=str(folder)), "teacher")
    tokenizer.chat_template = (tokenizer.chat_template or "") + " "
    tokenizer.save_pretrained(folder)


def changed_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(LocalTeacherConfig(model=str(folder)), "teacher")
    tokenizer.add_tokens(["x"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "part"),
    [(changed_weight, "weights"), (changed_template, "chat template"), (changed_tokenizer, "tokenizer")],
)
def test_another_teacher_is_refused_and_told_why(change, part, rollouts, tmp_path):
    folder = make_model(tmp_path / "teacher", seed=2, vocab_size=40)
    config = LocalTeacherConfig(model=str(folder), store=str(tmp_path / "s"))
    build.load(config, CPU).scorer(ASKS[0]).score(rollouts)
    build.load(config, CPU)  # itself, once more
    change(folder)
    with pytest.raises(ValueError, match=f"another {part}: write teacher.store") as refusal:
        build.load(config, CPU)
    assert str(refusal.value).count("another ") == 1


def test_another_precision_is_another_teacher(small_models, rollouts, tmp_path):
    teacher_of(small_models, tmp_path / "s").scorer(ASKS[0]).score(rollouts)
    with pytest.raises(ValueError, match=r"weights, another teacher\.dtype"):
        teacher_of(small_models, tmp_path / "s", dtype="bfloat16")


def test_scores_of_tokens_that_the_student_names_are_not_kept(small_models, tmp_path):
    with pytest.raises(ValueError, match="signals of the kind named cannot be stored: leave out store"):
        teacher_of(small_models, tmp_path / "s").scorer(ScoreRequest("named"))


def test_a_kill_in_the_middle_loses_nothing_that_was_whole(small_models, rollouts, tmp_path):
    teacher_of(small_models, tmp_path / "s").scorer(ASKS[0]).score(rollouts[:2])
    index = tmp_path / "s" / "index.jsonl"
    index.write_text(index.read_text() + '\n{"key": "cut sho')
    teacher = teacher_of(small_models, tmp_path / "s")
    teacher.scorer(ASKS[0]).score(rollouts)
    assert teacher.metrics()["stored_share"] == pytest.approx(2 / 6)
    fresh = teacher_of(small_models, tmp_path / "s")
    fresh.scorer(ASKS[0]).score(rollouts)
    assert fresh.metrics()["stored_share"] == 1.0


def test_a_damaged_file_is_a_sentence(small_models, rollouts, tmp_path):
    teacher_of(small_models, tmp_path / "s").scorer(ASKS[3]).score(rollouts)
    (file,) = [p for p in (tmp_path / "s").glob("*.safetensors") if p.name != "head.safetensors"]
    file.write_bytes(file.read_bytes()[:-6])
    with pytest.raises(ValueError, match="damaged"):
        teacher_of(small_models, tmp_path / "s").scorer(ASKS[3]).score(rollouts)


def test_a_run_from_stored_scores_learns_the_same_without_the_teacher(small_models, tmp_path):
    """Lightning OPD: rollouts of the student from before training, scored once; then no teacher is loaded."""
    writes = recipe(small_models / "student", small_models / "teacher", tmp_path / "a", steps=2, optim={"lr": 1e-12})
    writes["rollout"]["store"] = True
    kibitz.train(writes)
    rows = [json.loads(line) for line in (tmp_path / "a" / "stored.jsonl").read_text().split("\n") if line]
    keys = {row["prompt_key"] for row in rows}
    world = kibitz.config.load(writes, []).data
    ours = LocalTeacherConfig(model=str(small_models / "student"))
    prompts = load_prompts(world, load_tokenizer(ours, "student"))
    data = tmp_path / "prompts.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": p.text, "answer": p.answer}) + "\n" for p in prompts if p.key in keys)
    )
    files = ["--rollouts", str(tmp_path / "a" / "stored.jsonl"), "--out", str(tmp_path / "s")]
    answer = CliRunner().invoke(app, ["score", *files, "--teacher", str(small_models / "teacher"), "--json"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["rollouts"] == len(rows)
    learns = {
        **recipe(small_models / "student", None, tmp_path / "b", steps=2),
        "data": {"prompts": str(data), "grader": "exact"},
        "method": {"type": "opd", "rollouts": str(tmp_path / "a" / "stored.jsonl")},
        "eval": {"every": 0, "prompts": str(data), "num_prompts": 4, "heatmaps": 2},
    }
    with_teacher = kibitz.train(
        {**learns, "teacher": {"model": str(small_models / "teacher")}, "output": str(tmp_path / "c")}
    )
    without = kibitz.train({**learns, "teacher": {"stored": str(tmp_path / "s")}})
    losses = [[row["loss"] for row in run.metrics] for run in (with_teacher, without)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][0] > 0
    assert [["reverse_kl" in row for row in run.evals] for run in (with_teacher, without)] == [[True] * 2, [False] * 2]
    kept = [p for p in (tmp_path / "s").glob("*.safetensors") if p.name != "head.safetensors"]
    assert len(kept) == 1, "evaluations are not stored"
    assert "teacher_scoring" in with_teacher.metrics[0]["flops"]
    assert without.metrics[0]["flops"].get("teacher_scoring", 0.0) == 0.0


def test_stored_scores_have_nothing_to_say_of_other_rollouts(small_models, rollouts, tmp_path):
    teacher_of(small_models, tmp_path / "s").scorer(ASKS[0]).score(rollouts[:5])
    teacher = build.load(StoredTeacherConfig(stored=str(tmp_path / "s")), CPU)
    assert teacher.kinds == ("dense",)
    assert len(teacher.scorer(ASKS[0]).score(rollouts[:5])) == 5
    with pytest.raises(ValueError, match="lacks 1 rollouts.*'p2'"):
        teacher.scorer(ASKS[0]).score(rollouts)
    with pytest.raises(ValueError, match="cannot write"):
        teacher.writer(TorchEngine)


def test_a_store_of_other_tokens_or_of_nothing_is_refused(small_models, rollouts, tmp_path):
    teacher_of(small_models, tmp_path / "s").scorer(ASKS[0]).score(rollouts)
    stranger = load_tokenizer(LocalTeacherConfig(model=str(small_models / "stranger")), "student")
    with pytest.raises(ValueError, match="another tokenizer"):
        build.check(StoredTeacherConfig(stored=str(tmp_path / "s")), stranger)
    with pytest.raises(ValueError, match="kibitz score --out"):
        build.check(StoredTeacherConfig(stored=str(tmp_path / "none")), stranger)
    assert not (tmp_path / "none").exists()


def test_the_index_does_not_mistake_one_rollout_for_another(small_models, rollouts, tmp_path):
    teacher_of(small_models, tmp_path / "s").scorer(ASKS[0]).score(rollouts)
    store = Store(tmp_path / "s", None, CPU)
    assert len(store.index) == len({(r.prompt.ids, tuple(r.response_ids)) for r in rollouts})
    moved = replace(rollouts[0], prompt=replace(rollouts[0].prompt, ids=(3,)), response_ids=rollouts[0].response_ids)
    assert store.find(moved, ASKS[0]) is None
    assert store.find(rollouts[0], ASKS[0]) is not None
