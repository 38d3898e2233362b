"""Problems of the package reasoning-gym: a family makes as many as are wanted, and judges every answer itself.

Everything of that package runs in a confined process (`inside/tasks.py`): some verifiers evaluate what a model wrote.
"""

import hashlib
import importlib.util
import os
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

from kibitz.graders.worker import Worker
from kibitz.types import Prompt

SECONDS = 10.0
"""For one answer, or for a few problems, of CPU time."""
AT_ONCE = 16  # problems
TRIES = 50  # problems made for each one wanted, before a family counts as having no more
ENVIRONMENT = ("PATH", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "KIBITZ_UNSAFE_CODE")
PARTS = {"dev": (0,), "test": (1,)}
"""Split -> tenths of the problems, by a hash of their text; train has the other eight."""
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

_worker = Worker(
    "tasks",
    SECONDS,
    {
        **{name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        **{"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    },
)


def check_family(section: Mapping[str, Any]) -> None:
    """Raise ValueError unless reasoning-gym has the family, with the settings of that name, and can be used here."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError("data.reasoning_gym needs the package of that name: pip install 'kibitz[tasks]'")
    name, options = parts_of(section)
    if said := _worker.ask(ask="family", name=name, options=options):
        raise ValueError(f"data.reasoning_gym: {said}")


def parts_of(section: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The family's name, and its settings."""
    return section["name"], {key: value for key, value in section.items() if key != "name"}


def rows(section: Mapping[str, Any], split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Up to `count` problems of a split, no two alike; fewer where the family has no more."""
    check_family(section)
    name, options = parts_of(section)
    own = random.Random(f"reasoning_gym|{seed}").randrange(1 << 31)  # seeds that follow each other share their problems
    found: dict[str, dict[str, Any]] = {}
    for index, question, answer in _problems(name, options, own, TRIES * count):
        if question not in found and _split_of(question) == split:
            made = {"name": name, "options": options, "seed": own, "index": index}
            found[question] = {"prompt": question, "answer": answer, "task": name, "made": made}
        if len(found) == count:
            break
    if not found:
        raise ValueError(
            f"data.reasoning_gym: the family {name} with these settings makes no problem for the split {split!r}"
        )
    return list(found.values())


def _problems(name: str, options: Mapping[str, Any], seed: int, most: int) -> Iterator[tuple[int, str, str | None]]:
    for start in range(0, most, AT_ONCE):
        made = _worker.ask(ask="problems", name=name, options=options, seed=seed, start=start, count=AT_ONCE)
        if made is None:
            raise ValueError(
                f"data.reasoning_gym: the family {name} takes longer than {SECONDS:g} s for {AT_ONCE} problems: make them "
                "smaller by its settings"
            )
        yield from ((start + place, *one) for place, one in enumerate(made) if one is not None)


def _split_of(question: str) -> str:
    tenth = hashlib.sha256(question.encode()).digest()[0] % 10
    return next((split for split, tenths in PARTS.items() if tenth in tenths), "train")


def verify(prompt: Prompt, text: str) -> float:
    """The score from 0 to 1 that the problem's family gives to the answer in a text; 0 for one that takes too long."""
    made, question = prompt.columns.get("made"), prompt.columns.get("prompt")
    if not isinstance(made, Mapping):
        raise ValueError("the grader `reasoning_gym` judges problems of data.reasoning_gym only")
    return _worker.ask(ask="verify", **made, question=question, text=answer_in(text)) or 0.0


def answer_in(text: str) -> str:
    """What stands in the last `<answer>...</answer>`; without one, the whole text."""
    said = ANSWER.findall(text)
    return (said[-1] if said else text).strip()
