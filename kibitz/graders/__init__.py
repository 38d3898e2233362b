"""From a response to a reward: `(prompt, text) -> float`.

A grader sees text only. One that raises, or gives what is no number, stops the run: a reward that is silently 0 teaches the
wrong thing. So does a row that its grader cannot read, which `check` finds before any weights load.
"""

from collections.abc import Callable, Sequence

from kibitz.graders import sandbox
from kibitz.graders.answers import check_answer, check_choice, check_math, choice, exact, is_math, math, option_of
from kibitz.graders.code import code, tests_of
from kibitz.graders.constraints import constraints, constraints_of, constraints_strict
from kibitz.types import Prompt

__all__ = ["GRADERS", "Grader", "check", "choice", "code", "constraints", "constraints_strict", "exact", "math", "pick"]

Grader = Callable[[Prompt, str], float]

GRADERS: dict[str, Grader] = {
    "exact": exact,
    "math": math,
    "choice": choice,
    "constraints": constraints,
    "constraints_strict": constraints_strict,
    "code": code,
}
CHECKS: dict[Grader, Callable[[Prompt], object]] = {
    exact: check_answer,
    math: check_math,
    choice: check_choice,
    constraints: constraints_of,
    constraints_strict: constraints_of,
    code: tests_of,
}
COLUMNS: dict[Grader, str] = {constraints: "constraints", constraints_strict: "constraints", code: "tests"}
"""What a grader reads in place of the answer."""

SAMPLE = 500
"""Answers that `auto` looks at, spread over the rows: each can take milliseconds to parse."""


def pick(name: str, prompts: Sequence[Prompt], world_grader: Grader | None = None) -> Grader | None:
    """The grader that a recipe names; None if `auto` finds nothing to grade against.

    `code` is refused here, before any weights load, where programs cannot be confined."""
    if name == "auto":
        return world_grader or _by_answers(prompts)
    if name not in GRADERS:
        names = ", ".join(["auto", *GRADERS])
        raise ValueError(
            f"data.grader: there is no grader {name!r}: write one of {names}, or pass a function in Python"
        )
    if name == "code":
        sandbox.check()
    return GRADERS[name]


def _by_answers(prompts: Sequence[Prompt]) -> Grader | None:
    """The first grader that calls each answer right that is its own response: options, then mathematics, then any text."""
    answers = sorted({prompt.answer for prompt in prompts if prompt.answer is not None})
    if not answers:
        return None
    if len(answers) > 1 and all(len(option := option_of(answer)) == 1 and option in "ABCDEFGHIJ" for answer in answers):
        return choice
    return math if all(map(is_math, answers[:: -(-len(answers) // SAMPLE)])) else exact


def graded(grader: Grader, prompt: Prompt) -> bool:
    """Whether the row has what the grader compares with."""
    if grader not in CHECKS:
        return True
    column = COLUMNS.get(grader)
    return prompt.answer is not None if column is None else prompt.columns.get(column) is not None


def check(grader: Grader, prompts: Sequence[Prompt], all_of_them: bool) -> None:
    """ValueError, which names the row, for the first row that a grader of ours cannot read. Rows that hold nothing for it are
    left to go ungraded, unless `all_of_them` must have a reward."""
    test = CHECKS.get(grader)
    if test is None:
        return
    for number, prompt in enumerate(prompts, 1):
        if all_of_them or graded(grader, prompt):
            try:
                test(prompt)
            except ValueError as error:
                raise ValueError(f"row {number} ({prompt.text[:60]!r}): {error}") from None
