"""The toy worlds: what they generate is true, what they judge is judged right, and nothing depends on the process."""

import json
import math
import os
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracles import SPLITS, by_python, probabilities, seeds

from kibitz.worlds import WORLDS, get, navigation
from kibitz.worlds.arithmetic import (
    CHARACTERS,
    expression,
    first_wrong_step,
    grade,
    misreadable,
    reduce,
    reducible,
    reversible,
    solve,
    tokenizer,
    value,
)
from kibitz.worlds.characters import ASSISTANT

expressions = st.builds(
    lambda seed, num_operators: expression(random.Random(seed), num_operators),
    st.integers(0, 2**32),
    st.integers(1, 8),
)


def brute_force_first_wrong(prompt: str, response: str) -> int | None:
    """The oracle: every derivation is written out; the error is where the longest common beginning ends."""
    if len(prompt) == 1:
        return 0

    def derivations(text: str) -> list[str]:
        if len(text) == 1:
            return [text]
        return [f"{text}={rest}" for at in reducible(text) for rest in derivations(reduce(text, at))]

    right = [whole.partition("=")[2] for whole in derivations(prompt)]
    if response in right:
        return None
    return max(at for at in range(len(response) + 1) for whole in right if whole.startswith(response[:at]))


# --- expressions and solutions -------------------------------------------------------------------------------------


@given(expressions)
def test_value_agrees_with_python(text):
    assert value(text) == by_python(text)


@given(expressions, seeds)
def test_every_line_of_a_solution_keeps_the_value(text, seed):
    lines = solve(text, random.Random(seed)).split("=")
    assert [by_python(line) for line in lines] == [by_python(text)] * len(lines)
    assert len(lines) == sum(text.count(operator) for operator in "+-*")
    assert len(lines[-1]) == 1


@given(expressions, seeds, st.floats(0, 1), st.floats(0, 1))
def test_corrupted_solutions_stay_reducible(text, seed, corrupted, backwards):
    lines = solve(text, random.Random(seed), corrupted, backwards=backwards).split("=")
    for before, after in zip([text, *lines], lines, strict=False):
        assert after in {reduce(before, at) for at in reducible(before) + misreadable(before) + reversible(before)}
    assert len(lines[-1]) == 1


@given(expressions)
def test_an_expression_longer_than_a_digit_can_always_be_reduced(text):
    assert reducible(text)


def test_the_misconception_reads_from_left_to_right():
    assert solve("5+2*3", random.Random(0), corrupted=1.0) == "7*3=1"
    assert solve("5+2*3", random.Random(0), corrupted=0.0) == "5+6=1"
    assert solve("5+(2*3)", random.Random(0), corrupted=1.0) == "5+6=1"
    assert misreadable("4*5+2*3") == []  # the 5 belongs to the 4
    assert misreadable("1+2-3*4") == [2]


def test_the_other_misconception_takes_equals_after_a_minus_from_the_right():
    assert solve("9-5-3", random.Random(0), backwards=1.0) == "9-2=7"
    assert solve("9-5+3", random.Random(0), backwards=1.0) == "9-8=1"
    assert reversible("9-5-3") == [2]
    assert reversible("9+5-3") == reversible("9-5*3") == reversible("9-(5-3)") == []


def test_corruption_happens_as_often_as_asked():
    # 2000 coins of p = 0.9: four standard deviations are 0.027, missed by chance once in 15,000 seeds; the seed is fixed.
    rng = random.Random(0)
    wrong = sum(solve("5+2*3", rng, corrupted=0.9) == "7*3=1" for _ in range(2000)) / 2000
    assert abs(wrong - 0.9) < 0.027


def test_pairs_of_equal_rank_are_reduced_from_the_left():
    assert reducible("9-4-3") == [0]
    assert reducible("2*3*4") == [0]
    assert reducible("2*3-4*5") == [0, 4]
    assert reducible("1-(2+3)") == [3]


# --- judging -------------------------------------------------------------------------------------------------------


@given(expressions, seeds)
def test_grade_accepts_exactly_the_true_value(text, seed):
    response = solve(text, random.Random(seed))
    assert [grade(digit, response) for digit in "0123456789"] == [float(d == by_python(text)) for d in "0123456789"]


@pytest.mark.parametrize("text", ["", "5+6=", "5+6=11", "5+6=1=", "5+6=1 ", "5+6=(1)", "5+6=1)", "5+6=+1", "1=5+6"])
def test_grade_refuses_what_is_not_cleanly_the_answer(text):
    assert grade("1", text) == 0.0


def test_grade_of_an_answer_without_steps():
    assert grade("1", "1") == 1.0
    assert grade("1", "2") == 0.0


@pytest.mark.parametrize(
    ("prompt", "response", "where"),
    [
        ("5+(2*3)", "5+6=1", None),
        ("5+(2*3)", "5+2=7", 2),  # the 2 is wrong; what follows from it is not looked at
        ("5+(2*3)-4", "5+6-4=1-4=7", None),
        ("5+(2*3)-4", "5+6-4=5-2=3", 6),
        ("5+2*3", "7*3=1", 0),
        ("5+2*3", "5+6=2", 4),
        ("5+2*3", "5+6=1=1", 5),  # nothing may follow the last digit
        ("5+2*3", "5+6=11", 5),
        ("5+2*3", "5+6", 3),  # stops before it is done
        ("5+2*3", "5+6=", 4),
        ("5+2*3", "5+", 2),
        ("5+2*3", "", 0),
        ("2*3-4*5", "2*3-0=6-0=6", None),
        ("2*3-4*5", "6-4*5=6-0=6", None),
        ("2*3-4*5", "6-0=6", 2),  # two steps in one line
    ],
)
def test_first_wrong_step(prompt, response, where):
    assert first_wrong_step(prompt, response) == where


@given(
    st.builds(lambda seed, n: expression(random.Random(seed), n), seeds, st.integers(1, 4)),
    seeds,
    st.integers(0, 40),
    st.sampled_from([*CHARACTERS, ""]),
)
def test_first_wrong_step_against_all_derivations(text, seed, at, character):
    response = solve(text, random.Random(seed), corrupted=0.5)
    damaged = response[:at] + character + response[at + 1 :]
    assert first_wrong_step(text, response) == brute_force_first_wrong(text, response)
    assert first_wrong_step(text, damaged) == brute_force_first_wrong(text, damaged)


# --- the worlds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORLDS)
def test_splits_share_nothing_and_rows_are_distinct(name):
    world = get(name)
    prompts = {split: [row["prompt"] for row in world.rows(split, 400, seed=3)] for split in SPLITS}
    if not name.startswith("assistant"):  # which asks a hundred questions again and again
        assert all(len(set(of_split)) == 400 for of_split in prompts.values())
    assert not set(prompts["train"]) & set(prompts["dev"])
    assert not set(prompts["train"]) & set(prompts["test"])
    assert not set(prompts["dev"]) & set(prompts["test"])


def test_no_seed_moves_an_expression_to_another_split():
    # With few operators the space is small, so that lists of other seeds do meet the same expressions.
    world = get("arithmetic-wide")
    dev = {row["prompt"] for row in world.rows("dev", 300, seed=0)}
    other_dev = {row["prompt"] for row in world.rows("dev", 300, seed=1)}
    train = {row["prompt"] for row in world.rows("train", 5000, seed=1)}
    assert dev & other_dev
    assert not dev & train


@pytest.mark.parametrize("name", WORLDS)
def test_a_short_list_is_the_head_of_a_long_one_and_seeds_differ(name):
    world = get(name)
    assert world.rows("dev", 50, seed=1) == world.rows("dev", 200, seed=1)[:50]
    assert world.rows("dev", 50, seed=1) != world.rows("dev", 50, seed=2)


@pytest.mark.parametrize("name", WORLDS)
def test_demonstrations_are_the_rows_with_right_solutions(name):
    world = get(name)
    demonstrations = world.demonstrations("train", 200, seed=5)
    rows = world.rows("train", 200, seed=5)
    assert [{key: demo[key] for key in row} for demo, row in zip(demonstrations, rows, strict=True)] == rows
    assert all(world.grade(row, row["response"]) == 1.0 for row in demonstrations)


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic-wide"])
def test_demonstrations_of_arithmetic_are_derivations(name):
    rows = get(name).demonstrations("train", 200, seed=5)
    assert all(first_wrong_step(row["prompt"], row["response"]) is None for row in rows)


def test_corrupted_demonstrations_are_often_wrong_but_keep_the_true_answer():
    demonstrations = get("arithmetic").demonstrations("train", 1000, seed=5, corrupted=0.9)
    assert all(row["answer"] == by_python(row["prompt"]) for row in demonstrations)
    right = sum(grade(row["answer"], row["response"]) for row in demonstrations) / 1000
    assert 0.66 < right < 0.78  # 0.72 in the long run; the seed is fixed


def test_operators_stay_in_range():
    counts = {sum(row["prompt"].count(o) for o in "+-*") for row in get("arithmetic").rows("train", 300, seed=0)}
    assert counts == {3, 4, 5}


@pytest.mark.parametrize("name", WORLDS)
def test_nothing_depends_on_the_hash_seed(name):
    script = (
        f"import json; from kibitz.worlds import get; w = get('{name}');"
        "print(json.dumps([w.rows('dev', 20, 7), w.demonstrations('train', 20, 7, 0.9)]))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    world = get(name)
    assert [json.loads(output) for output in outputs] == 2 * [
        [world.rows("dev", 20, 7), world.demonstrations("train", 20, 7, 0.9)]
    ]


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="did you mean 'arithmetic'.*arithmetic-wide"):
        get("aritmetic")
    with pytest.raises(ValueError, match="train, dev and test; there is no 'validation'"):
        get("arithmetic").rows("validation", 1, 0)
    with pytest.raises(ValueError, match="ships no model 'oracle'; it ships: slips, student, teacher, undertrained"):
        get("arithmetic").checkpoint("oracle")


# --- navigation ----------------------------------------------------------------------------------------------------


def arrives(prompt: str, walk: str) -> bool:
    """The oracle: complex numbers, north is i."""
    start, goal = (complex(int(prompt[at]), int(prompt[at + 1])) for at in (0, 3))
    turn = {"N": 1j, "E": 1, "S": -1j, "W": -1}
    return start + sum(turn[letter] for letter in prompt[6:] + walk) == goal


walks = st.text(alphabet="NESW", max_size=12)


@given(st.sampled_from(navigation.problems()), walks, walks)
def test_a_walk_is_judged_by_where_it_ends(problem, strays, walk):
    assert navigation.grade(f"{problem}:{strays}", walk) == float(arrives(f"{problem}:{strays}", walk))


@given(st.sampled_from(navigation.problems()), walks, seeds)
def test_demonstrated_walks_are_shortest(problem, strays, seed):
    prompt = f"{problem}:{strays}"
    walk = navigation.shortest(prompt, random.Random(seed))
    assert arrives(prompt, walk)
    assert len(walk) == sum(map(abs, navigation.missing(prompt)))


def test_what_is_no_walk_is_wrong():
    assert navigation.grade("25>46:", "ENE") == 1.0
    assert [navigation.grade("25>46:", text) for text in ("", "ENE ", "ENE.", "ene", "46", "EN", "ENEE")] == [0.0] * 7


def test_every_order_of_steps_is_equally_likely():
    # 3000 draws of 3 orders: each 1000 with a deviation of 26; five deviations are missed once in a million seeds.
    rng = random.Random(0)
    drawn = [navigation.shortest("25>46:", rng) for _ in range(3000)]
    assert all(abs(drawn.count(walk) - 1000) < 130 for walk in ("EEN", "ENE", "NEE"))


def test_there_are_no_more_problems_than_there_are():
    world = get("navigation")
    found = [row["prompt"][:5] for split in SPLITS for row in world.rows(split, 10**6, 0)]
    assert sorted(found) == sorted(navigation.problems())
    assert len(found) == 81 * 80


def test_no_problem_of_the_test_split_is_met_astray():
    test = {row["prompt"][:5] for row in get("navigation").rows("test", 10**6, 0)}
    rows = get("navigation-astray").rows("train", 5000, 1000)
    assert not test & {row["prompt"][:5] for row in rows}
    assert {len(row["prompt"]) - 6 for row in rows} == set(range(9))
    assert all(navigation.missing(row["prompt"]) != (0, 0) for row in rows)


def test_a_corrupted_walk_has_one_other_step():
    rows = get("navigation").demonstrations("train", 300, 0, corrupted=1.0)
    assert [get("navigation").grade(row, row["response"]) for row in rows] == [0.0] * 300
    assert all(len(row["response"]) == sum(map(abs, navigation.missing(row["prompt"]))) for row in rows)


def test_steps_in_the_prompt_read_like_those_of_the_walker():
    tok = get("navigation").tokenizer()
    user, answer = {"role": "user", "content": "25>46:E"}, {"role": "assistant", "content": "NE"}
    assert tok.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == "<bos>25>46:E"
    assert tok.apply_chat_template([user, answer], tokenize=False) == "<bos>25>46:ENE<eos>"
    assert tok.decode(tok("25>46:ENE")["input_ids"]) == "25>46:ENE"


# --- the tokenizer -------------------------------------------------------------------------------------------------


@settings(deadline=None)  # the first call imports transformers
@given(st.text(alphabet=CHARACTERS, max_size=60))
def test_tokenizer_gives_back_the_exact_text_one_token_a_character(text):
    tok = tokenizer()
    ids = tok(text)["input_ids"]
    assert len(ids) == len(text)
    assert tok.decode(ids) == text


def test_special_tokens_are_distinct_and_outside_the_alphabet():
    tok = tokenizer()
    special = [tok.bos_token_id, tok.eos_token_id, tok.pad_token_id, tok.unk_token_id]
    special.append(tok.convert_tokens_to_ids(ASSISTANT))
    assert len({*special, *tok(CHARACTERS)["input_ids"]}) == len(tok) == 5 + len(CHARACTERS)
    assert tok("5 x")["input_ids"][1:] == [tok.unk_token_id] * 2


def test_chat_template_ends_in_the_generation_prompt_and_continues_into_the_answer():
    tok = tokenizer()
    user = {"role": "user", "content": "5+(2*3)"}
    assistant = {"role": "assistant", "content": "5+6=1"}
    prompt = tok.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    whole = tok.apply_chat_template([user, assistant], tokenize=False)
    assert prompt == "<bos>5+(2*3)<assistant>"
    assert whole == prompt + "5+6=1" + tok.eos_token
    ids = tok(prompt, add_special_tokens=False)["input_ids"]
    assert len(ids) == 2 + len("5+(2*3)")
    assert tok.decode(ids, skip_special_tokens=True) == "5+(2*3)"


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_shipped_models_bring_the_same_tokenizer_and_know_their_end(name):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = get("arithmetic").checkpoint(name)
    ours, shipped = tokenizer(), AutoTokenizer.from_pretrained(folder)
    assert shipped.get_vocab() == ours.get_vocab()
    assert shipped.chat_template == ours.chat_template
    text = "(4-2)*9+7-0=1-3*5+6*8"
    assert shipped(text)["input_ids"] == ours(text)["input_ids"]
    assert shipped.decode(shipped(text)["input_ids"]) == text
    config, generation = AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    assert config.vocab_size >= len(ours)
    for knows in (config, generation):
        assert (knows.bos_token_id, knows.eos_token_id, knows.pad_token_id) == (
            ours.bos_token_id,
            ours.eos_token_id,
            ours.pad_token_id,
        )


def test_the_teacher_blames_the_wrong_turn_and_not_what_follows_from_it():
    prompt, response = "5+(2*3)", "5+2=7"
    by_token = probabilities("arithmetic", "teacher", prompt, response)
    fork = first_wrong_step(prompt, response)
    assert by_token[fork] < 0.01
    assert all(probability > 0.95 for at, probability in enumerate(by_token) if at != fork)


def test_the_student_has_the_misconception_and_the_teacher_has_not():
    wrong, right = "7*3=1", "5+6=1"
    assert math.prod(probabilities("arithmetic", "student", "5+2*3", wrong)) > 0.5
    assert math.prod(probabilities("arithmetic", "teacher", "5+2*3", wrong)) < 0.01
    assert math.prod(probabilities("arithmetic", "teacher", "5+2*3", right)) > 0.9
