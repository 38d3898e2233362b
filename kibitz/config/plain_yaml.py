"""YAML as recipes are written in it: each key once, numbers as in JSON, and no text that grows when it is read."""

import json
import math
import re
from collections.abc import Iterable
from typing import Any

import yaml

from kibitz.config.base import RecipeError

MAX_CHARACTERS, MAX_NODES, MAX_DEPTH = 1_000_000, 100_000, 32
LARGEST = 2**53
"""Beyond it a float, and so many a reader of JSON, does not hold every integer."""

INT = re.compile(r"[-+]?(?:0|[1-9](?:_?[0-9])*)$")
FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|(?:0|[1-9](?:_?[0-9])*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$")  # fmt: skip  # noqa: E501
OURS = {"int": (INT, "-+0123456789"), "float": (FLOAT, "-+.0123456789")}
NOT_OURS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp", "value")}


def _table(without: set[str]) -> dict[str, list]:
    """PyYAML's table of what a plain scalar is, by its first sign, with our numbers in it."""
    given = yaml.SafeLoader.yaml_implicit_resolvers
    table = {sign: [pair for pair in pairs if pair[0] not in without] for sign, pairs in given.items()}
    for name, (pattern, signs) in OURS.items():
        for sign in signs:
            table.setdefault(sign, []).append((f"tag:yaml.org,2002:{name}", pattern))
    return table


class _Loader(yaml.SafeLoader):
    """1e-4 is a number; 010, 1:30, 2026-11-26 and = are text."""

    yaml_implicit_resolvers = _table(NOT_OURS)

    def get_single_data(self) -> Any:
        """The tree of the one document; it is looked at before it is built."""
        node = self.get_single_node()
        _measure(node, {}, ())
        return None if node is None else self.construct_document(node)


class _Dumper(yaml.SafeDumper):
    """Quotes what any reader of YAML could take for a number."""

    yaml_implicit_resolvers = _table(set())


def _int(loader: _Loader, node: yaml.ScalarNode) -> int:
    digits = loader.construct_scalar(node).replace("_", "")
    if len(digits) > 20:
        raise RecipeError(f"line {node.start_mark.line + 1}: {digits[:20]}... is too large a number")
    return int(digits)


_Loader.add_constructor("tag:yaml.org,2002:int", _int)


def parse(text: str) -> Any:
    """The tree of a YAML text. RecipeError, with the lines, for a key that stands twice, and for more than a recipe can be:
    nested deeper than 32, or with aliases that multiply it; yaml.YAMLError for what is no YAML."""
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"{len(text):,} characters are no recipe: the limit is {MAX_CHARACTERS:,}")
    try:
        return yaml.load(text, _Loader)  # a SafeLoader, as far as tags go
    except RecursionError:
        raise _too_deep() from None
    except (RecipeError, yaml.YAMLError):
        raise
    except Exception as error:  # noqa: BLE001 - a tag that PyYAML cannot build from what stands behind it, as `!!bool 3`
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


def dump(tree: Any, width: int = 80) -> str:
    """YAML that `parse` reads as the same tree, in lines of about `width` characters."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)


def mistake(error: Exception) -> str:
    """What is wrong with a text and in which line, as one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {' '.join((error.problem or str(error.context)).split())}"
    return " ".join(str(error).split())


def check_plain(value: Any, place: str = "", depth: int = 0) -> None:
    """Raise RecipeError, with its place, for what no field of a recipe can be: an integer beyond 2^53, a number that is not
    finite, half a character, a NUL, or a tree deeper than 32."""
    if depth > MAX_DEPTH:
        raise _too_deep()
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            check_plain(item, f"{place}.{key}" if place else str(key), depth + 1)
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise RecipeError(f"{place}: an integer in a recipe is at most 2^53, got one of {value.bit_length()} bits")
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"{place}: write a finite number, got {value}")
    elif isinstance(value, str) and "\0" in value:
        raise RecipeError(f"{place}: {value!r:.100} holds a NUL, which no name of a file can hold")
    elif isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
        raise RecipeError(f"{place}: {ascii(value)[:100]} holds half a surrogate pair, which is no character")


def as_tree(source: dict) -> dict:
    """A copy of a dict, of what JSON can say. RecipeError for anything else."""
    try:
        return json.loads(json.dumps(source))
    except RecursionError:
        raise _too_deep() from None
    except (TypeError, ValueError) as error:
        raise RecipeError(f"a recipe holds text, numbers, true, false, null, lists and mappings: {error}") from None


def _too_deep() -> RecipeError:
    return RecipeError(f"a recipe is nested at most {MAX_DEPTH} deep, and this goes deeper")


def _measure(node: yaml.Node | None, known: dict[int, int], above: tuple[int, ...]) -> int:
    """The number of nodes that a node stands for once its aliases are written out."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above or len(above) >= MAX_DEPTH:
        raise _too_deep()
    if id(node) not in known:
        if isinstance(node, yaml.MappingNode):
            _once_each(node)
        inside: Iterable[Any] = (
            (part for pair in node.value for part in pair) if isinstance(node, yaml.MappingNode) else node.value
        )
        known[id(node)] = 1 + sum(_measure(child, known, (*above, id(node))) for child in inside)
    if known[id(node)] > MAX_NODES:
        raise RecipeError(
            f"line {node.start_mark.line + 1}: its aliases multiply it to more than {MAX_NODES:,} entries, which is no recipe"
        )
    return known[id(node)]


def _once_each(node: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise RecipeError(
                    f"the key {key.value!r} stands twice, in line {lines[name]} and in line {line}: leave one out"
                )
            lines[name] = line
