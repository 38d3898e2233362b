"""Forking tokens: where a character's token is, what holds a penalty, and which numbers make which verdict."""

import json

import pytest

from kibitz import experiments
from kibitz.experiments import charts
from kibitz.experiments.claims import forking
from kibitz.experiments.evidence import finding, markdown

FORKING = experiments.get("forking")


def tokens(*texts: str) -> list[dict]:
    return [{"text": text} for text in texts]


def test_a_character_is_in_one_token_and_the_end_of_the_text_in_the_end_of_sequence():
    listed = tokens("12", "+3", "=", "<eos>")
    assert [forking.token_at(listed, at) for at in range(5)] == [0, 0, 1, 1, 2]
    assert forking.token_at(listed, 5) == 3
    assert forking.token_at(listed[:3], 5) is None, "a response that was cut off has no such token"
    assert forking.token_at(listed, None) is None
    assert forking.token_at(tokens("<", "1", ">"), 2) == 2, "a sign alone is text"


def test_the_holders_are_the_fewest_tokens_with_that_share():
    assert forking.holders([0.0, 5.0, 1.0, 3.0, -9.0], 0.8) == {1, 3}
    assert forking.holders([0.0, 5.0, 1.0, 3.0, -9.0], 0.5) == {1}
    assert forking.holders([0.0, -1.0]) == set()


def test_a_solution_is_judged_by_its_first_wrong_token():
    """`2+3*4` read from the left: `5*4=0`; the 5 is the first wrong token, the 0 its answer."""
    costs = [2.0, 3.0, 0.0, 0.0, 0.5, 0.0]
    row = {
        "prompt": "2+3*4",
        "response": "5*4=0",
        "at": 4,
        "tokens": [
            {"text": text, "student_logp": 0.0, "teacher_logp": -cost}
            for text, cost in zip([*"5*4=0", "<eos>"], costs, strict=True)
        ],
    }
    one = forking._looked_at(row, forking.first_wrong_step)
    assert (one["rank"], one["wrong"], one["answer"], one["answer_holds"]) == (1, 2.0, 0.5, False)
    assert one["others"] == [3.0, 0.0, 0.0, 0.0] and one["worst_is_later"]
    blind = forking._looked_at(row, None)
    assert (blind["rank"], blind["wrong"]) == (0, 3.0)
    assert forking._looked_at(row | {"prompt": "(2+3)*4"}, forking.first_wrong_step) is None


def probes(folder, exact: float, holds: float, located: bool = True) -> None:
    solutions = {
        "num": 300, "exact": exact, "ranks": [exact, 1 - exact, *[0.0] * 7], "median_rank": 0, "chance": 0.04, "later": 1.0,
        "tokens": 25.0, "holders": 0.1, "wrong_nats": 8.0, "other_nats": 0.0, "num_later": 290, "answer_nats": 0.01,
        "answer_punished": holds, "answer_holds": holds,
    }  # fmt: skip
    example = {"prompt": "2+3*4", "answer": "4", "fork": 0, "instead": "2", "tokens": ["5", "*4=0"], "nats": [8.0, 0.0]}
    about = {"commit": "c0ffee", "date": "2026-11-24", "machine": "toy", "threads": 1}
    for seed in range(2):
        row = {"num_wrong": 300, "located": located, "solutions": solutions, "examples": [example], **about}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"probe-{seed}.json").write_text(json.dumps(row), encoding="utf-8")


@pytest.mark.parametrize(
    ("exact", "holds", "located", "verdict"),
    [
        (0.6, 0.02, True, "reproduced"),
        (0.5, 0.02, True, "partly"),
        (0.6, 0.7, True, "partly"),
        (0.1, 0.02, True, "not"),
        (1.0, 0.1, False, "partly"),
        (1.0, 0.9, False, "not"),
    ],
)
def test_the_verdict_follows_the_numbers(tmp_path, exact, holds, located, verdict):
    probes(tmp_path / "forking", exact, holds, located)
    assert finding(FORKING, tmp_path).verdict == verdict
    assert "2 seeds" in markdown(FORKING, tmp_path)


def test_a_heat_map_shows_the_part_around_the_worst_token():
    cells = list(charts._cells([("a" * 500, 0.0), ("b", 9.0), ("c" * 500, 0.0)]))
    assert len(cells) == charts.COLUMNS * charts.MOST_LINES
    assert [character for _, _, character, nats in cells if nats] == ["b"]
    assert {line for line, *_ in cells} == set(range(charts.MOST_LINES))
