"""What a run keeps beside the student: a method's own state, and what others enter under a name."""

import dataclasses
from collections.abc import Iterator
from statistics import fmean
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from support.runs import crash_and_resume, recipe, timeless

import kibitz
from kibitz import methods
from kibitz.config import METHOD_CONFIGS, MethodConfig, Needs, OPDConfig
from kibitz.methods import opd
from kibitz.types import Stateful


class DriftConfig(MethodConfig):
    type: Literal["drift"] = "drift"

    def needs(self) -> Needs:
        return Needs(teacher=True)


class Drift:
    """opd, whose weights follow a running mean of the responses' length: a step differs by what came before it."""

    def __init__(self, inner, count, ledger):
        self.inner, self.count, self.ledger, self.mean = inner, count, ledger, torch.tensor(1.0)
        self.rollout, self.loss = inner.rollout, inner.loss

    def signal(self, rollouts, step):
        length = fmean(r.num_tokens for r in rollouts)
        self.mean = 0.7 * self.mean + 0.3 * length
        self.count.number += 1
        self.ledger.spend("counting", 5.0)
        self.ledger.spend("counting", 2.0)
        self.ledger.metrics["mean_length"] = self.mean.item() * self.count.number
        scale = self.mean * self.count.number
        return [dataclasses.replace(s, weight_T=s.weight_T * scale) for s in self.inner.signal(rollouts, step)]

    def state(self):
        return {"mean": self.mean}

    def load_state(self, state):
        self.mean = state["mean"]


class Count:
    number = 0

    def state(self):
        return {"number": torch.tensor(self.number)}

    def load_state(self, state):
        self.number = int(state["number"])


def build(config, parts):
    parts.stateful["count"] = Count()
    return Drift(opd.build(OPDConfig(), parts), parts.stateful["count"], parts.ledger)


@pytest.fixture
def drift() -> Iterator[None]:
    """The method, registered for one test."""
    before = dict(METHOD_CONFIGS)
    methods.register("drift", DriftConfig, build)
    yield
    del methods.METHODS["drift"]
    METHOD_CONFIGS.clear()
    METHOD_CONFIGS.update(before)
    methods.register("opd", OPDConfig, opd.build)  # builds the recipe anew, without the stranger


@pytest.mark.parametrize("normalize", ["token", "sequence"])  # sequence: inside the wrapper of token weights
def test_a_state_comes_back_bit_for_bit(models, tmp_path, drift, normalize):
    sections = {"method": {"type": "drift", "normalize": normalize}, "save": {"every": 2}}
    whole = kibitz.train(recipe(*models, tmp_path / "whole", **sections))
    tree = recipe(*models, tmp_path / "part", **sections)
    run = crash_and_resume(tree)
    assert timeless(run.metrics) == timeless(whole.metrics)
    assert (run.checkpoint / "model.safetensors").read_bytes() == (whole.checkpoint / "model.safetensors").read_bytes()
    assert load_file(run.checkpoint / "training" / "count.safetensors")["number"] == 4
    assert (run.checkpoint / "training" / "method.safetensors").is_file()


def test_what_a_method_spends_and_logs_stands_in_the_row_of_their_step(models, tmp_path, drift):
    run = kibitz.train(recipe(*models, tmp_path / "run", method={"type": "drift"}, steps=2))
    assert [row["flops"]["counting"] for row in run.metrics] == [7.0, 7.0]
    assert run.metrics[1]["mean_length"] > run.metrics[0]["mean_length"] > 1


def test_a_checkpoint_without_a_state_that_is_kept_is_refused(models, tmp_path, drift, monkeypatch):
    """As an older version of the method leaves it, that did not count yet."""

    def forgetful(config, parts):
        method = build(config, parts)
        del parts.stateful["count"]
        return method

    tree = recipe(*models, tmp_path / "run", method={"type": "drift"}, steps=2)
    with monkeypatch.context() as older:
        older.setitem(methods.METHODS, "drift", forgetful)
        kibitz.train(tree)
    with pytest.raises(ValueError, match=r"no training/count.safetensors, and this run keeps a count"):
        kibitz.train(tree, resume=True)


def test_who_has_a_state_is_known_by_its_methods():
    assert isinstance(Count(), Stateful)
    assert not isinstance(object(), Stateful)
