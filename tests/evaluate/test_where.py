"""The bridge to language: a disagreement that was planted is found, and said in a sentence."""

import random

import pytest

pytest.importorskip("sklearn")

from kibitz.evaluate import where
from kibitz.files import JSONL
from kibitz.report import build


def rows(num: int = 120) -> list[dict]:
    """Solutions of random signs. A `*` right after a `)` costs 3 nats, everything else 0.1."""
    rng = random.Random(0)
    found = []
    for prompt in range(num):
        tokens, before = [], ""
        for _ in range(20):
            text = rng.choice("0123456789()+*")
            cost = 3.0 if (before, text) == (")", "*") else 0.1
            tokens.append(
                {
                    "text": text,
                    "student_logp": -1.0,
                    "teacher_logp": -1.0 - cost,
                    "teacher_top": [("1", 0.5), ("2", 0.5)],
                }
            )
            before = text
        found.append({"step": 0, "prompt": str(prompt), "prompt_key": str(prompt), "response": "", "tokens": tokens})
    return found


def test_the_planted_disagreement_is_the_first_rule():
    """Of 20 tokens, 19 have one before them, and of those 1 in 14 x 14 is the planted pair."""
    first = where.rules(rows())[0]
    assert "after `)`" in first.words and "where the token is `*`" in first.words
    assert first.nats == pytest.approx(3.0)
    assert first.share == pytest.approx(3 * first.tokens / (3 * first.tokens + 0.1 * (1 - first.tokens)))


def test_nesting_and_entropy_are_those_before_the_token():
    (first, second, third, *_) = where.places([{"prompt": "p", "tokens": [token("("), token(")"), token("1")]}])
    assert (first.nesting, second.nesting, third.nesting) == (0, 1, 0)
    assert (first.before, second.before) == ("the beginning", "(")
    assert first.entropy == pytest.approx(0.6931, abs=1e-4)


def token(text: str) -> dict:
    return {"text": text, "student_logp": -1.0, "teacher_logp": -0.5, "teacher_top": [("1", 0.5), ("2", 0.5)]}


def test_what_the_teacher_likes_more_costs_nothing_and_what_it_did_not_judge_is_left_out():
    unjudged = {"text": "x", "student_logp": -1.0}
    assert [place.penalty for place in where.places([{"prompt": "p", "tokens": [token("1"), unjudged]}])] == [0.0]


def test_too_few_tokens_have_a_sentence():
    with pytest.raises(ValueError, match="there are 20 judged tokens, too few for a rule: raise eval.heatmaps"):
        where.rules(rows(1))


def test_the_report_shows_the_sentences_beside_the_heat_map(tmp_path):
    file = JSONL(tmp_path / "rollouts.jsonl")
    for row in rows():
        file.append(row)
    lines = where.write(tmp_path)
    assert where.write(tmp_path) == lines, "a second time replaces the section"
    assert lines[0].startswith("After `)`") or lines[0].startswith("Where the token is `*`")
    text = build([tmp_path]).read_text(encoding="utf-8")
    assert text.count("<h2>Where the teacher disagrees</h2>") == 1
    assert f"<li>{lines[0]}</li>" in text and "What the teacher said" in text
