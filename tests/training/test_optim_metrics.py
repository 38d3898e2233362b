"""Schedules and optimizers, intervals and pass@k, the files of a run."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from support.models import make_model
from transformers import AutoModelForCausalLM

from kibitz.config import OptimConfig
from kibitz.evaluate.statistics import pass_at_k, wilson
from kibitz.files import JSONL, write_atomically
from kibitz.ledger import Ledger
from kibitz.optim import Optimizer, lr_factor


def test_schedules():
    linear = [lr_factor(step, 10, OptimConfig(warmup_steps=2)) for step in range(10)]
    assert linear[:3] == [0.5, 1.0, 1.0]
    assert all(a > b for a, b in itertools.pairwise(linear[2:]))
    assert linear[-1] == pytest.approx(1 / 8)
    cosine = [lr_factor(step, 10, OptimConfig(schedule="cosine")) for step in range(10)]
    assert cosine[0] == 1.0
    assert cosine[5] == pytest.approx(0.5)
    assert {lr_factor(step, 10, OptimConfig(schedule="constant")) for step in range(10)} == {1.0}
    assert lr_factor(0, 1, OptimConfig()) == 1.0


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_an_optimizer_resumes_bit_for_bit(name, tmp_path):
    folder, config = make_model(tmp_path), OptimConfig(name=name, lr=1e-2, sgd_momentum=0.9)
    ids = torch.tensor([[1, 5, 6, 7, 8]])

    def steps(model, optimizer, num):
        for _ in range(num):
            model(ids, labels=ids).loss.backward()
            optimizer.step(0.7)

    whole = AutoModelForCausalLM.from_pretrained(folder)
    steps(whole, Optimizer(whole, config), 5)
    part = AutoModelForCausalLM.from_pretrained(folder)
    first = Optimizer(part, config)
    steps(part, first, 3)
    second = Optimizer(part, config)
    second.load_state(first.state())
    steps(part, second, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), part.parameters(), strict=True))


def test_muon_takes_the_matrices_and_adam_the_rest(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path))
    optimizer = Optimizer(model, OptimConfig(name="muon", lr=1e-3))
    adam, muon = (
        {optimizer.names[p] for group in part.param_groups for p in group["params"]} for part in optimizer.parts
    )
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= adam
    assert "model.layers.0.mlp.up_proj.weight" in muon
    assert adam | muon == {name for name, _ in model.named_parameters()}
    assert optimizer.rates == [1e-3, 1e-2]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_subtracts_the_gradient_and_what_is_left_of_earlier_ones(momentum, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path))
    start, config = [p.clone() for p in model.parameters()], OptimConfig(
        name="sgd", lr=0.1, sgd_momentum=momentum, weight_decay=0.5, clip=None
    )  # fmt: skip
    optimizer = Optimizer(model, config)
    expected, velocity = [p.detach().clone() for p in start], [torch.zeros_like(p) for p in start]
    for gradient, factor in ((1.0, 1.0), (-2.0, 0.5)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step(factor)
        velocity = [momentum * v + gradient + 0.5 * p for v, p in zip(velocity, expected, strict=True)]
        expected = [p - 0.1 * factor * v for p, v in zip(expected, velocity, strict=True)]
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted)


def test_the_gradient_is_clipped_and_its_norm_told(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path))
    optimizer = Optimizer(model, OptimConfig(clip=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = math.sqrt(sum(p.numel() for p in model.parameters()))
    assert optimizer.step(1.0) == pytest.approx(norm, rel=1e-5)


def test_wilson_against_the_published_form_and_its_ends():
    low, high = wilson(8, 10)
    assert (low, high) == (
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )  # Brown, Cai, DasGupta 2001
    assert wilson(0, 20)[0] == 0.0
    assert wilson(20, 20)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_covers_as_often_as_it_says():
    """By exact enumeration of the binomial, n = 50: mean coverage over the share is within 1.5 points of 95%."""
    covers = []
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        inside = [wilson(k, 50)[0] <= share <= wilson(k, 50)[1] for k in range(51)]
        covers.append(sum(math.comb(50, k) * share**k * (1 - share) ** (50 - k) for k in range(51) if inside[k]))
    assert sum(covers) / len(covers) == pytest.approx(0.95, abs=0.015)


def test_pass_at_k_by_enumeration():
    outcomes = [True] * 3 + [False] * 5
    for k in (1, 2, 4, 8):
        subsets = list(itertools.combinations(outcomes, k))
        assert pass_at_k(8, 3, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_jsonl_leaves_out_half_a_line_and_forgets_later_steps(tmp_path):
    file = JSONL(tmp_path / "m.jsonl")
    assert file.read() == []
    for step in range(4):
        file.append({"step": step, "loss": float("nan") if step == 1 else 0.5, "text": "é\u2028"})
    with file.path.open("a") as raw:
        raw.write('{"step": 4, "lo')
    assert [row["step"] for row in file.read()] == [0, 1, 2, 3]
    assert file.read()[1]["loss"] is None
    file.keep(last_step=2)
    assert [json.loads(line)["step"] for line in file.path.read_text().split("\n") if line] == [0, 1, 2]


def test_an_atomic_write_leaves_the_old_file_or_the_new(tmp_path):
    path = tmp_path / "run.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_the_ledger_adds_up():
    ledger = Ledger()
    ledger.add("flops", "student_training", 3.0)
    assert ledger.close_step()["flops"] == {"student_training": 3.0}
    ledger.add("flops", "student_training", 4.0)
    assert ledger.close_step()["flops"] == {"student_training": 4.0}
    assert ledger.total["flops"] == {"student_training": 7.0}
    assert Ledger(ledger.total).total["flops"]["student_training"] == 7.0


def test_the_ledger_adds_over_processes_once():
    """What one process spent is its own until the step is closed, where all of them are added."""
    ledger = Ledger()
    ledger.spend("scoring", 2.0)
    ledger.reading("scoring")(SimpleNamespace(pass_flops=len), [None] * 3)
    ledger.metrics["seen"] = 1.0
    assert ledger.total["flops"] == {}
    two_alike = lambda spent: {phase: 2 * flops for phase, flops in spent.items()}  # noqa: E731
    assert ledger.close_step(two_alike)["flops"] == ledger.total["flops"] == {"scoring": 10.0}
    assert ledger.close_step(two_alike)["flops"] == {} and ledger.metrics == {}
    ledger.resume({"flops": {"scoring": 1.0}})
    ledger.spend("scoring", 1.0)
    ledger.close_step()
    assert ledger.total["flops"] == {"scoring": 2.0}
