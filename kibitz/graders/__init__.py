"""From a response to a reward: `(prompt, text) -> float`.

A grader sees text only. One that raises stops the run: a reward that is silently 0 teaches the wrong thing.
"""

from collections.abc import Callable, Sequence

from kibitz.graders import sandbox
from kibitz.graders.answers import choice, exact, math
from kibitz.graders.code import code
from kibitz.graders.constraints import constraints, constraints_strict
from kibitz.types import Prompt

__all__ = ["GRADERS", "Grader", "choice", "code", "constraints", "constraints_strict", "exact", "math", "pick"]

Grader = Callable[[Prompt, str], float]

GRADERS: dict[str, Grader] = {
    "exact": exact,
    "math": math,
    "choice": choice,
    "constraints": constraints,
    "constraints_strict": constraints_strict,
    "code": code,
}


def pick(name: str, prompts: Sequence[Prompt], world_grader: Grader | None = None) -> Grader | None:
    """The grader that a recipe names; None if `auto` finds nothing to grade against.

    `code` is refused here, before any weights load, where programs cannot be confined."""
    if name == "auto":
        return world_grader or (math if any(prompt.answer is not None for prompt in prompts) else None)
    if name not in GRADERS:
        names = ", ".join(["auto", *GRADERS])
        raise ValueError(
            f"data.grader: there is no grader {name!r}: write one of {names}, or pass a function in Python"
        )
    if name == "code":
        sandbox.check()
    return GRADERS[name]
