"""Graders that compare a response with the row's answer."""

import logging
import re
import threading

from kibitz.types import Prompt

MATH_SECONDS = 5
"""For parsing a text and for comparing two expressions, each; an expression can be made to take forever."""


def exact(prompt: Prompt, text: str) -> float:
    """1 if the text is the answer, up to white space around it."""
    return float(text.strip() == _answer(prompt).strip())


def math(prompt: Prompt, text: str) -> float:
    """1 if the last mathematical expression of the text equals the answer, by math-verify.

    GSM8K's answers, worked solutions that end in `#### 18`, are understood. Outside the main thread there is no
    limit of time."""
    from math_verify import parse, verify

    for module in ("parser", "grader"):
        logging.getLogger(f"math_verify.{module}").addFilter(_worth_saying)
    # math-verify bounds its time by an alarm signal, which only the main thread can have.
    seconds = MATH_SECONDS if _in_main_thread() else 0
    answer = _answer(prompt).rsplit("####", 1)[-1].strip()
    gold = parse(f"${answer}$", parsing_timeout=seconds) or parse(answer, parsing_timeout=seconds)
    return float(verify(gold, parse(text, parsing_timeout=seconds), timeout_seconds=seconds))


def choice(prompt: Prompt, text: str) -> float:
    """1 if the last letter standing alone, A to J, is the answer."""
    letters = re.findall(r"(?<![A-Za-z])\(?([A-J])\)?(?![A-Za-z])", text)
    return float(bool(letters) and letters[-1] == _answer(prompt).strip().strip("()").upper())


def _answer(prompt: Prompt) -> str:
    if prompt.answer is None:
        raise ValueError(
            f"prompt {prompt.key} has no answer to grade against: add the column, or choose prompts that have it"
        )
    return prompt.answer


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _worth_saying(record: logging.LogRecord) -> bool:
    """All that math-verify logs but the advice to set a timeout, where none can be set."""
    return _in_main_thread() or not str(record.msg).startswith("Timeout is disabled")
