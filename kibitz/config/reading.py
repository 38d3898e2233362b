"""Read a recipe from YAML and `a.b=value` overrides, check it, and write it back. Mistakes are reported as sentences."""

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from kibitz.config import plain_yaml
from kibitz.config.base import RecipeError, Section
from kibitz.config.methods import METHOD_CONFIGS, method_type
from kibitz.config.recipe import Recipe
from kibitz.config.teachers import SEVERAL, TEACHER_CONFIGS

TAGGED: dict[str, dict[str, Any]] = {"method": METHOD_CONFIGS, "teacher": TEACHER_CONFIGS}
"""The sections that are one of several kinds."""
Kind = TypeVar("Kind", bound=Section)


def load(source: "str | Path | dict | Recipe", overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Return a checked recipe from a YAML file, a dict or a recipe, with `a.b=value` overrides (values are YAML)."""
    return load_as(Recipe, source, overrides)


def load_as(
    kind: type[Kind], source: "str | Path | dict | Section", overrides: list[str] | tuple[str, ...] = ()
) -> Kind:
    """The same of a recipe of another kind, such as those of `kibitz control`."""
    if isinstance(source, Section):
        tree = source.model_dump(mode="json", exclude_unset=True)
    elif isinstance(source, dict):
        tree = plain_yaml.as_tree(source)
    else:
        tree = read_tree(Path(source))
    for override in overrides:
        _assign(tree, override)
    plain_yaml.check_plain(tree)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(_explain(error, kind)) from None


def read_tree(path: Path) -> dict:
    """Return what a recipe file holds, unchecked. RecipeError, with the line, if it is no YAML of a recipe."""
    if not path.is_file():
        raise RecipeError(f"there is no recipe at {path}")
    try:
        tree = plain_yaml.parse(path.read_text(encoding="utf-8"))
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {plain_yaml.mistake(error)}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path} holds no recipe: it must start with keys such as student: and data:")
    return tree


def _assign(tree: dict, override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise RecipeError(f"cannot read the override {override!r}: write a.b=value, such as optim.lr=1e-4")
    try:
        value = plain_yaml.parse(text)
    except RecipeError as error:
        raise RecipeError(f"cannot read the override {override[:80]!r}: {error}") from None
    except yaml.YAMLError:
        value = text
    *parents, last = path.strip().split(".")
    if parents[:1] == ["method"]:
        _drop_twins(tree.get("method"), [*parents[1:], last])
    node: Any = tree
    for name in parents:
        place: Any = _place(node, name, override) if isinstance(node, list) else name
        if isinstance(node, dict):
            node.setdefault(name, {})
        if not isinstance(node[place], dict | list):
            node[place] = {}
        node = node[place]
    node[_place(node, last, override) if isinstance(node, list) else last] = value


def _drop_twins(method: Any, place: list[str]) -> None:
    """Remove the same setting from the other place in which its method allows it, so that the override replaces it."""
    section = METHOD_CONFIGS.get(method_type(method) or "")
    for name, inner in section.also_here.items() if section is not None and isinstance(method, dict) else ():
        if place == [name] and isinstance(method.get(inner), dict):
            method[inner].pop(name, None)
        elif place in ([inner], [inner, name]):
            method.pop(name, None)


def _place(entries: list, name: str, override: str) -> int:
    """Return the index of an entry in a list, such as the 1 of `teacher.1.weight`."""
    if not re.fullmatch("[0-9]{1,9}", name) or int(name) >= len(entries):
        raise RecipeError(
            f"cannot read the override {override!r}: {name} is none of the {len(entries)} entries, 0 and on"
        )
    return int(name)


def _explain(error: ValidationError, kind: type[Section]) -> str:
    lines, tagged = [], TAGGED if kind is Recipe else {}
    for problem in error.errors():
        place = ".".join(str(part) for part in _without_tags(problem["loc"], tagged))
        match problem["type"]:
            case "extra_forbidden":
                lines.append(f"unknown key {place}{_nearest(problem['loc'], kind, tagged)}")
            case "missing":
                lines.append(f"{place} is missing")
            case "union_tag_invalid" | "union_tag_not_found":
                lines.append(_of_a_method(place, problem["input"]))
            case "model_type" | "model_attributes_type":
                lines.append(
                    f"{place}: a section is needed, got {problem['input']!r}: write {_as_section(place, problem, kind, tagged)}"
                )
            case "value_error":
                lines.append((f"{place}: " if place else "") + problem["msg"].removeprefix("Value error, "))
            case _:
                said = f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
                lines.append(f"{place}: {said}, got {problem['input']!r:.200}{_hint(problem)}")
    return "; ".join(lines)


def _of_a_method(place: str, value: Any) -> str:
    given, names = method_type(value), ", ".join(METHOD_CONFIGS)
    if not isinstance(value, dict):
        return f"{place}: a section is needed, got {value!r}: write {place}.type={value if isinstance(value, str) else 'NAME'}"
    if given is None:
        return f"{place}.type is missing: it is one of {names}"
    near = difflib.get_close_matches(str(given), METHOD_CONFIGS, 1)
    return f"unknown method {given!r}: {place}.type is one of {names}{f'; did you mean {near[0]}?' if near else ''}"


def _as_section(place: str, problem: Any, kind: type[Section], tagged: dict[str, dict[str, Any]]) -> str:
    """How to write a section that was given as one value: by the key that it must have, else by its first."""
    fields, given = _section_at(problem["loc"], kind, tagged).model_fields, problem["input"]
    key = next((name for name, field in fields.items() if field.is_required()), next(iter(fields)))
    return f"{place}.{key}={'VALUE' if isinstance(given, bool | list | None) else given}"


def _hint(problem: Any) -> str:
    """What to write where YAML, or a person, took one kind of value for another."""
    given, wanted = problem["input"], problem["type"]
    if isinstance(given, bool):
        quoted = ": quote the word" if wanted in ("string_type", "literal_error") else ""
        return f"; YAML reads yes, no, on and off as true and false{quoted}"
    if isinstance(given, str) and wanted in ("int_type", "float_type", "bool_type") and _is_plain(given, wanted):
        return ", which is text: write it without quotes"
    return ": write it without a point" if isinstance(given, float) and wanted == "int_type" else ""


def _is_plain(text: str, wanted: str) -> bool:
    """Whether a text, without quotes, would be what a field wants."""
    try:
        value = plain_yaml.parse(text)
    except (yaml.YAMLError, RecipeError):
        return False
    return isinstance(value, bool) if wanted == "bool_type" else type(value) in (int, float)


def _without_tags(location: tuple, tagged: dict[str, dict[str, Any]]) -> list:
    """pydantic puts the tag of a union (`opd`) into the path; people did not write it."""
    parts, tags = list(location), tagged.get(location[0], {}) if location else {}
    if len(parts) > 1 and parts[1] == SEVERAL and tags is TEACHER_CONFIGS:
        return [parts[0], parts[2], *parts[4:]] if len(parts) > 2 else [parts[0]]
    if tags and len(parts) > 1 and parts[1] in tags:
        del parts[1]
    return parts


def _nearest(location: tuple, kind: type[Section], tagged: dict[str, dict[str, Any]]) -> str:
    section = _section_at(location[:-1], kind, tagged)
    places = {name: f"{inner}.{name}" for name, inner in section.also_here.items()}
    places |= {name: name for name in section.model_fields}
    near = difflib.get_close_matches(str(location[-1]), places, 1, cutoff=0.5)
    return f": did you mean {places[near[0]]}?" if near else f": it has {', '.join(section.model_fields)}"


def _section_at(inside: tuple, section: type[Section], tagged: dict[str, dict[str, Any]]) -> type[Section]:
    """The section at a place of the recipe; pydantic's tags stand in the path."""
    tags = tagged.get(inside[0], {}) if inside else {}
    if len(inside) > 3 and inside[1] == SEVERAL:
        section, inside = tags[inside[3]], inside[4:]
    elif tags and len(inside) > 1:
        section, inside = tags[inside[1]], inside[2:]
    for part in inside:
        section = _section_of(section.model_fields[part].annotation)
    return section


def _section_of(annotation: Any) -> type[Section]:
    options = getattr(annotation, "__args__", (annotation,))
    return next(option for option in options if isinstance(option, type) and issubclass(option, Section))


def dump(recipe: Section) -> str:
    """Return the whole recipe as YAML, defaults included, so that a run folder records every setting."""
    return plain_yaml.dump(recipe.model_dump(mode="json"))


def json_schema(kind: type[Section] = Recipe) -> dict:
    """Return the JSON schema of a recipe. Editors use it after the line `# yaml-language-server: $schema=recipe.schema.json`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema()}
