"""Writes those parts of docs/methods.md that the code knows, between `<!-- generated: name -->` and `<!-- end -->`;
and what the files in results/ say: the tables and plots beside them, those of docs/comparison.md, docs/teachers.md,
docs/tokenizers.md and README.md, and docs/evidence.md; and the counts of benchmarks/counted.json in docs/machines.md.

    python docs/generate.py

The rest of the page is written by hand and left alone. A method without a section gets an empty one to be filled in.
"""

import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from kibitz import methods
from kibitz.config import METHOD_CONFIGS, DistillationConfig, GuardConfig, MethodConfig, Section
from kibitz.experiments import EXPERIMENTS, pages
from kibitz.losses import DIVERGENCES, POLICY_LOSSES
from kibitz.training.guards import GUARDS

PAGE = Path(__file__).with_name("methods.md")
RESULT_PAGES = (*map(PAGE.with_name, ("comparison.md", "teachers.md", "tokenizers.md")), PAGE.parents[1] / "README.md")
MACHINES = PAGE.with_name("machines.md")
EVIDENCE = PAGE.with_name("evidence.md")
BLOCK = re.compile(r"(?P<begin><!-- generated: (?P<name>[^>]*?) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
NEXT_METHOD = "<!-- the next method's section goes above this line -->"
CREDIT = ("discount", "clip_advantage", "extrapolation", "baseline", "reward_coef", "normalize_std")
NEEDS = {"teacher": "a teacher", "reward": "a grader", "responses": "responses in the data"}
SAMPLES = {bool: [True, False], float: [0.0, 1.0], int: [0, 1], str: ["some.file"]}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def render(page: str) -> str:
    """The page with every generated part as the code has it now."""
    for name in shipped():
        if f"<!-- generated: settings {name} -->" not in page:
            page = page.replace(NEXT_METHOD, f"{_empty_section(name)}\n{NEXT_METHOD}")
    return BLOCK.sub(lambda match: f"{match['begin']}{_block(match['name'])}\n{match['end']}", page)


def shipped() -> dict[str, type[MethodConfig]]:
    """The methods of the package, without those that a program registered."""
    return {name: section for name, section in METHOD_CONFIGS.items() if section.__module__.startswith("kibitz.")}


def settings(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """Every setting below a section, `a.b` first to last; a section inside it comes before what it holds."""
    for name, field in section.model_fields.items():
        yield f"{prefix}.{name}", field
        inner = _without_none(field.annotation)
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from settings(inner, f"{prefix}.{name}")


# ----------------------------------------------------------------------------------------------------------- blocks


def _block(name: str) -> str:
    kind, _, method = name.partition(" ")
    if kind == "settings" and method in shipped():
        return _settings_of_method(method)
    if name not in BLOCKS:
        raise ValueError(
            f"docs/methods.md asks for {name!r}, which the code does not have: delete that part of the page"
        )
    return BLOCKS[name]()


def _methods() -> str:
    told = _docstring_table()
    rows = []
    for name, section in shipped().items():
        writes, hears, loss = told.get(name, ("", "", ""))
        fields = section.model_fields
        if "divergence" in fields:
            loss = f"`{fields['divergence'].default}`, or another [divergence](#divergences)"
        support = _literals(fields["support"].annotation) if "support" in fields else []
        paths = [path.removeprefix("method.") for path, _ in settings(section, "method")]
        credit = [f"`{path}`" for name in CREDIT for path in paths if path.split(".")[-1] == name]
        rows.append(
            (f"[`{name}`](#{name})", writes, hears, loss, _codes(support), ", ".join(credit) or "–", _needs(section))
        )
    return _table(("method", "who writes", "what a token is told", "loss", "support", "credit", "needs"), rows)


def _docstring_table() -> dict[str, tuple[str, str, str]]:
    """method -> who writes, what a token is told, loss: the table in the docstring of `kibitz.methods`."""
    lines = [line for line in inspect.getdoc(methods).splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return {name: (writes, hears, loss) for name, writes, hears, loss in rows}


def _needs(section: type[MethodConfig]) -> str:
    """What the method asks for by default, and the settings that change the answer."""
    found = []
    for question, what in NEEDS.items():
        asks = getattr(section().needs(), question)
        changed = [text for text, other in _variants(section) if getattr(other.needs(), question) != asks]
        if asks:
            found.append(what + (f" (not with {' or '.join(changed)})" if changed else ""))
        elif changed:
            found.append(f"{what} with {' or '.join(changed)}")
    return ", ".join(found) or "–"


def _variants(section: type[MethodConfig]) -> Iterator[tuple[str, MethodConfig]]:
    """The section with one setting other than by default, and how that is written."""
    for path, field in settings(section, "method"):
        name = path.removeprefix("method.")
        plain = _without_none(field.annotation)
        others = _literals(plain) or SAMPLES.get(plain, [])
        for value in others:
            if name == "type" or value == field.default:
                continue
            try:
                other = section.model_validate(_nested(name, value))
            except ValidationError:
                continue
            if plain is str:
                yield f"`{name}`", other
            else:
                from_zero = plain in (int, float) and field.default == 0
                yield (f"`{name}` above 0" if from_zero else f"`{name}: {_value(value)}`"), other


def _nested(path: str, value: Any) -> dict[str, Any]:
    """`a.b` and a value as the dict that a recipe has there."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def _settings_of_method(method: str) -> str:
    section = shipped()[method]
    shared = ", ".join(f"`{base.__name__}`" for base in _bases(section))
    table = _settings_table(section, "method", _own(section))
    if not shared:
        return table
    return f"{table}\n\nBesides, the [shared settings](#shared-settings) of {shared}, where this table does not say otherwise."


def _shared_settings() -> str:
    bases = dict.fromkeys(base for section in shipped().values() for base in _bases(section))
    parts = []
    for base in bases:
        users = [name for name, section in shipped().items() if issubclass(section, base)]
        intro = f"`{base.__name__}`, of {_codes(users)}: {_text(_first_paragraph(base))}"
        parts.append(f"{intro}\n\n{_settings_table(base, 'method', _own(base))}")
    return "\n\n".join(parts)


def _divergences() -> str:
    options = DistillationConfig.model_fields
    rows = []
    for name, function in DIVERGENCES.items():
        given = [f"`method.{p}`" for p in inspect.signature(function).parameters if p in options]
        says = f"{_text(_first_paragraph(function))} {_equation(function)}".strip()
        rows.append((f"`{name}`", says, ", ".join(given) or "–"))
    return _table(("`method.divergence`", "what it is", "option"), rows)


def _policy_losses() -> str:
    rows = [(f"`{name}`", _text(_first_paragraph(function))) for name, function in POLICY_LOSSES.items()]
    return _table(("policy loss", "what it is"), rows)


def _guards() -> str:
    rows = []
    for name, guard in GUARDS.items():
        field = GuardConfig.model_fields[name]
        says, action = _text(field.description), f"`{_value(field.default)}`"
        rows.append((f"`guards.{name}`", says, f"`{guard.needs}`", action, _with_codes(_text(guard.remedy))))
    return _table(("guard", "what it says", "needs", "default", "remedy"), rows)


def _guard_settings() -> str:
    return _settings_table(GuardConfig, "guards", [name for name in GuardConfig.model_fields if name not in GUARDS])


BLOCKS: dict[str, Callable[[], str]] = {
    "methods": _methods,
    "shared settings": _shared_settings,
    "divergences": _divergences,
    "policy losses": _policy_losses,
    "guards": _guards,
    "guard settings": _guard_settings,
}


def _empty_section(name: str) -> str:
    return (
        f"### `{name}`\n\nTO BE WRITTEN: the equation in a fenced block, then these three.\n\n"
        f"**Source.**\n\n**When.**\n\n**When not.**\n\n<!-- generated: settings {name} -->\n<!-- end -->\n"
    )


# ------------------------------------------------------------------------------------------------- settings, as text


def _settings_table(section: type[Section], prefix: str, names: Iterable[str]) -> str:
    wanted = {f"{prefix}.{name}" for name in names}
    rows = []
    for path, field in settings(section, prefix):
        if not any(path == name or path.startswith(f"{name}.") for name in wanted):
            continue
        inner = _without_none(field.annotation)
        if isinstance(inner, type) and issubclass(inner, Section):
            continue
        rows.append((f"`{path}`", _default(field), _may_be(field), _text(field.description or "")))
    return _table(("setting", "default", "may be", "what it is"), rows) if rows else "It has no settings of its own."


def _bases(section: type[MethodConfig]) -> list[type[MethodConfig]]:
    """The sections that this one shares settings with others through."""
    between = section.__mro__[1 : section.__mro__.index(Section)]
    return [base for base in between if issubclass(base, Section) and _own(base)]


def _own(section: type[Section]) -> list[str]:
    return [n for n in inspect.get_annotations(section) if n in section.model_fields and n != "type"]


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"`{_value(field.get_default(call_default_factory=True))}`"


def _may_be(field: FieldInfo) -> str:
    plain = _without_none(field.annotation)
    found = _literals(plain)
    if found == list(DIVERGENCES):
        text = "a [divergence](#divergences)"
    elif found:
        text = _codes(found)
    elif plain is bool:
        text = "`true`, `false`"
    elif plain is str or get_origin(plain) is list:
        text = "text" if plain is str else "a list"
    else:
        bounds = [
            f"{words} {_value(getattr(mark, name))}"
            for mark in field.metadata
            for name, words in BOUNDS.items()
            if hasattr(mark, name)
        ]
        text = ", ".join(bounds)
    optional = plain is not field.annotation
    return ", ".join(part for part in (text, "`null`" if optional else "") if part) or "–"


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        if len(parts) == 1:
            return parts[0]
    return annotation


def _literals(annotation: Any) -> list[Any]:
    return list(get_args(annotation)) if get_origin(annotation) is Literal else []


def _value(value: Any) -> str:
    """As one would write it in a recipe."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(one) for one in value)}]"
    return "{}" if value == {} else str(value)


# ----------------------------------------------------------------------------------------- docstrings and Markdown


def _paragraphs(thing: Any) -> list[str]:
    return inspect.getdoc(thing).split("\n\n")


def _first_paragraph(thing: Any) -> str:
    return " ".join(_paragraphs(thing)[0].split())


def _equation(function: Callable) -> str:
    """The indented lines after the first paragraph, if any; in short docstrings the equation stands in the first."""
    paragraphs = _paragraphs(function)
    second = paragraphs[1] if len(paragraphs) > 1 else ""
    if not second.startswith("    "):
        return ""
    return f"`{_escape_pipes(re.sub(' {3,}', '  ', second.strip()))}`"


def _text(text: str) -> str:
    """Prose of the code as prose of the page."""
    return _escape_pipes(text).replace("<", "&lt;").replace("*", "\\*")


def _escape_pipes(text: str) -> str:
    return text.replace("|", "\\|")


def _with_codes(text: str) -> str:
    """Settings that a sentence names, as code."""
    return re.sub(r"\b(?:method|rollout|optim|guards|eval)(?:\.[a-z_]+)+(?:=[\w.]*\w)?", r"`\g<0>`", text)


def _codes(values: Iterable[Any]) -> str:
    return ", ".join(f"`{_value(value)}`" for value in values) or "–"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machines(page: str) -> str:
    """docs/machines.md with what benchmarks/counted.json says."""
    sys.path.insert(0, str(PAGE.parents[1]))
    from benchmarks import counted

    found = json.loads((PAGE.parents[1] / "benchmarks" / "counted.json").read_text(encoding="utf-8"))
    return BLOCK.sub(lambda match: f"{match['begin']}{counted.page(found)}\n{match['end']}", page)


def write_results() -> None:
    """What the results say, beside them and on the pages that discuss them."""
    root = PAGE.parents[1]
    results = root / "results"
    for experiment in EXPERIMENTS.values():
        if (results / experiment.home).is_dir():
            pages.write(experiment, results)
    for page in RESULT_PAGES:
        page.write_text(pages.render(page.read_text(encoding="utf-8"), EXPERIMENTS, results), encoding="utf-8")
    EVIDENCE.write_text(pages.evidence_page(EXPERIMENTS, results), encoding="utf-8")


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    MACHINES.write_text(machines(MACHINES.read_text(encoding="utf-8")), encoding="utf-8")
    write_results()
