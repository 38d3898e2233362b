"""How much memory each phase took, and what keeps it small without changing a number."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.runs import recipe

import kibitz
from kibitz.ledger import Ledger, highest
from kibitz.report import costs
from kibitz.report.folder import read_run
from kibitz.training.memory import MARK, Gauge

MIB = 2**20
can_measure = pytest.mark.skipif(not MARK.exists(), reason="this system keeps no mark that could be set back")


# ------------------------------------------------------------------ what is measured


PHASES = """
import json, torch
from kibitz.ledger import Ledger
from kibitz.training.memory import Gauge

ledger = Ledger(watch=Gauge(torch.device("cpu")))
with ledger.timed("scoring"):
    torch.ones(120 << 20, dtype=torch.uint8)
with ledger.timed("training"):
    torch.ones(50 << 20, dtype=torch.uint8)
with ledger.watched("evaluation"):
    pass
print(json.dumps([ledger.total["peak_bytes"], ledger.close_step()["peak_bytes"]]))
"""


@can_measure
def test_each_phase_has_its_own_peak():
    """What was freed before the end counts, and does not count for the phase after it. Blocks above 32 MiB are pages of
    their own; smaller ones malloc may take from what it has, and nothing grows. In a process of its own: pages that a large
    process has long not touched may leave memory between two phases."""
    answer = subprocess.run([sys.executable, "-c", PHASES], capture_output=True, text=True, check=True)
    peaks, of_step = json.loads(answer.stdout)
    assert peaks["scoring"] - peaks["training"] == pytest.approx(70 * MIB, abs=15 * MIB)
    assert peaks["training"] - peaks["evaluation"] == pytest.approx(50 * MIB, abs=15 * MIB)
    assert "evaluation" not in of_step


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
    info = json.loads((run.folder / "run.json").read_text())
    assert info["peak_bytes"].keys() == {"loading", "sampling", "scoring", "training", "evaluation", "saving"}
    assert info["peak_bytes"]["training"] == max(row["peak_bytes"]["training"] for row in run.metrics) > 50 * MIB
    said = costs.memory(read_run(run.folder))
    assert list(said) == ["Loading", "Writing", "Scoring", "Learning", "Evaluating", "Saving"]
    assert all(words.endswith(("MiB", "GiB")) for words in said.values())
