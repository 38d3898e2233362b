"""Instructions in the form of IFEval (arXiv:2311.07911), judged by its own checkers, those of lm-evaluation-harness.

A row has the columns of that benchmark:

    {"prompt": "...", "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
     "kwargs": [{}, {"num_words": 50, "relation": "at least"}]}

Judgement is the strict one: the text as it is. Checkers run in a process of their own, because keywords of a row are regular
expressions there, which can take forever.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from kibitz.graders.worker import Worker
from kibitz.types import Prompt

SECONDS = 5.0
"""For all instructions on one text, of CPU time. A text that takes longer follows none."""
PACKAGES = ("lm_eval", "langdetect", "immutabledict", "nltk")

_worker = Worker("ifeval", SECONDS)


def check_packages() -> None:
    """Raise ValueError where a package is missing that the checkers need."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"data.grader=ifeval needs {', '.join(missing)}: pip install 'kibitz[evals]'")


def ifeval(prompt: Prompt, text: str) -> float:
    """The share of the row's instructions that the text follows."""
    found = followed(prompt, text)
    return sum(found) / len(found)


def ifeval_strict(prompt: Prompt, text: str) -> float:
    """1 if the text follows all the row's instructions."""
    return float(all(followed(prompt, text)))


def followed(prompt: Prompt, text: str) -> list[bool]:
    """Return for each of the row's instructions whether the text follows it. ValueError for columns that are none of IFEval's."""
    try:
        names, options = _columns(prompt)
    except ValueError as error:
        raise ValueError(f"prompt {prompt.key}: {error}") from None
    found = _worker.ask(ask="followed", names=names, options=options, text=text)
    return [False] * len(names) if found is None else found


def instructions_of(prompt: Prompt) -> tuple[list[str], list[dict[str, Any]]]:
    """Names and options of the row's instructions. ValueError for one that cannot be checked."""
    names, options = _columns(prompt)
    check_packages()
    if said := _worker.ask(ask="unreadable", names=names, options=options):
        raise ValueError(f"instruction_id_list: {said}")
    return names, options


def _columns(prompt: Prompt) -> tuple[list[str], list[dict[str, Any]]]:
    names, options = (prompt.columns.get(column) for column in ("instruction_id_list", "kwargs"))
    if not isinstance(names, Sequence) or isinstance(names, str) or not names:
        raise ValueError("no instructions: the column `instruction_id_list` is a list of IFEval's names")
    if not all(isinstance(name, str) for name in names):
        raise ValueError("instruction_id_list: each is the name of an instruction, such as 'punctuation:no_comma'")
    if not isinstance(options, Sequence) or isinstance(options, str) or len(options) != len(names):
        raise ValueError(f"kwargs: a list of {len(names)}, the options of each of instruction_id_list")
    if not all(isinstance(given, Mapping) or given is None for given in options):
        raise ValueError("kwargs: the options of an instruction are a mapping such as {num_words: 50}")
    return list(names), [dict(given or {}) for given in options]
