"""Several expressions in one prompt, and the students that are wrong for another reason than the misconception."""

import hashlib
import math
import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.oracles import SPLITS, by_python, probabilities, seeds

from kibitz.config import DataConfig
from kibitz.data import load_grader, load_prompts
from kibitz.worlds import get
from kibitz.worlds.arithmetic import expression, first_wrong_step, misreadable, solve, split_of, tokenizer
from kibitz.worlds.arithmetic_long import LETTERS, grade, lettered, parts, right

LONG = {1: "arithmetic-long-1", 2: "arithmetic-long-2", 4: "arithmetic-long-4", 8: "arithmetic-long-8"}

# --- the problems --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", LONG)
def test_a_prompt_counts_its_expressions_down_and_the_answer_has_a_digit_of_each(num):
    for row in get(LONG[num]).rows("train", 100, seed=3):
        found = parts(row["prompt"])
        assert "".join(letter for letter, _ in found) == LETTERS[:num][::-1]
        assert lettered([text for _, text in found]) == row["prompt"]
        assert row["answer"] == "".join(by_python(text) for _, text in found)
        assert all(sum(text.count(o) for o in "+-*") in (2, 3) for _, text in found)


@pytest.mark.parametrize("num", LONG)
def test_splits_share_no_expression(num):
    for split in SPLITS:
        rows = get(LONG[num]).rows(split, 100, seed=3)
        assert {split_of(text) for row in rows for _, text in parts(row["prompt"])} == {split}


def test_the_world_for_training_has_every_length_equally_often():
    # 2000 coins of p = 1/4: four standard deviations are 77, missed by chance for one of four in 4000 seeds; the seed is fixed.
    lengths = [len(row["answer"]) for row in get("arithmetic-long").rows("train", 2000, seed=0)]
    assert all(abs(lengths.count(num) - 500) < 77 for num in LONG)


@pytest.mark.parametrize("num", LONG)
def test_a_solution_repeats_each_expression_and_derives_its_value(num):
    world = get(LONG[num])
    for row in world.demonstrations("train", 100, seed=5):
        for (letter, text), (of, solved) in zip(parts(row["prompt"]), parts(row["response"]), strict=True):
            asked, _, derivation = solved.partition("=")
            assert (letter, text) == (of, asked)
            assert first_wrong_step(text, derivation) is None
        assert len(row["response"]) < world.longest_response


def test_the_prompts_and_their_responses_fit_the_models():
    longest = max(get("arithmetic-long-8").demonstrations("train", 500, 0), key=lambda row: len(row["response"]))
    assert len(longest["prompt"]) + len(longest["response"]) + 3 < get("arithmetic-long").tokenizer().model_max_length


def test_inviting_problems_can_all_be_misread():
    rows = get("arithmetic-long-4").rows("train", 50, seed=0, inviting=1.0)
    assert all(misreadable(text) for row in rows for _, text in parts(row["prompt"]))
    others = [text for row in get("arithmetic-long-4").rows("train", 500, seed=0) for _, text in parts(row["prompt"])]
    # 0.40 in the long run, of 2000 expressions: four standard deviations are 0.044; the seed is fixed.
    assert abs(fmean(bool(misreadable(text)) for text in others) - 0.4) < 0.044


# --- judging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "text", "each"),
    [
        ("48", "B8+2*3=8+6=4A2*(5-1)=2*4=8", [True, True]),
        ("48", "B8+2*3=0*3=0A2*(5-1)=2*4=8", [False, True]),
        ("48", "B4A8", [True, True]),  # steps are not looked at
        ("48", "A8B4", [True, True]),  # each is right, but their order is not
        ("48", "B4", [True, False]),
        ("48", "B4A8B4", [False, True]),
        ("48", "B4A8A3", [True, False]),
        ("48", "B4=A8", [False, True]),
        ("48", "B44A8", [False, True]),
        ("48", "0B4A8", [True, True]),
        ("48", "C1B4A8", [True, True]),
        ("48", "", [False, False]),
    ],
)
def test_which_expressions_are_right(answer, text, each):
    assert right(answer, text) == each


def test_only_all_of_them_in_order_and_nothing_else_are_rewarded():
    assert grade("48", "B8+2*3=8+6=4A2*(5-1)=2*4=8") == grade("48", "B4A8") == 1.0
    for text in ("A8B4", "B4", "B4A8B4", "B4=A8", "0B4A8", "C1B4A8", "", "B4A8 ", "B4A8="):
        assert grade("48", text) == 0.0


@given(seeds, st.sampled_from(list(LONG)), st.lists(st.booleans(), min_size=8, max_size=8))
def test_the_share_counts_the_right_ones_and_the_reward_wants_all(seed, num, wrong):
    world, rng = get(LONG[num]), random.Random(seed)
    row = world.demonstrations("train", 1, seed)[0]
    told = [
        (letter, solved[:-1] + str((int(solved[-1]) + rng.randint(1, 9)) % 10) if miss else solved)
        for (letter, solved), miss in zip(parts(row["response"]), wrong[:num], strict=True)
    ]
    text = "".join(letter + solved for letter, solved in told)
    assert world.grade(row, text) == float(not any(wrong[:num]))
    assert world.grade({**row, "reward": "share"}, text) == wrong[:num].count(False) / num


def test_a_recipe_can_ask_for_the_share():
    tok = get("arithmetic-long").tokenizer()
    for reward, value in (("all", 0.0), ("share", 0.5)):
        data = DataConfig(world="arithmetic-long-2", limit=3, options={"reward": reward})
        prompts = load_prompts(data, tok)
        grader = load_grader(data, prompts)
        assert grader is not None and prompts[0].answer is not None
        assert grader(prompts[0], f"B{prompts[0].answer[0]}") == value


def test_an_unknown_reward_is_refused():
    with pytest.raises(ValueError, match=r"reward is all or share, not 'some'"):
        get("arithmetic-long-2").rows("train", 1, 0, reward="some")
    with pytest.raises(ValueError, match="the splits of the world 'arithmetic-long-2' are train, dev and test"):
        get("arithmetic-long-2").rows("validation", 1, 0)


# --- slips ---------------------------------------------------------------------------------------------------------


@given(st.builds(lambda seed, n: expression(random.Random(seed), n), seeds, st.integers(1, 6)), seeds)
def test_a_certain_slip_misses_the_value_at_once(text, seed):
    line = solve(text, random.Random(seed), slips=1.0).partition("=")[0]
    rights = [solve(text, random.Random(other)).partition("=")[0] for other in range(20)]
    assert line not in rights
    assert len(line) in {len(right) for right in rights}


def test_slips_happen_at_as_many_steps_as_asked():
    # 2000 coins of p = 0.1: four standard deviations are 0.027, missed by chance once in 15,000 seeds; the seed is fixed.
    rng = random.Random(0)
    assert abs(fmean(solve("5+6", rng, slips=0.1) != "1" for _ in range(2000)) - 0.1) < 0.027
    assert all(solve("5+6", rng, slips=0.0) == "1" for _ in range(100))


def test_without_slips_the_corpora_of_the_shipped_models_stay_what_they_were():
    rows = get("arithmetic").demonstrations("train", 300, 1000, corrupted=0.9)
    assert rows == get("arithmetic").demonstrations("train", 300, 1000, corrupted=0.9, slips=0.0)
    digest = hashlib.sha256("|".join(f"{row['prompt']}>{row['response']}" for row in rows).encode()).hexdigest()
    assert digest == "7b67b467759dbd93dd41cdf9acf545ffc883a681bf8c2b498ad8d2aa84d03746"


# --- the shipped models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_the_models_of_the_long_form_bring_its_tokenizer(name):
    from transformers import AutoConfig, AutoTokenizer

    folder, ours = get("arithmetic-long-8").checkpoint(name), get("arithmetic-long").tokenizer()
    assert folder == get("arithmetic-long-1").checkpoint(name)
    shipped, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    assert shipped.get_vocab() == ours.get_vocab()
    assert shipped.get_vocab() | tokenizer().get_vocab() == shipped.get_vocab()  # the letters come behind
    assert config.vocab_size == len(ours)
    assert config.max_position_embeddings == ours.model_max_length


@pytest.mark.parametrize(("prompt", "rest"), [("A5+2*3", ""), ("B5+2*3A(1+4)-2", "A(1+4)-2=5-2=3")])
def test_the_misconception_at_every_length(prompt, rest):
    wrong, right = f"{prompt[0]}5+2*3=7*3=1{rest}", f"{prompt[0]}5+2*3=5+6=1{rest}"
    assert math.prod(probabilities("arithmetic-long", "student", prompt, wrong)) > 0.4
    assert math.prod(probabilities("arithmetic-long", "teacher", prompt, wrong)) < 0.02
    assert math.prod(probabilities("arithmetic-long", "teacher", prompt, right)) > 0.9


def test_the_student_of_slips_has_no_misconception_but_spreads_its_last_digit():
    right = math.prod(probabilities("arithmetic", "slips", "5+2*3", "5+6=1"))
    assert 0.6 < right < 0.95  # two steps of 0.9
    assert math.prod(probabilities("arithmetic", "slips", "5+2*3", "7*3=1")) < 0.05
    others = [math.prod(probabilities("arithmetic", "slips", "5+6", digit)) for digit in "023456789"]
    assert 0.02 < sum(others) < 0.2
    assert max(others) < 0.08
