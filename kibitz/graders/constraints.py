"""Constraints on the form of a response that can be verified, in the manner of IFEval (arXiv:2311.07911).

A row's column `constraints` is a list such as

    [{"type": "max_words", "count": 50}, {"type": "contains", "keywords": ["tea", "milk"]}, {"type": "json"}]

All of them hold for any language, as far as it separates words by white space where words are counted. Lengths are
of the text without white space around it. An empty response satisfies nothing.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kibitz.graders.inside.forms import CONSTRAINTS, KINDS
from kibitz.graders.worker import Worker
from kibitz.types import Prompt

SECONDS = 1.0
"""For one constraint on one text, of CPU time; a pattern of the row's own can take forever. One that takes longer fails."""

_worker = Worker("forms", SECONDS)


def constraints(prompt: Prompt, text: str) -> float:
    """The share of the row's constraints that the text satisfies."""
    satisfied = check(prompt, text)
    return sum(satisfied) / len(satisfied)


def constraints_strict(prompt: Prompt, text: str) -> float:
    """1 if the text satisfies all the row's constraints."""
    return float(all(check(prompt, text)))


def check(prompt: Prompt, text: str) -> list[bool]:
    """Return for each of the row's constraints whether the text satisfies it. Raise ValueError for an unknown constraint."""
    try:
        rows = constraints_of(prompt)
    except ValueError as error:
        raise ValueError(f"prompt {prompt.key}: {error}") from None
    text = text.strip()
    return [bool(text) and satisfies(text, name, options) for name, options in rows]


def satisfies(text: str, name: str, options: Mapping[str, Any]) -> bool:
    """Return whether a text satisfies a constraint; False if that cannot be decided in time."""
    return _worker.ask(ask="constraint", name=name, text=text, options=options) is True


def constraints_of(prompt: Prompt) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of each of the row's constraints. ValueError for one that is none."""
    rows = prompt.columns.get("constraints")
    if not rows or isinstance(rows, str | Mapping) or not isinstance(rows, Sequence):
        raise ValueError('no constraints: the column `constraints` is a list of {"type": ..., ...}')
    try:
        return [_bind(row) for row in rows]
    except ValueError as error:
        raise ValueError(f"constraints: {error}") from None


def _bind(row: Any) -> tuple[str, dict[str, Any]]:
    """The name of a constraint and its options. Columns of a table hold None where a row leaves an option out."""
    if not isinstance(row, Mapping) or "type" not in row:
        raise ValueError(f'a constraint is {{"type": ..., ...}}, not {str(row)[:100]}')
    name = row["type"]
    if not isinstance(name, str) or name not in CONSTRAINTS:
        near = difflib.get_close_matches(str(name), CONSTRAINTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(CONSTRAINTS)}"
        raise ValueError(f"there is no constraint {name!r}: {hint}")
    options = {key: value for key, value in row.items() if key != "type" and value is not None}
    function = CONSTRAINTS[name]
    try:
        inspect.signature(function).bind("", **options)
    except TypeError as error:
        raise ValueError(f"the constraint {name} takes {_options(function)}: {error}") from None
    for option, value in options.items():
        _check_option(name, option, value)
    return name, options


def _options(function: Callable[..., bool]) -> str:
    return (
        ", ".join(str(option) for option in list(inspect.signature(function).parameters.values())[1:]) or "no options"
    )


def _check_option(name: str, option: str, value: Any) -> None:
    kind = KINDS[option]
    if kind is list:
        fits = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
        fits = fits and all(isinstance(part, str) and part for part in value)
    else:
        fits = type(value) is kind and not (kind is int and value < 0)
    if not fits:
        expected = {list: "a list of texts", int: "a whole number from 0", str: "a text", bool: "true or false"}[kind]
        raise ValueError(f"the constraint {name} has {option} = {value!r}: write {expected}")
    if option == "pattern":
        try:
            re.compile(str(value))
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"the constraint {name} has a pattern that is no regular expression, {value!r}: {error}"
            ) from None
