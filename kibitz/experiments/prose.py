"""The page of a claim: a Markdown file beside the experiment's code, a template that is filled with the numbers of its `find`.

The front matter is YAML: `published` and `source`, what was claimed and where; `short`, the same in a few words; `ours`, the
result in a few words; `verdict`, the one that the text was written for; and, where they are wanted, `headline`, a sentence
for the README, `order`, its place among the headlines and claims, and `like`, another claim whose text this one shares.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import inf
from pathlib import Path
from typing import Any

import yaml
from jinja2 import ChainableUndefined, Environment, FileSystemLoader, StrictUndefined, Undefined

from kibitz.experiments.formats import FILTERS, NONE

CLAIMS = Path(__file__).with_name("claims")
FENCE = "---\n"


class Missing(ChainableUndefined):
    """A number that some run would have given and that was not made."""

    def __str__(self) -> str:
        return NONE


def _environment(undefined: type[Undefined]) -> Environment:
    loader = FileSystemLoader(CLAIMS)  # for tables that several claims include
    found = Environment(loader=loader, undefined=undefined, trim_blocks=True, lstrip_blocks=True)
    found.filters.update({name: _or_missing(write) for name, write in FILTERS.items()})
    return found


def _or_missing(write: Callable[..., str]) -> Callable[..., str]:
    return lambda value, *options: NONE if isinstance(value, Missing) else write(value, *options)


LENIENT, STRICT = _environment(Missing), _environment(StrictUndefined)


@dataclass(frozen=True)
class Prose:
    """The contents of a claim's Markdown file. `ours`, `headline` and `body` are templates."""

    published: str
    source: str
    short: str
    ours: str
    verdict: str
    body: str
    headline: str = ""
    order: float = inf


@cache
def prose(name: str) -> Prose:
    """The text of a claim, by the name of its experiment."""
    path = CLAIMS / f"{name.replace('-', '_')}.md"
    if not path.is_file():
        raise ValueError(f"the claim {name} has no text: write {path.name} beside its experiment")
    head, _, body = path.read_text(encoding="utf-8").removeprefix(FENCE).partition(f"\n{FENCE}")
    fields: dict[str, Any] = yaml.safe_load(head)
    if "like" in fields:
        base = prose(fields.pop("like"))
        fields = {"published": base.published, "source": base.source, "short": base.short, "ours": base.ours, **fields}
        body = body.strip() or base.body
    return Prose(body=body.strip(), **fields)


def filled(template: str, numbers: Mapping[str, Any], strict: bool = False) -> str:
    """A template with its numbers. One that is missing is a dash, because some arms may not have been run; or an error."""
    return (STRICT if strict else LENIENT).from_string(template).render(numbers).strip()
