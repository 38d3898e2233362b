"""Three stages: which numbers make which verdict, and model text in the cells of a table."""

import pytest

from kibitz.experiments.claims import pipeline
from kibitz.experiments.formats import code


def levels(facts: tuple[float, float, float], follows: tuple[float, float, float]) -> dict:
    """In percent, with intervals of 3 points."""
    return {
        stage: {"questions": (questions / 100, 0.03), "instructions": (instructions / 100, 0.03)}
        for stage, questions, instructions in zip(pipeline.STAGES, facts, follows, strict=True)
    }


@pytest.mark.parametrize(
    ("facts", "follows", "verdict"),
    [
        ((18, 36, 41), (85, 70, 83), "reproduced"),
        ((18, 36, 41), (85, 83, 84), "not"),  # nothing was lost, and nothing is brought back
        ((18, 36, 19), (85, 70, 83), "partly"),  # the facts went
        ((18, 36, 41), (85, 70, 71), "partly"),
        ((18, 20, 20), (85, 70, 83), "not"),  # mid-training taught nothing
    ],
)
def test_the_verdict_follows_the_numbers(facts, follows, verdict):
    assert pipeline.verdict(levels(facts, follows)) == verdict


def test_model_text_stays_in_its_cell():
    assert code("a|b`c\nd\x1b[31m") == "`a¦b'c d␛[31m`"
    assert code(" \n") == "–"
    assert len(code("x" * 500)) == 62
