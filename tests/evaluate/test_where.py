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


def test_a_number_is_told_once_with_both_of_its_edges_and_counts_are_whole():
    asked = where.features(where.places(rows(4)))
    position, nesting, entropy = (asked[i].words for i in range(3))
    assert position(2.5, None) == "after the first 3 tokens" and position(None, 0.5) == "in the first 1 tokens"
    assert nesting(0.5, 2.5) == "at least 1 and less than 3 brackets deep"
    assert entropy(1.34, None) == "where the teacher's entropy is above 1.3 nats"
    assert entropy(0.1, 0.25) == "where the teacher's entropy is between 0.1 and 0.25 nats"


def test_what_is_so_is_told_first_and_only_a_named_text_spares_what_it_is_not():
    asked = [
        where.Feature(lambda p: p.entropy, "above {}", "at most {}", "between {} and {}"),
        where._of_token("`*`", "*".__eq__, True),
        where._of_before("`)`", ")".__eq__, True),
        where._of_before("a bracket", "([{".__contains__, False),
        where._of_token("a number", str.isdigit, False),
    ]
    yes, no = (0.5, None), (None, 0.5)
    both = "after `)`, where the token is `*`, between 0.1 and 0.2"
    assert where._told({0: (0.1, 0.2), 1: yes, 2: yes, 3: no, 4: no}, asked) == both
    assert where._told({1: no, 2: yes}, asked) == "after `)`, where the token is not `*`"
    assert where._told({2: no, 3: yes}, asked) == "after a bracket, not after `)`"
    assert where._told({}, asked) == "everywhere"


def test_a_sentence_is_true_of_exactly_the_tokens_that_it_counts():
    """Of other prompts: the planted pair is found in every one of its places, and nothing else is counted with it."""
    found = rows()
    first = where.rules(found)[0]
    other = [p for p in where.places(found) if where._half(p.prompt) == 1]
    planted = [p for p in other if (p.before, p.text) == (")", "*")]
    assert first.tokens == pytest.approx(len(planted) / len(other))


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
