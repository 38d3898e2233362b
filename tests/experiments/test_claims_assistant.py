"""Assistant and self-SFT: which numbers make which verdict, and what the tables take from the records."""

import pytest
from support.records import put, record

from kibitz import experiments
from kibitz.experiments import records
from kibitz.experiments.claims import assistant, self_sft
from kibitz.experiments.evidence import finding, markdown
from kibitz.experiments.results import Results

ASSISTANT, SELF_SFT = experiments.get("assistant"), experiments.get("self-sft")
START = {"questions": 0.18, "instructions": 0.85}


def test_a_change_is_taken_seed_by_seed(tmp_path):
    """Seeds that differ a lot and change alike: the interval is that of the change."""
    found = results(tmp_path, {"documents-70": (0.4, 0.6), "recover-70": (0.5, 0.8)}, spread=0.1)
    mean, half = assistant.change(found, "documents-70", "recover-70", "questions")
    assert mean == pytest.approx(0.1) and half == pytest.approx(0, abs=1e-9)
    mean, half = assistant.change(found, None, "recover-70", "instructions")
    assert mean == pytest.approx(-0.05) and half == pytest.approx(4.303 * 0.1 / 3**0.5)


@pytest.mark.parametrize(
    ("gained", "lost", "back", "facts", "verdict"),
    [
        (0.3, -0.2, 0.2, 0.05, "reproduced"),
        (0.3, -0.2, 0.2, -0.01, "reproduced"),  # within its interval
        (0.3, -0.2, 0.2, -0.06, "reproduced"),  # less than a quarter of what was learnt
        (0.3, -0.2, 0.2, -0.1, "partly"),  # the facts go again
        (0.3, -0.2, 0.09, 0.05, "partly"),  # less than half of what was lost
        (0.3, 0.0, 0.2, 0.05, "partly"),  # there was nothing to get back
        (0.3, -0.2, 0.01, 0.05, "not"),
        (0.0, -0.2, 0.2, 0.05, "not"),  # the documents taught nothing
    ],
)
def test_the_verdict_on_the_assistant(gained, lost, back, facts, verdict):
    assert assistant.verdict(*((mean, 0.02) for mean in (gained, lost, back, facts))) == verdict


def test_the_changes_come_from_the_records(tmp_path):
    results(tmp_path, {"documents-100": (0.75, 0.1), "documents-70": (0.5, 0.6), "recover-70": (0.55, 0.8)})
    found = finding(ASSISTANT, tmp_path)
    assert found.verdict == "reproduced"
    assert found.numbers["taken"][0] == pytest.approx(0.6 - 0.85) and found.numbers["back"][0] == pytest.approx(0.2)
    assert found.numbers["facts"][0] == pytest.approx(0.05)
    assert "| 70% documents, 30% chat | 50.0 ± " in markdown(ASSISTANT, tmp_path)


@pytest.mark.parametrize(
    ("own", "taught", "verdict"),
    [
        ((True, True), (False, False), "reproduced"),
        ((False, True), (False, False), "partly"),
        ((True, True), (False, True), "partly"),
        ((False, False), (False, False), "not"),
        ((True, True), (True, True), "not"),
    ],
)
def test_the_verdict_on_self_sft(own, taught, verdict):
    assert self_sft.verdict(list(own), list(taught)) == verdict


def test_pairs_of_optimizer_and_rate_are_counted(tmp_path):
    folder = tmp_path / "self-sft"
    records.write(folder / "student.json", {"test": record("", 0, 0, 0, 0.87)["test"]})
    for method, level, rate, share in (
        ("self-sft", "low", 1e-4, 0.86),
        ("self-sft", "middle", 3e-4, 0.5),
        ("self-sft", "high", 1e-3, 0.0),
        ("opd", "middle", 3e-4, 0.87),
    ):
        arm, series = self_sft.name_of(method, "adamw", level), {"reward": [0.87] * 5 + [share] * 15}
        put(folder, *(record(arm, rate, seed, share, share, series=series) for seed in range(3)))
    found = finding(SELF_SFT, tmp_path)
    assert found.verdict == "partly"
    own, taught = found.numbers["own"], found.numbers["taught"]
    assert (own["below"], own["of"], own["worst"][0]) == (2, 3, 0.0)
    assert (taught["below"], taught["of"]) == (0, 1)
    curve = next(line for line in found.panels[0].lines if line.name == "self-sft, 0.0003").points
    assert [point[:2] for point in curve] == [(5.0, pytest.approx((0.87 + 0.5) / 2)), (15.0, 0.5)]


def runs(arm: str, questions: float, instructions: float, spread: float = 0.0) -> list[dict]:
    found = []
    for seed in range(3):
        off = spread * (seed - 1)
        one = record(arm, 1e-3, seed, questions + off, questions + off)
        other = record(arm, 1e-3, seed, instructions + off, instructions + off)
        for split in ("dev", "test"):
            one[split]["measures"] = {"instructions": other[split]}
        one["settings"] = {"recipe": {"steps": 60}}
        found.append(one | {"step": 20})
    return found


def results(folder, arms: dict, spread: float = 0.0):
    start = record("", 0, 0, 0, START["questions"])["test"]
    start["measures"] = {"instructions": record("", 0, 0, 0, START["instructions"])["test"]}
    records.write(folder / "assistant" / "student.json", {"test": start})
    for arm, levels in arms.items():
        put(folder / "assistant", *runs(arm, *levels, spread=spread))
    return Results(ASSISTANT, folder / "assistant")
