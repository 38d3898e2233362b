"""How much memory each phase took, and what keeps it small without changing a number."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from support.runs import LEAST, recipe

import kibitz
from kibitz.config import Recipe
from kibitz.ledger import Ledger, highest
from kibitz.report import costs
from kibitz.report.folder import read_run
from kibitz.teachers.local import LocalScorer
from kibitz.training.memory import MARK, Gauge

MIB = 2**20
can_measure = pytest.mark.skipif(not MARK.exists(), reason="this system keeps no mark that could be set back")


# ------------------------------------------------------------------ what is measured


@can_measure
def test_each_phase_has_its_own_peak():
    """What was freed before the end counts, and does not count for the phase after it. Blocks above 32 MiB are pages of
    their own; smaller ones malloc may take from what it has, and nothing grows."""
    ledger = Ledger(watch=Gauge(torch.device("cpu")))
    with ledger.timed("scoring"):
        torch.ones(120 * MIB, dtype=torch.uint8)
    with ledger.timed("training"):
        torch.ones(50 * MIB, dtype=torch.uint8)
    with ledger.watched("evaluation"):
        pass
    peaks = ledger.total["peak_bytes"]
    assert peaks["scoring"] - peaks["training"] == pytest.approx(70 * MIB, abs=15 * MIB)
    assert peaks["training"] - peaks["evaluation"] == pytest.approx(50 * MIB, abs=15 * MIB)
    assert "evaluation" not in ledger.close_step()["peak_bytes"]


class Dial:
    """Shows what it is told to."""

    def __init__(self, *shown: float):
        self.shown = list(shown)

    def reset(self) -> None: ...

    def peaks(self) -> dict[str, float]:
        return {"peak_bytes": self.shown.pop(0)}


def test_the_largest_counts_where_seconds_add_up():
    ledger = Ledger(watch=Dial(5.0, 3.0, 4.0))
    with ledger.timed("training"):
        pass
    with ledger.timed("training"):
        pass
    assert ledger.close_step()["peak_bytes"] == {"training": 5.0}
    with ledger.timed("training"):
        pass
    assert ledger.step["peak_bytes"] == {"training": 4.0}
    assert ledger.total["peak_bytes"] == {"training": 5.0}
    again = Ledger({"seconds": {"training": 1.0}}, Dial(7.0))  # as saved before there were peaks
    again.note_peaks("loading")
    assert highest([ledger.total, again.total]) == {"peak_bytes": {"training": 5.0, "loading": 7.0}}


class Ticks:
    """A clock that goes on by one each time it is read."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        self.time += 1.0
        return self.time

    def seconds(self, start: float, end: float) -> float:
        return end - start


def test_a_phase_within_another_interrupts_it():
    """No second and no peak is entered twice or lost."""
    ledger = Ledger(watch=Dial(7.0, 3.0, 5.0, 9.0, 2.0), clock=Ticks())
    with ledger.timed("training"):
        with ledger.timed("scoring"):  # the outer phase had taken 7
            pass
        with ledger.timed("scoring"):
            pass
    step = ledger.close_step()
    assert step["seconds"] == {"training": 3.0, "scoring": 2.0}
    assert step["peak_bytes"] == {"training": 7.0, "scoring": 9.0}


def test_what_cannot_be_measured_is_left_out(monkeypatch):
    """Where the mark cannot be set back, a phase would seem as large as all before it."""
    monkeypatch.setattr("kibitz.training.memory.MARK", Path("/proc/self/there-is-no-such-file/x"))
    gauge = Gauge(torch.device("cpu"))
    gauge.reset()
    assert gauge.peaks() == {}
    ledger = Ledger(watch=gauge)
    ledger.note_peaks("loading")
    assert highest([ledger.total]) == {}


@can_measure
def test_a_run_says_what_each_phase_took(small_models, tmp_path):
    run = kibitz.train(recipe(small_models / "student", small_models / "teacher", tmp_path / "run", steps=2))
    for row in run.metrics:
        assert row["peak_bytes"].keys() == {"sampling", "scoring", "training"}
        assert row["signal_bytes"] == 4 * 48 * row["num_tokens"]  # float32, the teacher's width
        assert min(row["seconds"].values()) > 0
    info = json.loads((run.folder / "run.json").read_text())
    assert info["peak_bytes"].keys() == {"loading", "sampling", "scoring", "training", "evaluation", "saving"}
    assert info["peak_bytes"]["training"] == max(row["peak_bytes"]["training"] for row in run.metrics) > 50 * MIB
    said = costs.memory(read_run(run.folder))
    assert list(said) == ["Loading", "Writing", "Scoring", "Learning", "Evaluating", "Saving"]
    assert all(words.endswith(("MiB", "GiB")) for words in said.values())


# ------------------------------------------------------------------ when signals exist


class Alive:
    """Watches a scorer: the tokens whose hidden states exist when it is called again, and those of each call."""

    def __init__(self, monkeypatch):
        self.before: list[int] = []
        self.made: list[int] = []
        states: list[tuple[weakref.ref, int]] = []
        score = LocalScorer.score

        def watched(scorer, rollouts):
            if scorer.request.kind != "dense":
                return score(scorer, rollouts)
            self.before.append(sum(size for state, size in states if state() is not None))
            signals = score(scorer, rollouts)
            states.extend((weakref.ref(signal.hidden_TD), len(signal.hidden_TD)) for signal in signals)
            self.made.append(sum(len(signal.hidden_TD) for signal in signals))
            return signals

        monkeypatch.setattr(LocalScorer, "score", watched)


@pytest.mark.parametrize("options", [{}, {"reference_kl": 0.1}, {"type": "gkd"}, {"type": "skd"}])
def test_hidden_states_of_a_step_never_exist_together(small_models, tmp_path, monkeypatch, options):
    """Those of a micro-batch are made just before its loss, beside what is left of the one before."""
    method = {"type": "opd", **options}
    optim = {"lr": 1e-3, "tokens_per_micro_batch": 30}
    tree = recipe(small_models / "student", small_models / "teacher", tmp_path / "run", steps=2, method=method)
    alive = Alive(monkeypatch)
    run = kibitz.train({**tree, "optim": optim, "eval": {"every": 0, "num_prompts": 1, "heatmaps": 0}})
    models = 2 if "reference_kl" in options else 1
    assert len(alive.made) >= models * 2 * 8
    assert max(alive.before) <= models * 2 * 30 < min(row["num_tokens"] for row in run.metrics)


LATE = [
    {},
    {"method": {"type": "gkd"}},
    {"method": {"type": "kdrl"}, "data": {"world": "arithmetic"}},
    {"method": {"type": "opd", "support": "sampled", "baseline": True}},
    {"method": {"type": "opd", "support": "top_k"}},
    {"teacher": {"model": "t", "offload": "layers"}},
    {"teacher": {"student": "ema"}},
]
WHOLE = [
    {"method": {"type": "opd", "token_weight": "tip"}},
    {"method": {"type": "opd", "support": "sampled", "discount": 0.9}},
    {"method": {"type": "minillm"}},
    {"method": {"type": "distillm2"}},
    {"teacher": {"model": "t", "store": "s"}},
    {"teacher": {"model": "t", "context": "{{ prompt }}"}},
    {"teacher": {"model": "t", "tokenizer": "own"}, "method": {"type": "opd", "support": "sampled"}},
    {"teacher": {"model": "t", "offload": "body"}},
    {"teacher": [{"model": "t"}, {"model": "u"}]},
    {"teacher": {"url": "http://127.0.0.1:1"}, "method": {"type": "opd", "support": "top_k"}},
]


@pytest.mark.parametrize(("late", "sections"), [*((True, one) for one in LATE), *((False, one) for one in WHOLE)])
def test_a_recipe_says_whether_a_step_is_scored_late(late, sections):
    """Late: what a token is told matters to its own loss alone, and the teacher reads a micro-batch as it reads a step."""
    assert Recipe.model_validate({**LEAST, **sections}).scores_late() is late
