"""Instructions in the form of IFEval, by the checkers of lm-evaluation-harness."""

import importlib.util
import json

import pytest

from kibitz import graders
from kibitz.graders import instructions
from kibitz.types import Prompt

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in instructions.PACKAGES),
    reason="kibitz[evals] is not installed",
)


def a_prompt(*given) -> Prompt:
    columns = {
        "instruction_id_list": [name for name, _ in given],
        "kwargs": [options for _, options in given],
    }
    return Prompt((1,), "q", "k", columns=columns)


GERMAN = "Das ist ein kurzer Text, und er ist in deutscher Sprache geschrieben."


@pytest.mark.parametrize(
    ("name", "options", "good", "bad"),
    [
        ("punctuation:no_comma", {}, "No such sign.", "Well, one."),
        ("keywords:existence", {"keywords": ["river", "moon"]}, "The moon over a River.", "The moon alone."),
        ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "a cat"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
        ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "a: 1"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a"),
        ("startend:end_checker", {"end_phrase": "Bye."}, "So long. Bye.", "Bye. So long."),
        ("language:response_language", {"language": "de"}, GERMAN, "This text is written in English by somebody."),
        ("change_case:english_lowercase", {}, "this is a text in small letters", "This is one that is not"),
    ],
)
def test_each_instruction_is_judged_by_its_own_checker(name, options, good, bad):
    prompt = a_prompt((name, options))
    assert [graders.ifeval(prompt, text) for text in (good, bad, " \n")] == [1, 0, 0]


def test_a_share_or_all_of_them():
    gaps = {"num_words": 3, "relation": "less than", "keywords": None}  # a table fills the gaps of a row with null
    prompt = a_prompt(("length_constraints:number_words", gaps), ("punctuation:no_comma", None))
    assert [graders.ifeval(prompt, text) for text in ("one, two", "one two", "one, two, three")] == [0.5, 1, 0]
    assert [graders.ifeval_strict(prompt, text) for text in ("one, two", "one two")] == [0, 1]


def test_a_language_is_told_the_same_each_time():
    prompt = a_prompt(("language:response_language", {"language": "de"}))
    texts = ["der die", "a b c", "es ist so", "ja nein ok"]
    found = [[graders.ifeval(prompt, text) for text in texts] for _ in range(5)]
    assert all(row == found[0] for row in found)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"instruction_id_list": 5}, "no instructions: the column `instruction_id_list`"),
        ({"instruction_id_list": []}, "no instructions"),
        ({"instruction_id_list": [5], "kwargs": [{}]}, "each is the name of an instruction"),
        ({"instruction_id_list": ["punctuation:no_comma"]}, "kwargs: a list of 1"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}, {}]}, "kwargs: a list of 1"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": ["x"]}, "kwargs: the options"),
        ({"instruction_id_list": ["no_comma"], "kwargs": [{}]}, "did you mean 'punctuation:no_comma'"),
        (
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": None}]},
            "lacks keywords, and a value drawn by chance",
        ),
        (
            {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": 3}]},
            'with {"num_words": 3} is refused',
        ),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 3, "relation": "=="}],
            },
            "is refused: The supported relation",
        ),
    ],
)
def test_a_row_that_cannot_be_checked_is_named_before_any_weights_load(columns, message):
    prompt = Prompt((1,), "q", "k", columns=columns)
    with pytest.raises(ValueError) as caught:
        graders.check(graders.ifeval, [prompt])
    assert "row 1 ('q'): " in str(caught.value) and message in str(caught.value)


def test_a_keyword_that_takes_forever_is_not_followed(monkeypatch):
    monkeypatch.setattr(instructions._worker, "most", 0.5)
    assert graders.ifeval(a_prompt(("keywords:existence", {"keywords": ["(a+)+$"]})), "a" * 40 + "b") == 0
    assert graders.ifeval(a_prompt(("punctuation:no_comma", {})), "still there") == 1


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(instructions, "PACKAGES", ("lm_eval", "no_such_package"))
    with pytest.raises(ValueError, match=r"needs no_such_package: pip install 'kibitz\[evals\]'"):
        graders.pick("ifeval_strict", [])


def test_rows_of_the_benchmark_are_read_and_graded_by_the_command(tmp_path, models):
    from typer.testing import CliRunner

    from kibitz.cli import app

    words = "length_constraints:number_words"
    rows = [
        {"prompt": "1+1=", "instruction_id_list": [words], "kwargs": [{"num_words": 99, "relation": "less than"}]},
        {"prompt": "2+1=", "instruction_id_list": [words], "kwargs": [{"num_words": 99, "relation": "at least"}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["eval", str(models[0]), "--json", "--prompts", str(path), "data.grader=ifeval", "rollout.max_tokens=4"]
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["sampled"]["accuracy"] == 0.5
