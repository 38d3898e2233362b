"""Graders turn a response into a reward: `(prompt, text) -> float`.

A grader sees text only. One that raises, or gives what is no number, stops the run: a reward that is silently 0 teaches the
wrong thing. So does a row that its grader cannot read, which `check` finds before any weights load.
"""

from collections.abc import Callable, Mapping, Sequence

from kibitz.graders import sandbox
from kibitz.graders.answers import (
    check_answer,
    check_choice,
    check_math,
    choice,
    exact,
    is_math,
    is_serial,
    math,
    option_of,
)
from kibitz.graders.code import code, tests_of
from kibitz.graders.constraints import constraints, constraints_of, constraints_strict
from kibitz.graders.instructions import check_packages, ifeval, ifeval_strict, instructions_of
from kibitz.graders.tasks import verify
from kibitz.types import Prompt

__all__ = [
    "GRADERS",
    "Grader",
    "choice",
    "code",
    "constraints",
    "constraints_strict",
    "exact",
    "ifeval",
    "ifeval_strict",
    "math",
    "pick",
    "verify",
]

Grader = Callable[[Prompt, str], float]

GRADERS: dict[str, Grader] = {
    "exact": exact,
    "math": math,
    "choice": choice,
    "constraints": constraints,
    "constraints_strict": constraints_strict,
    "ifeval": ifeval,
    "ifeval_strict": ifeval_strict,
    "code": code,
}
ANSWERS = (exact, math, choice)
CHECKS: tuple[tuple[Grader, Callable[[Prompt], object]], ...] = (
    (exact, check_answer),
    (math, check_math),
    (choice, check_choice),
    (constraints, constraints_of),
    (constraints_strict, constraints_of),
    (ifeval, instructions_of),
    (ifeval_strict, instructions_of),
    (code, tests_of),
)
"""Each grader of ours, and what raises ValueError for a row that it cannot read."""
COLUMNS: Mapping[Callable[[Prompt], object], str] = {
    constraints_of: "constraints",
    instructions_of: "instruction_id_list",
    tests_of: "tests",
}
"""What reads a row -> the column that a row without anything to grade against does not have."""

SAMPLE = 500
"""Answers that `auto` looks at, spread over the rows: each can take milliseconds to parse."""


def pick(name: str, prompts: Sequence[Prompt], world_grader: Grader | None = None) -> Grader | None:
    """The grader that a recipe names; None if `auto` finds nothing to grade against.

    `code` is refused here, before any weights load, where programs cannot be confined, and `ifeval` without its packages."""
    if name == "auto":
        return world_grader or _by_answers(prompts)
    if name not in GRADERS:
        names = ", ".join(["auto", *GRADERS])
        raise ValueError(
            f"data.grader: there is no grader {name!r}: write one of {names}, or pass a function in Python"
        )
    if name == "code":
        sandbox.check()
    elif name.startswith("ifeval"):
        check_packages()
    return GRADERS[name]


def _by_answers(prompts: Sequence[Prompt]) -> Grader | None:
    """The first grader that calls each answer right that is its own response: options, then mathematics, then any text.
    Dates and the like are text, unless most of the answers are not of that kind."""
    answers = sorted({prompt.answer for prompt in prompts if prompt.answer is not None})
    if not answers:
        return None
    if len(answers) > 1 and all(len(option := option_of(answer)) == 1 and option in "ABCDEFGHIJ" for answer in answers):
        return choice
    sample = answers[:: -(-len(answers) // SAMPLE)]
    if 2 * sum(map(is_serial, sample)) >= len(sample):
        return exact
    return math if all(map(is_math, sample)) else exact


def is_graded(grader: Grader, prompt: Prompt) -> bool:
    """Return whether the row has what a built-in grader compares with; a user's own grader takes every row."""
    if any(grader is own for own in ANSWERS):
        return prompt.answer is not None
    test = next((test for own, test in CHECKS if own is grader), None)
    return test is None or prompt.columns.get(COLUMNS[test]) is not None


def check(grader: Grader, prompts: Sequence[Prompt], need_all: bool = False) -> None:
    """ValueError, which names the row, for the first row that a grader of ours cannot read. Rows that hold nothing for it go
    ungraded, unless all `need` a reward."""
    test = next((test for own, test in CHECKS if own is grader), None)
    if test is None:
        return
    for number, prompt in enumerate(prompts, 1):
        if need_all or is_graded(grader, prompt):
            try:
                test(prompt)
            except ValueError as error:
                raise ValueError(f"row {number} ({prompt.text[:60]!r}): {error}") from None


def describe(name: str, grader: Grader | None, prompts: Sequence[Prompt]) -> list[str]:
    """Return notes on the rewards: which grader `auto` chose, and how many rows get none."""
    own = next((own for own, grader_of_ours in GRADERS.items() if grader_of_ours is grader), None)
    if grader is None or own is None:
        return []
    ungraded = sum(not is_graded(grader, prompt) for prompt in prompts)
    said = f"responses are graded by data.grader={own}" + (", by what the answers are" if name == "auto" else "")
    rest = f"{ungraded} of {len(prompts)} prompts hold nothing to grade against and get no reward"
    return [f"{said}; {rest}" if ungraded else said] if ungraded or name == "auto" else []
