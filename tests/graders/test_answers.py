"""Graders of answers; which of them `auto` takes; and the process that they ask."""

import logging
import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kibitz import graders
from kibitz.graders.answers import chosen
from kibitz.graders.code import program_of
from kibitz.graders.worker import Patience, Worker
from kibitz.types import Prompt


def a_prompt(answer: str | None = None, **columns) -> Prompt:
    return Prompt((1,), "q", "k", answer=answer, columns=columns)


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("12", r"\boxed{10}. Hmm, let me check this again: 5+7=12. So the answer is \boxed{12}.", 1),
        ("10", r"\boxed{10}. Hmm, let me check this again: 5+7=12. So the answer is \boxed{12}.", 0),
        ("12", r"$\boxed{12}$ and not $13$, which is \boxed{", 1),
        ("1/2", r"first \boxed{\frac{1}{3}}, then $\boxed{\frac{1}{2}}$, or 7", 1),
        ("1, 2", r"\boxed{1}, \boxed{2}", 1),
        ("1, 2", r"\boxed{1,2}", 1),
        ("12%", r"so $\boxed{12}\%$", 1),
        ("5", r"\boxed 5", 1),
        ("4", "", 0),
    ],
)
def test_the_last_box_counts(answer, text, reward):
    assert graders.math(a_prompt(answer), text) == reward


def test_mathematics_from_any_thread():
    rewards = []
    thread = threading.Thread(target=lambda: rewards.append(graders.math(a_prompt("1/2"), "it is 0.5")))
    thread.start()
    thread.join()
    assert rewards == [1.0]


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("Answer: A\nI am sure.", "A"),
        ("I think it is C", "C"),
        ("The answer is I think B", "B"),
        ("C\nI would say so.", "C"),
        ("I've chosen D and I'll stay", "D"),
        ("A good choice is B. A dog is none.", "B"),
        ("B is wrong, so A is right", "A"),
        ("**Answer:** B\n\nA short note: I like it.", "B"),
        (r"A or B? \boxed{\text{(D)}} I am sure", "D"),
        ("So the option is I", "I"),
        ("(I)", "I"),
        ("nothing here", None),
    ],
)
def test_a_pronoun_is_no_option(text, option):
    assert chosen(text) == option


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("b", "B"),
        ("b)", "B"),
        ("b. Paris", "B"),
        ("(b)", "B"),
        ("**b**", "B"),
        ("Answer: b", "B"),
        ("The correct answer is b.", "B"),
        ("The answer is (b) Paris", "B"),
        ("the answer is e", "E"),
        (r"\boxed{b}", "B"),
        (r"\boxed{\text{(b)}}", "B"),
        ("b) is wrong, so the answer is C", "C"),
        ("**Answer**: B. A and C are wrong", "B"),
        ("The correct option is B, not A", "B"),
        ("D. I, however, doubt it", "D"),
        ("the answer is a dog", None),
        ("e = m c^2", None),
        ("e.g. f(a) and i.e. g(b)", None),
        ("a cat", None),
    ],
)
def test_small_letters_are_options_where_options_stand(text, option):
    assert chosen(text) == option


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("1e5", r"\boxed{100000}"),
        ("1e+22", r"\boxed{10^{22}}"),
        ("-2.5e-3", "-0.0025"),
        ("12", r"so \boxed {12}"),
        ("+1", "+1"),
        ("x+1", "x+1"),
        ("[1,2]", " [1,2]\n"),
        ("work #### $[1,2]$", "$[1,2]$"),
        (r"\text{yes}", r"\text{yes}"),
    ],
)
def test_mathematics_as_data_writes_it(answer, text):
    graders.check(graders.math, [a_prompt(answer)])
    assert graders.math(a_prompt(answer), text) == 1.0
    assert graders.math(a_prompt(answer), r"\boxed{77}") == 0.0


# ------------------------------------------------------------------ what `auto` takes


@pytest.mark.parametrize(
    "answers",
    [
        ["2024-01-05", "2024-02-04"],
        ["10:30", "11:45"],
        ["192.168.0.1", "10.0.0.1"],
        ["v1.2", "v1.3"],
        ["+1 555 1234", "+1 555 4321"],
        ["№3", "№4"],
        ["<a>", "</a>"],
    ],
)
def test_dates_and_the_like_are_text(answers):
    """In each list, mathematics would call two answers equal, none equal to itself, or a row unreadable."""
    prompts = [a_prompt(answer) for answer in answers]
    grader = graders.pick("auto", prompts)
    assert grader is graders.exact
    graders.check(grader, prompts)
    assert graders.pick("auto", [a_prompt("2:3"), a_prompt("4"), a_prompt("5")]) is graders.math


@pytest.mark.parametrize(
    "answers",
    [["a", "b"], ["x+1", "2x"], ["-1", "+1"], ["1e5"], ["Paris"], ["[1,2]"], ["1/2"], [r"\frac12"], ["50%"], ["$5"]],
)
def test_the_grader_of_auto_calls_each_answer_right_that_is_its_own_response(answers):
    prompts = [a_prompt(answer) for answer in answers]
    grader = graders.pick("auto", prompts)
    assert grader is not None
    assert all(grader(prompt, prompt.answer) == 1.0 for prompt in prompts)


@pytest.mark.parametrize(
    ("answers", "grader"),
    [
        (["Paris"], graders.exact),
        (["yes", "no"], graders.exact),
        (["3 apples", "4"], graders.exact),
        (["18", "1,234.5", "-2"], graders.math),
        (["9 * 2 = 18\n#### 18", "from 9:30 to 10:30 on 2024-01-05\n#### 1"], graders.math),
        ([r"\frac{1}{2}", r"\text{Monday}", "x^2+1", r"\sin x"], graders.math),
        (["A", "b", "(C)"], graders.choice),
    ],
)
def test_auto_goes_by_what_the_answers_are(answers, grader):
    prompts = [a_prompt(answer) for answer in answers] + [a_prompt()]
    assert graders.pick("auto", prompts) is grader
    for prompt in prompts[:-1]:
        assert (
            grader(
                prompt,
                f"\\boxed{{{prompt.answer}}}"
                if grader is graders.math
                else prompt.answer.strip("()").upper()
                if grader is graders.choice
                else prompt.answer,
            )
            == 1
        )
    (line,) = graders.describe("auto", grader, prompts)
    assert grader.__name__ in line and f"1 of {len(prompts)} prompts" in line
    assert graders.describe(grader.__name__, grader, prompts[:-1]) == []


@pytest.mark.parametrize(
    ("name", "prompt", "message"),
    [
        ("exact", a_prompt(" "), "answer: it is empty"),
        ("choice", a_prompt("Paris"), "answer: the grader `choice` needs a letter from A to J, not 'Paris'"),
        ("math", a_prompt(r"\frac{"), "answer: the grader `math` cannot read"),
        ("code", a_prompt(tests=5), "tests: a list"),
        ("code", a_prompt(tests={"a": 1}), "tests: a test is"),
        ("code", a_prompt(tests=[1]), "tests: a test is"),
        ("code", a_prompt(tests=["assert ("]), "tests: the test 'assert \\(' is not Python"),
        ("code", a_prompt(tests=["(" * 5000]), "tests: the test"),
        ("code", a_prompt(tests=[]), "no tests"),
        ("code", a_prompt(tests=["assert sum([1, 2]) == 3"]), "tests: they ask nothing of a program"),
        ("code", a_prompt(tests=[{"input": "\ud800", "output": ""}]), "tests: 'utf-8' codec"),
        ("constraints", a_prompt(constraints=5), "no constraints"),
        ("constraints", a_prompt(constraints=[{"type": "x"}]), "constraints: there is no constraint 'x'"),
        ("constraints_strict", a_prompt(constraints=[{"type": ["x"]}]), "constraints: there is no constraint"),
    ],
)
def test_a_row_that_its_grader_cannot_read_is_named(name, prompt, message):
    grader = graders.GRADERS[name]
    with pytest.raises(ValueError, match=rf"row 1 \('q'\): {message}"):
        graders.check(grader, [prompt])


def test_rows_without_anything_to_grade_against():
    for grader in graders.GRADERS.values():
        graders.check(grader, [a_prompt()])
        with pytest.raises(ValueError, match=r"row 1 \('q'\): no "):
            graders.check(grader, [a_prompt()], need_all=True)
        assert not graders.is_graded(grader, a_prompt())
    assert graders.is_graded(lambda prompt, text: 0.0, a_prompt())


# ------------------------------------------------------------------ texts that stall

HUGE = 300_000
HOSTILE = {
    "one long fence": "```" + "a" * HUGE,
    "many fences": "```\n" * HUGE,
    "many boxes": "\\boxed{" * HUGE,
    "boxes in boxes": "\\boxed{" * 9_999 + "}" * 9_999,
    "open braces": "{" * HUGE,
    "dollars": "$" * HUGE,
    "a tower": "$9^{9^{9^{9^9}}}$ 9**9**9**9",
    "a binomial": "$\\binom{1000000000}{500000000}$",
    "a factorial": "$1000000000!$",
    "digits": "9" * HUGE,
    "ends": "!" * HUGE + "a",
    "spaces": "- " + " " * HUGE + "x",
    "letters": "A " * HUGE,
    "answers": "answer is " * HUGE,
    "control characters": "\x1b]0;TITLE\x07\x1b[31m\x9b2J \x00 $\\binom{1000000000}{500000000}$",
    "half characters": "\ud800" * 999 + "$1$",
}
PROMPT = a_prompt(
    "A",
    constraints=[
        {"type": kind, **options}
        for kind, options in (
            ("num_sentences", {"count": 3}),
            ("num_bullets", {"count": 3}),
            ("num_paragraphs", {"count": 3}),
            ("json", {}),
            ("contains", {"keywords": ["x"], "whole_words": True}),
            ("regex", {"pattern": "(a+)+$", "whole": True}),
        )
    ],
)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_text_stalls_a_grader_or_reaches_the_terminal(name, capfd, caplog):
    with caplog.at_level(logging.DEBUG):
        for grader in (graders.exact, graders.choice, graders.constraints):
            assert 0 <= grader(PROMPT, HOSTILE[name]) <= 1
        assert graders.math(a_prompt("123456789"), HOSTILE[name]) == 0
        assert program_of(HOSTILE[name]) is not None
    said = capfd.readouterr()
    assert said.out == said.err == "" and not caplog.records


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("\\boxed{}$^_!9(+)/ frac\x1b]0;\n`-A.I,="), max_size=60))
def test_any_text_gets_a_reward(text):
    for grader in (graders.exact, graders.choice, graders.math, graders.constraints):
        assert 0 <= grader(PROMPT, text) <= 1


def test_a_search_without_end_is_no_match_and_the_next_one_is():
    slow = a_prompt(constraints=[{"type": "regex", "pattern": "(a+)+$"}])
    assert graders.constraints(slow, "a" * 60 + "b") == 0  # 2**60 steps
    assert graders.constraints(slow, "a" * 60) == 1
    assert graders.constraints(a_prompt(constraints=[{"type": "regex", "pattern": "a"}]), "a" * 100_001) == 0


def test_many_stopped_texts_make_the_limit_shorter():
    patience = Patience()
    spent = 0.0
    for _ in range(256):
        spent += patience.seconds(2.0)
        patience.remember(stopped=True)
    assert spent < 100
    for _ in range(64):
        patience.remember(stopped=False)
    assert patience.seconds(2.0) == 2.0


def test_a_worker_that_died_starts_again_and_a_fork_has_its_own():
    worker = Worker("forms", 1.0)
    ask = {"ask": "constraint", "name": "min_words", "text": "a b", "options": {"count": 2}}
    assert worker.ask(**ask) is True
    first = worker.process
    first.kill()
    first.wait()
    assert worker.ask(**ask) is True and worker.process is not first
    if (child := os.fork()) == 0:
        os._exit(0 if worker.ask(**ask) is True and worker.owner == os.getpid() else 1)
    assert os.waitpid(child, 0)[1] == 0 and worker.ask(**ask) is True
    with pytest.raises(RuntimeError, match="the grading process failed"):
        worker.ask(ask="constraint", name="none", text="", options={})
    worker._stop()
