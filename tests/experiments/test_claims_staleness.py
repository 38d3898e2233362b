"""The rule of the claim about text of older weights, on made-up numbers, and what it reads of two experiments."""

import pytest

from kibitz.experiments.claims import staleness
from kibitz.experiments.claims.staleness import FULL, NAVIGATION, find, verdict
from kibitz.experiments.results import NotRun, Results


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([(0.01, 0.02), (-0.01, 0.02)], "reproduced"),
        ([(0.01, 0.02), (-0.01, 0.04)], "partly"),
        ([(0.01, 0.02), (-0.03, 0.02)], "not"),
        ([(0.05, 0.02), (-0.03, 0.031)], "partly"),
    ],
)
def test_the_verdict_turns_with_the_intervals(differences, expected):
    assert verdict(dict(enumerate(differences))) == expected


def test_only_the_weights_that_write_differ():
    on, ahead = (arm.changes for arm in FULL)
    assert on["method"] == ahead["method"]
    assert on["rollout"] == {"max_staleness": 0} and ahead["rollout"] == {"max_staleness": 1}
    assert NAVIGATION.arms == staleness.EXPERIMENT.arms


def test_without_runs_there_is_no_finding(tmp_path):
    with pytest.raises(NotRun):
        find(Results(staleness.EXPERIMENT, tmp_path / "staleness"))
