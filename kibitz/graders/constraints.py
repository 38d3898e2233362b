"""Constraints on the form of a response that can be verified, in the manner of IFEval (arXiv:2311.07911).

A row's column `constraints` is a list such as

    [{"type": "max_words", "count": 50}, {"type": "contains", "keywords": ["tea", "milk"]}, {"type": "json"}]

All of them hold for any language, as far as it separates words by white space where words are counted. Lengths are
of the text without white space around it. An empty response satisfies nothing.
"""

import difflib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kibitz.graders.patterns import matches
from kibitz.types import Prompt

BULLET = re.compile(r"^[ \t]*(?:[-*+•]|\d+[.)])[ \t]+\S", re.MULTILINE)
SENTENCE_END = re.compile(r"[.!?]+(?=\s|$|[\"')\]”’])|[。！？]+|…(?=\s|$)")
FENCE = re.compile(r"\A```\w*\s*\n(.*)\n```\Z", re.DOTALL)


def constraints(prompt: Prompt, text: str) -> float:
    """The share of the row's constraints that the text satisfies."""
    satisfied = check(prompt, text)
    return sum(satisfied) / len(satisfied)


def constraints_strict(prompt: Prompt, text: str) -> float:
    """1 if the text satisfies all the row's constraints."""
    return float(all(check(prompt, text)))


def check(prompt: Prompt, text: str) -> list[bool]:
    """Which of the row's constraints the text satisfies. ValueError for a constraint that is none."""
    rows = prompt.columns.get("constraints")
    if not rows or isinstance(rows, str | Mapping):
        raise ValueError(
            f'prompt {prompt.key} has no constraints: the column `constraints` is a list of {{"type": ..., ...}}'
        )
    try:
        bound = [_bind(row) for row in rows]
    except ValueError as error:
        raise ValueError(f"prompt {prompt.key}: {error}") from None
    text = text.strip()
    return [bool(text) and function(text, **options) for function, options in bound]


def _bind(row: Any) -> tuple[Callable[..., bool], dict[str, Any]]:
    """The function of a constraint and its options. Columns of a table hold None where a row leaves an option out."""
    if not isinstance(row, Mapping) or "type" not in row:
        raise ValueError(f'a constraint is {{"type": ..., ...}}, not {str(row)[:100]}')
    name = row["type"]
    if name not in CONSTRAINTS:
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
    return function, options


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


# ------------------------------------------------------------------ how much


def min_words(text: str, count: int) -> bool:
    return len(text.split()) >= count


def max_words(text: str, count: int) -> bool:
    return len(text.split()) <= count


def min_characters(text: str, count: int) -> bool:
    return len(text) >= count


def max_characters(text: str, count: int) -> bool:
    return len(text) <= count


def num_sentences(text: str, count: int) -> bool:
    """Ends of sentences, and a last one that is not ended. Abbreviations count as ends."""
    ends = list(SENTENCE_END.finditer(text))
    rest = text[ends[-1].end() :] if ends else text
    return len(ends) + bool(re.search(r"\w", rest)) == count


def num_bullets(text: str, count: int) -> bool:
    """Lines that begin with -, *, +, • or a number with a dot or a bracket."""
    return len(BULLET.findall(text)) == count


def num_paragraphs(text: str, count: int) -> bool:
    """What blank lines separate."""
    return len(re.split(r"\n\s*\n", text)) == count


def num_lines(text: str, count: int) -> bool:
    """Lines that are not blank."""
    return sum(bool(line.strip()) for line in text.splitlines()) == count


# ------------------------------------------------------------------ what


def contains(text: str, keywords: list[str], whole_words: bool = False) -> bool:
    """All keywords occur, in capitals or not."""
    return all(_count(text, keyword, whole_words) > 0 for keyword in keywords)


def not_contains(text: str, keywords: list[str], whole_words: bool = False) -> bool:
    """No keyword occurs, in capitals or not."""
    return all(_count(text, keyword, whole_words) == 0 for keyword in keywords)


def num_occurrences(text: str, keyword: str, count: int, whole_words: bool = False) -> bool:
    return _count(text, keyword, whole_words) == count


def _count(text: str, keyword: str, whole_words: bool) -> int:
    if not whole_words:
        return text.casefold().count(keyword.casefold())
    return len(re.findall(rf"(?<!\w){re.escape(keyword.casefold())}(?!\w)", text.casefold()))


def starts_with(text: str, prefix: str) -> bool:
    return text.startswith(prefix.strip())


def ends_with(text: str, suffix: str) -> bool:
    return text.endswith(suffix.strip())


def regex(text: str, pattern: str, whole: bool = False) -> bool:
    """The pattern is found, or describes the whole text. A search of more than a second fails."""
    return matches(pattern, text, whole)


def all_lowercase(text: str) -> bool:
    """No capitals, and at least one letter that has two forms."""
    return text.islower()


def all_uppercase(text: str) -> bool:
    return text.isupper()


def is_json(text: str) -> bool:
    """JSON as the standard has it, NaN left out; one fence of Markdown around it is no matter."""
    fenced = FENCE.match(text)
    try:
        json.loads(fenced[1] if fenced else text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


CONSTRAINTS: dict[str, Callable[..., bool]] = {
    "min_words": min_words,
    "max_words": max_words,
    "min_characters": min_characters,
    "max_characters": max_characters,
    "num_sentences": num_sentences,
    "num_bullets": num_bullets,
    "num_paragraphs": num_paragraphs,
    "num_lines": num_lines,
    "contains": contains,
    "not_contains": not_contains,
    "num_occurrences": num_occurrences,
    "starts_with": starts_with,
    "ends_with": ends_with,
    "regex": regex,
    "all_lowercase": all_lowercase,
    "all_uppercase": all_uppercase,
    "json": is_json,
}

KINDS: dict[str, type] = {
    "count": int,
    "keywords": list,
    "keyword": str,
    "whole_words": bool,
    "prefix": str,
    "suffix": str,
    "pattern": str,
    "whole": bool,
}
