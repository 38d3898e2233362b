"""Sizes: which numbers make which verdict."""

import pytest
from support.records import put, record

from kibitz import experiments
from kibitz.experiments import records
from kibitz.experiments.design import shape
from kibitz.experiments.evidence import finding
from kibitz.experiments.statistics import share_of_way

CAPACITY = experiments.get("capacity")


def grid(folder, small_large: float, large_medium: float, large_large: float) -> None:
    """Students of 40% and 60%, teachers of 100%; the measured problems make an interval of about 3 points."""
    ends = {
        "small-from-medium": small_large,
        "small-from-large": small_large,
        "large-from-medium": large_medium,
        "large-from-large": large_large,
    }
    for arm, share in ends.items():
        row = record(arm, 1e-3, 0, 0.5, share, student_params=2e5, teacher_params=1e6)
        row["test"]["num_prompts"] = 1000
        put(folder, row)
    for role, share in {"student-small": 0.4, "student-large": 0.6, "teacher": 1.0, "teacher-large": 1.0}.items():
        records.write(folder / f"{role}.json", {"test": {"sampled": {"accuracy": share}, "num_prompts": 1000}})


@pytest.mark.parametrize(
    ("small_large", "large_medium", "large_large", "verdict"),
    [
        (0.5, 0.95, 0.85, "reproduced"),
        (0.5, 0.90, 0.90, "partly"),
        (0.9, 0.95, 0.85, "partly"),
        (0.9, 0.90, 0.91, "not"),
    ],
)
def test_the_verdict_follows_the_numbers(tmp_path, small_large, large_medium, large_large, verdict):
    grid(tmp_path / "capacity", small_large, large_medium, large_large)
    found = finding(CAPACITY, tmp_path)
    assert found.verdict == verdict
    assert len(found.numbers["hurt"]) == (large_medium - large_large > 0.05)


def test_a_larger_teacher_that_is_less_able_says_nothing_about_size(tmp_path):
    grid(tmp_path / "capacity", 0.5, 0.95, 0.85)
    records.write(
        tmp_path / "capacity" / "teacher-large.json", {"test": {"sampled": {"accuracy": 0.9}, "num_prompts": 1000}}
    )
    found = finding(CAPACITY, tmp_path)
    assert found.verdict == "partly"
    assert (found.numbers["last"], found.numbers["ablest"]) == (0.9, 1.0)


def test_a_share_of_the_way_takes_its_interval_along():
    assert share_of_way(0.4, (0.55, 0.03), 1.0) == (pytest.approx(0.25), pytest.approx(0.05))


def test_shapes_are_those_of_the_shipped_models():
    assert shape("blank:64x3") == {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 176}
    assert shape("blank:96x4") == {"hidden_size": 96, "num_hidden_layers": 4, "intermediate_size": 256}
