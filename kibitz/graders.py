"""From a response to a reward: `(prompt, text) -> float`.

A grader sees text only. One that raises stops the run: a reward that is silently 0 teaches the wrong thing.
"""

import re
import threading
from collections.abc import Callable, Sequence

from kibitz.types import Prompt

Grader = Callable[[Prompt, str], float]

MATH_SECONDS = 5
"""For parsing a text and for comparing two expressions, each; an expression can be made to take forever."""


def exact(prompt: Prompt, text: str) -> float:
    """1 if the text is the answer, up to white space around it."""
    return float(text.strip() == _answer(prompt).strip())


def math(prompt: Prompt, text: str) -> float:
    """1 if the last mathematical expression of the text equals the answer, by math-verify.

    GSM8K's answers, worked solutions that end in `#### 18`, are understood."""
    from math_verify import parse, verify

    # math-verify bounds its time by an alarm signal, which only the main thread can have.
    seconds = MATH_SECONDS if threading.current_thread() is threading.main_thread() else None
    answer = _answer(prompt).rsplit("####", 1)[-1].strip()
    gold = parse(f"${answer}$", parsing_timeout=seconds) or parse(answer, parsing_timeout=seconds)
    return float(verify(gold, parse(text, parsing_timeout=seconds), timeout_seconds=seconds))


def choice(prompt: Prompt, text: str) -> float:
    """1 if the last letter standing alone, A to J, is the answer."""
    letters = re.findall(r"(?<![A-Za-z])\(?([A-J])\)?(?![A-Za-z])", text)
    return float(bool(letters) and letters[-1] == _answer(prompt).strip().strip("()").upper())


GRADERS: dict[str, Grader] = {"exact": exact, "math": math, "choice": choice}


def pick(name: str, prompts: Sequence[Prompt], world_grader: Grader | None = None) -> Grader | None:
    """The grader that a recipe names; None if `auto` finds nothing to grade against."""
    if name == "auto":
        return world_grader or (math if any(prompt.answer is not None for prompt in prompts) else None)
    if name not in GRADERS:
        raise ValueError(
            f"data.grader: there is no grader {name!r}: write auto, {', '.join(GRADERS)}, or pass a function in Python"
        )
    return GRADERS[name]


def _answer(prompt: Prompt) -> str:
    if prompt.answer is None:
        raise ValueError(
            f"prompt {prompt.key} has no answer to grade against: add the column, or choose prompts that have it"
        )
    return prompt.answer
