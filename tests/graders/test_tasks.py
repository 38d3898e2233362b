"""Families of reasoning-gym: problems, splits and verdicts, and that no answer gets out of the process that judges it."""

import os

import pytest
from support.runs import recipe

import kibitz
from kibitz import config, worlds
from kibitz.config import DataConfig, RecipeError
from kibitz.data import load_grader, load_prompts
from kibitz.data.rows import read_rows
from kibitz.graders import tasks, verify
from kibitz.types import Prompt

pytest.importorskip("reasoning_gym")

SUMS = {"name": "chain_sum", "min_terms": 2, "max_terms": 2, "max_digits": 1}


def asked(row: dict) -> Prompt:
    return Prompt(ids=(1,), text=row["prompt"], key="a", columns=row)


def test_rows_are_a_function_of_split_count_and_seed():
    first = tasks.rows(SUMS, "train", 6, 0)
    assert first == tasks.rows(SUMS, "train", 6, 0)
    assert first[:3] == tasks.rows(SUMS, "train", 3, 0), "a shorter list is the head of a longer one"
    assert len({row["prompt"] for row in first}) == 6
    others = {row["prompt"] for seed in (0, 1) for split in ("dev", "test") for row in tasks.rows(SUMS, split, 6, seed)}
    assert not others & {row["prompt"] for row in tasks.rows(SUMS, "train", 60, 0)}, "no split has another's problems"


def test_a_small_family_gives_what_it_has():
    few = tasks.rows({"name": "coin_flip", "min_trials": 3, "max_trials": 3}, "dev", 3, 0)
    assert 1 <= len(few) <= 3


@pytest.mark.parametrize(
    "name", ["chain_sum", "letter_counting", "spell_backward", "gcd", "syllogism", "string_insertion"]
)
def test_its_own_answer_is_right_and_another_is_not(name):
    row = tasks.rows({"name": name}, "train", 1, 0)[0]
    assert verify(asked(row), row["answer"]) == 1.0
    assert verify(asked(row), f"I think so. <answer>no</answer> Rather: <answer>\n{row['answer']}\n</answer>") == 1.0
    assert verify(asked(row), f"<answer>{row['answer']}</answer>, or <answer>banana</answer>") < 0.5
    assert verify(asked(row), "") < 0.5


def test_an_answer_that_is_code_gets_nothing_from_outside(tmp_path):
    """This family evaluates lists. The same answer, read from a file or after a look outside, is no answer."""
    row = tasks.rows({"name": "string_insertion"}, "train", 1, 0)[0]
    answer, secret = list(row["answer"]), tmp_path / "secret"
    secret.write_text("x")
    ran = 0.1  # what the family gives for a list of the right characters
    assert verify(asked(row), f"({answer}, 1 + 1)[0]") == ran, "it runs what was written, which is why there are walls"
    for tried in (
        f"open({str(secret)!r}).read()",
        f"open({str(tmp_path / 'made')!r}, 'w')",
        "open('here', 'w').write('x')",
        "__import__('os').listdir('/home')",
        "__import__('subprocess').run(['true'])",
        "__import__('socket').create_connection(('127.0.0.1', 9))",
        f"__import__('os').kill({os.getpid()}, 0)",
    ):
        assert verify(asked(row), f"({answer}, {tried})[0]") == 0.0, tried
    assert not (tmp_path / "made").exists()
    os.environ["KIBITZ_TEST_SECRET"] = "x"
    try:
        assert verify(asked(row), f"({answer}, __import__('os').environ['KIBITZ_TEST_SECRET'])[0]") == 0.0
    finally:
        del os.environ["KIBITZ_TEST_SECRET"]
    assert verify(asked(row), f"{answer}") == ran


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "chain_sun"}, "has no family 'chain_sun'; did you mean 'chain_sum'"),
        ({"name": "chain_sum", "max_term": 3}, "has no setting 'max_term'; did you mean 'max_terms'"),
        ({"name": "chain_sum", "max_terms": "3"}, 'max_terms = "3" is no whole number'),
        ({"name": "chain_sum", "max_terms": True}, "max_terms = true is no whole number"),
        ({"name": "chain_sum", "allow_negation": 1}, "allow_negation = 1 is neither true nor false"),
        ({"name": "chain_sum", "max_terms": 1}, "refuses these settings: max_terms must be >= min_terms"),
        ({"name": "chain_sum", "seed": 3}, "seed is decided by the run's seed and data.limit"),
        ({"name": "composite"}, "has no family 'composite'; did you mean '(?!composite)"),
    ],
)
def test_mistakes_are_sentences(section, said):
    with pytest.raises(ValueError, match=said):
        tasks.rows(section, "train", 1, 0)


def test_a_recipe_names_one_source():
    tree = {"student": {"model": "s"}, "method": {"type": "grpo"}}
    for data in ({"world": "arithmetic", "reasoning_gym": SUMS}, {}):
        with pytest.raises(RecipeError, match="one of them"):
            config.load({**tree, "data": data})
    with pytest.raises(RecipeError, match="it needs the name of a family"):
        config.load({**tree, "data": {"reasoning_gym": {"max_terms": 3}}})


def test_prompts_gold_answers_and_the_grader():
    words = worlds.get("arithmetic").tokenizer()
    data = DataConfig(reasoning_gym=SUMS, limit=4)
    prompts = load_prompts(data, words, demonstrations=True)
    assert all(prompt.response == prompt.answer for prompt in prompts)
    grader = load_grader(data, prompts)
    assert grader is verify
    assert [grader(prompt, str(prompt.response)) for prompt in prompts] == [1.0] * 4
    with pytest.raises(ValueError, match="judges problems of data.reasoning_gym only"):
        verify(Prompt(ids=(1,), text="", key="a", columns={"prompt": "1+1"}), "2")
    assert "response" not in next(iter(read_rows(data, 0, False)))[1]


def test_a_run_learns_and_is_evaluated_on_a_family(tmp_path, small_models):
    section = {"reasoning_gym": SUMS, "limit": 12, "world": None, "prompts": None}
    tree = recipe(small_models / "student", small_models / "teacher", tmp_path / "run", data=section)
    tree["eval"] = {"every": 0, "num_prompts": 4, "heatmaps": 0}
    run = kibitz.train(tree)
    assert run.evals[-1]["split"] == "dev" and run.evals[-1]["num_prompts"] == 4
    assert 0 <= run.evals[-1]["sampled"]["accuracy"] <= 1
