"""The constraints on a text, each a function `(text, options) -> bool` in time that grows with the text; only a pattern of a
row's own can take longer. Nothing but the standard library is imported here: a process that grades runs this file."""

import json
import re
from collections.abc import Callable

BULLET = re.compile(r"^[ \t]*(?:[-*+•]|\d+[.)])[ \t]+\S", re.MULTILINE)
SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++(?=\s|$|[\"')\]”’])|[。！？]+|…(?=\s|$)")
FENCE = re.compile(r"\A```\w*[^\S\n]*\n")
MAX_CHARACTERS = 100_000

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
    """Paragraphs are the parts of the text that blank lines separate."""
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
    """The pattern is found, or describes the whole text. A text over MAX_CHARACTERS is not searched."""
    return len(text) <= MAX_CHARACTERS and bool((re.fullmatch if whole else re.search)(pattern, text))


def all_lowercase(text: str) -> bool:
    """No capitals, and at least one letter that has two forms."""
    return text.islower()


def all_uppercase(text: str) -> bool:
    return text.isupper()


def is_json(text: str) -> bool:
    """JSON as the standard has it, NaN left out; one fence of Markdown around it is no matter."""
    if (begin := FENCE.match(text)) and text.endswith("\n```") and begin.end() <= len(text) - 4:
        text = text[begin.end() : -4]
    try:
        json.loads(text, parse_constant=_no_constant, parse_int=str)  # str: a number of any length is one
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
