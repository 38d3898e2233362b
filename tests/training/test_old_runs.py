"""Runs of an older version, written by the code of commit e8b724f: this one loads them, reports them and goes on with them."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import language_model
from support.paths import FIXTURES, script

import kibitz
from kibitz import report
from kibitz.files import JSONL
from kibitz.training import checkpoint

OLD = FIXTURES / "run_e8b724f"
make = script(OLD / "make.py")


@pytest.fixture
def trained(tmp_path, monkeypatch) -> Path:
    """The runs where they may be written to, with their models beside them, as the relative paths of their recipes want."""
    for part in ("models", "trained"):
        shutil.copytree(OLD / part, tmp_path / part)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "trained"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("name", make.METHODS)
def test_the_last_checkpoint_is_whole_and_is_a_model(trained, name):
    (last,) = checkpoint.checkpoints(trained / name)
    assert checkpoint.damage(last) is None
    if name != "lora":  # whose adapter names the base where it lay
        model = language_model(last)
        assert model.model(torch.tensor([[1, 5, 6, 3]])).logits.isfinite().all()


def test_a_report_tells_them_apart(trained):
    page = report.build([trained / name for name in make.METHODS], trained / "report.html").read_text(encoding="utf-8")
    for name in make.METHODS:
        assert name in page
        first, *_ = JSONL(trained / name / "rollouts.jsonl").read()
        assert f'"prompt": "{first["prompt"]}"' in page.replace('":"', '": "')


@pytest.mark.parametrize("source", ["its own recipe.yaml", "the recipe as it was written"])
@pytest.mark.parametrize("name", make.METHODS)
def test_it_goes_on(trained, name, source):
    folder = trained / name
    metrics, evals = (JSONL(folder / f"{kind}.jsonl").read() for kind in ("metrics", "evals"))
    (before,) = checkpoint.checkpoints(folder)
    was, moments = weights(before), weights(before / "training")
    tree = folder / "recipe.yaml" if source == "its own recipe.yaml" else make.recipe(name)
    run = kibitz.train(tree, ["steps=4"], resume=True)
    assert run.metrics[:2] == metrics
    assert run.evals[:3] == evals
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4]
    assert [row["step"] for row in run.evals] == [0, 1, 2, 3, 4]
    for row in run.metrics[2:]:
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0
        assert row["flops"].keys() == metrics[0]["flops"].keys()
        assert 0 < row["lr"] < 1e-3
    now, later = weights(run.checkpoint), weights(run.checkpoint / "training")
    assert now.keys() == was.keys() and any((now[key] != was[key]).any() for key in was)
    assert later.keys() == moments.keys()


@pytest.mark.parametrize("name", make.METHODS)
def test_its_first_steps_are_still_what_they_were(trained, name):
    """To three digits: another processor sums in another order."""
    run = kibitz.train(make.recipe(name), [f"output=again/{name}"])
    for now, then in zip(run.metrics, JSONL(trained / name / "metrics.jsonl").read(), strict=True):
        for key in ("loss", "grad_norm", "reverse_kl", "lr", "num_tokens"):
            assert now[key] == pytest.approx(then[key], rel=1e-3), key


def test_a_discount_among_the_methods_keys_is_in_force(trained):
    tree = make.recipe("flat_keys")
    tree["method"]["discount"] = 0.0
    run = kibitz.train(tree, ["output=again/none"])
    then = JSONL(trained / "flat_keys" / "metrics.jsonl").read()
    assert abs(run.metrics[0]["advantage"] / then[0]["advantage"] - 1) > 0.1
