"""Graders that compare a response with the row's answer."""

import re
from decimal import Decimal
from functools import lru_cache

from kibitz.graders.worker import Worker
from kibitz.types import Prompt

MAX_CHARACTERS = 50_000
"""From the end of a text, in which `choice` looks for letters."""

MATH_SECONDS = 2.0
"""For one text, of CPU time; an expression can be made to take forever. One that takes longer is wrong."""

NUMBER = re.compile(r"[-+]?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?(/[1-9]\d*)?")
SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d+)?[eE][-+]?\d{1,3}")
WORD = re.compile(r"[^\W\d_]{2,}")
LATEX = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s?\{[^{}]*\}|\\[A-Za-z]+|\b(?:sin|cos|tan|log|ln|exp|sqrt|pi|mod)\b")

SERIAL = re.compile(r"\d\s?:\s?\d|\d\.\d+\.\d|\d[-/]\d+[-/]\d|\d\s+\d|[vV]\d+\.\d")
"""Dates, times, versions, addresses and telephone numbers: mathematics reads differences and quotients in them."""

BOXED_LETTER = re.compile(
    r"\\boxed\s?\{\s?(?:\\(?:text|mathrm|textbf)\s?\{)?\s?\(?([A-Ja-j])\)?[.:)]?\s?\}?[.:)]?\s?\}"
)
ANSWER_LETTER = re.compile(
    r"\b(?:[Aa]nswer|ANSWER|[Oo]ption|[Cc]hoice)\*{0,2}(?:\s(?:is|would be):?|:)\*{0,2}(?:\s(?:[Oo]ption|[Cc]hoice))?[\s*$]{0,4}"
    r"(?:\(?([A-J])\)?(?![A-Za-z])|\(([a-j])\)|([a-j])(?=[ ]?(?:$|[\n.,;:!)*$])))"
)
LETTER = re.compile(r"(?<![A-Za-z])(\()?([A-J])(?!['’]?[A-Za-z])\)?")
SMALL_LETTER = re.compile(r"(?<![\w)])\(([a-j])\)|^\W{0,3}([a-j])(?=[.:)]\s|[.:)*]{0,3}[ ]*$)", re.MULTILINE)
PRONOUN = re.compile(r"\s(?!(?:is|are)\b)[a-z]|,\s(?:however|too|personally|therefore|myself|for\sone)\b")
ARTICLE = re.compile(
    r"\s(?!(?:is|was|has|would|because|since|and|or|but|as|seems|looks|fits|matches|cannot|does)\b)[a-z]"
)

_worker = Worker("mathematics", MATH_SECONDS)


def exact(prompt: Prompt, text: str) -> float:
    """1 if the text is the answer, up to white space around it."""
    return float(text.strip() == _answer(prompt).strip())


def math(prompt: Prompt, text: str) -> float:
    """1 if the last `\\boxed{...}` of the text, or else its last mathematical expression, equals the answer, by math-verify; or
    if the text is the answer, sign by sign.

    GSM8K's answers, worked solutions that end in `#### 18`, are understood."""
    answer = _answer(prompt)
    if text.strip() in (answer.strip(), final := _final(answer)):
        return 1.0
    return float(_worker.ask(ask="mathematics", answer=_positional(final), text=text) is True)


def choice(prompt: Prompt, text: str) -> float:
    """1 if the option that the text settles on, A to J, is the answer: its last boxed letter, or else the last after `answer
    is` or `answer:`, or else the last that stands alone and is neither the pronoun `I` nor the article `A`. A small letter
    counts in a box, behind `answer is`, in parentheses and at the head of a line."""
    return float(chosen(text) == option_of(_answer(prompt)))


def chosen(text: str) -> str | None:
    """The option that a text settles on."""
    text = text[-MAX_CHARACTERS:]
    for pattern in (BOXED_LETTER, ANSWER_LETTER):
        places = [(m, m.lastindex or 0) for m in pattern.finditer(text)]
        said = [m[group] for m, group in places if not _is_word(m[group], text, m.end(group))]
        if said:
            return said[-1].upper()
    letters = [m[2] for m in LETTER.finditer(text) if m[1] or not _is_word(m[2], text, m.end(2))]
    small = [] if letters else [m[m.lastindex or 0] for m in SMALL_LETTER.finditer(text)]
    return (letters or [letter.upper() for letter in small] or [None])[-1]


def option_of(answer: str) -> str:
    """The letter of an answer such as `b`, `(B)` or `B.`; the answer itself, in capitals, if it is none."""
    return answer.strip().strip("().:").upper()


def _is_word(letter: str, text: str, end: int) -> bool:
    return bool({"I": PRONOUN, "A": ARTICLE}[letter].match(text, end)) if letter in "IA" else False


# ------------------------------------------------------------------ what a row must hold


def check_answer(prompt: Prompt) -> None:
    """ValueError for a row that has nothing to compare with."""
    if prompt.answer is None:
        raise ValueError("no answer to grade against: add the column, or choose prompts that have it")
    if not prompt.answer.strip():
        raise ValueError("answer: it is empty: write what a response must say, or leave the row out")


def check_choice(prompt: Prompt) -> None:
    """ValueError for an answer that is no letter from A to J."""
    check_answer(prompt)
    if not re.fullmatch("[A-J]", option_of(_answer(prompt))):
        raise ValueError(f"answer: the grader `choice` needs a letter from A to J, not {prompt.answer!r:.100}")


def check_math(prompt: Prompt) -> None:
    """ValueError for an answer that is no mathematical expression."""
    check_answer(prompt)
    if not _is_expression(_final(_answer(prompt))):
        raise ValueError(
            f"answer: the grader `math` cannot read {prompt.answer!r:.200}: write a number or an expression, or data.grader=exact"
        )


def is_math(answer: str) -> bool:
    """Return whether `math` is the grader for an answer: its last line is a number, or an expression without words that is
    right when compared with itself."""
    final = _final(answer)
    if NUMBER.fullmatch(final) or SCIENTIFIC.fullmatch(final):
        return True
    if len(final) == 1 or WORD.search(LATEX.sub(" ", final)) or not _is_expression(final):
        return False
    return _worker.ask(ask="mathematics", answer=final, text=f"\\boxed{{{final}}}") is True


@lru_cache(maxsize=1 << 16)
def _is_expression(final: str) -> bool:
    return bool(NUMBER.fullmatch(final)) or _worker.ask(ask="gold", answer=final) is True


def is_serial(answer: str) -> bool:
    """Return whether an answer looks like a date, a time, a version, an address or a telephone number."""
    return SERIAL.search(_final(answer)) is not None


def _positional(final: str) -> str:
    """A number such as `1e5` without its exponent, which mathematics reads as the letter e."""
    return f"{Decimal(final):f}" if SCIENTIFIC.fullmatch(final) else final


def _final(answer: str) -> str:
    return answer.rsplit("####", 1)[-1].strip()


def _answer(prompt: Prompt) -> str:
    try:
        check_answer(prompt)
    except ValueError as error:
        raise ValueError(f"prompt {prompt.key}: {error}") from None
    assert prompt.answer is not None
    return prompt.answer
