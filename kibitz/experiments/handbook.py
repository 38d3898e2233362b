"""An invented company for a real language model: documents that state facts nobody can know, questions in words that no document
has, instructions whose obedience can be verified, and policies. All of it is written by a seeded program and is ours."""

import random
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from kibitz.experiments.real import instructions
from kibitz.experiments.records import write_rows

SETS = (1, 2)
"""A handbook for each round of learning; no place of the company is in two of them."""
NUM_DOCUMENTS = 480
NUM_INSTRUCTIONS = {"dev": 64, "test": 256}


@cache
def words() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


@cache
def facts(number: int) -> list[dict[str, Any]]:
    """The facts of one handbook: of each of its places one of every kind."""
    known, drawn = words(), random.Random(f"handbook {number}")
    places = known["places"][number - 1 :: len(SETS)]
    return [
        {"place": place, "value": drawn.choice(kind["values"]), "kind": kind}
        for place in places
        for kind in known["kinds"]
    ]


def documents(number: int, count: int = NUM_DOCUMENTS) -> list[dict[str, str]]:
    """As many paragraphs of a handbook, each about one of its places: a fact of every kind, in words and an order drawn by
    chance. Each place has as many, or one more."""
    drawn, stated, kinds = random.Random(f"documents {number}"), facts(number), len(words()["kinds"])
    places = [stated[start : start + kinds] for start in range(0, len(stated), kinds)]
    rows = [
        {
            "prompt": f"Tell me something from the handbook of {words()['company']}.",
            "response": " ".join(
                _filled(drawn.choice(fact["kind"]["sentences"]), fact)
                for fact in drawn.sample(places[turn % len(places)], kinds)
            ),
        }
        for turn in range(count)
    ]
    drawn.shuffle(rows)
    return rows


def questions(number: int, split: str) -> list[dict[str, Any]]:
    """One about each fact in dev, two in test; their words are different, and stand in no document."""
    return [
        {"prompt": _filled(question, fact), "constraints": [{"type": "regex", "pattern": rf"(?i)\b{fact['value']}\b"}]}
        for fact in facts(number)
        for question in (fact["kind"]["questions"][1:] if split == "test" else fact["kind"]["questions"][:1])
    ]


def mixed(number: int, share: int) -> list[dict[str, str]]:
    """So many documents in 100 rows, and chat that has no answer yet, in a mixed order; as many rows as documents alone."""
    stated = documents(number, round(NUM_DOCUMENTS * share / 100))
    rows = [*stated, *instructions()["train"][: NUM_DOCUMENTS - len(stated)]]
    random.Random(f"mixed {number}").shuffle(rows)
    return rows


def practised() -> list[dict[str, str]]:
    """Chat of which every second prompt demands a form, worded otherwise than any that is held out; nothing verifies it."""
    drawn, known = random.Random("practised"), words()["practised"]
    return [
        {"prompt": f"{row['prompt']} {drawn.choice(known)}" if turn % 2 else row["prompt"]}
        for turn, row in enumerate(instructions()["train"])
    ]


def demands(split: str) -> list[dict[str, Any]]:
    """Instructions with a demand on the form of the answer."""
    drawn, known = random.Random(f"demands {split}"), words()["demands"]
    asked = [row["prompt"] for row in instructions()[split]][: NUM_INSTRUCTIONS[split]]
    chosen = [(prompt, drawn.choice(known)) for prompt in asked]
    return [{"prompt": f"{prompt} {demand['ask']}", "constraints": [demand["constraint"]]} for prompt, demand in chosen]


def obeyed(policy: str, split: str) -> list[dict[str, Any]]:
    """Chat that says nothing of a policy, and what the policy demands of the answers."""
    return [row | {"constraints": [words()["policies"][policy]["constraint"]]} for row in instructions()[split]]


def _filled(template: str, fact: Mapping[str, Any]) -> str:
    place = fact["place"]
    return template.format(
        place=place, Place=place[:1].upper() + place[1:], value=fact["value"], company=words()["company"]
    )


# ------------------------------------------------------------------ as files


def train_file(name: str, rows: Callable[[], list[dict[str, str]]]) -> Callable[[Any], Path]:
    """A maker of a file to train on."""
    return lambda study: write_rows(study.work / "made" / name / "train.jsonl", rows()).parent


def held_out(name: str, rows: Callable[[str], list[dict[str, Any]]]) -> Callable[[Any], Path]:
    """A maker of files to be measured on."""

    def make(study: Any) -> Path:
        for split in ("dev", "test"):
            write_rows(study.work / "made" / name / f"{split}.jsonl", rows(split))
        return study.work / "made" / name

    return make
