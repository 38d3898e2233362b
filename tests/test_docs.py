"""The pages: their generated parts are those of the code, and every setting, metric, file and heading they name exists."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pytest
import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from support.pages import FENCE, PAGES, fences, page, spans
from support.paths import ROOT, script
from support.runs import LEAST

import kibitz
from kibitz import config, methods
from kibitz.control.recipe import DistilRecipe, RPDRecipe

WANTED = ("```", "**Source.**", "**When.**", "**When not.**")


generate = script(ROOT / "docs" / "generate.py")


# ------------------------------------------------------------------ the generated parts


def test_the_page_says_what_the_code_says():
    text = page("docs/methods.md")
    assert generate.render(text) == text, "docs/methods.md is stale: make format writes its generated parts again"


def test_every_part_is_on_the_page():
    asked = {match["name"] for match in generate.BLOCK.finditer(page("docs/methods.md"))}
    assert asked == set(generate.BLOCKS) | {f"settings {name}" for name in generate.shipped()}


def test_a_part_that_the_code_does_not_have_is_named():
    with pytest.raises(ValueError, match="'settings dpo', which the code does not have: delete"):
        generate.render("<!-- generated: settings dpo -->\n<!-- end -->")


def unwritten(text: str, method: str) -> str:
    """What is missing of a method on the page, as a sentence; nothing if all is there."""
    if method not in generate._docstring_table():
        return f"write a line for {method} into the table in the docstring of kibitz/methods/__init__.py"
    start = text.find(f"### `{method}`\n")
    section = re.split(r"^##", text[start + 3 :], maxsplit=1, flags=re.MULTILINE)[0] if start >= 0 else ""
    section = generate.BLOCK.sub("", section)
    missing = [part for part in WANTED if len(section.partition(part)[2].partition("**When")[0].strip()) < 20]
    if missing or "TO BE WRITTEN" in section:
        return f"write the section ### `{method}` of docs/methods.md: its equation in a fenced block, {', '.join(WANTED[1:])}"
    return ""


@pytest.mark.parametrize("method", generate.shipped())
def test_every_method_is_described_by_hand(method):
    said = unwritten(page("docs/methods.md"), method)
    assert not said, said


class Inner(config.Section):
    """Settings inside settings."""

    depth: int = Field(3, ge=1, description="How deep | how far.")


class NewConfig(config.DistillationConfig):
    """A method that nobody has described."""

    type: Literal["new"] = "new"
    inner: Inner = Inner()


def test_a_new_method_gets_its_tables_and_a_sentence_that_says_what_to_write(monkeypatch):
    monkeypatch.setattr(NewConfig, "__module__", "kibitz.config.methods")
    monkeypatch.setitem(config.METHOD_CONFIGS, "new", NewConfig)
    text = generate.render(page("docs/methods.md"))
    assert "| [`new`](#new) |" in text
    assert "| `method.inner.depth` | `3` | at least 1 | How deep \\| how far. |" in text
    assert generate.render(text) == text
    assert "kibitz/methods/__init__.py" in unwritten(text, "new")
    monkeypatch.setattr(methods, "__doc__", methods.__doc__ + "| new | somebody | something | some loss |\n")
    assert "write the section ### `new` of docs/methods.md" in unwritten(text, "new")


def test_methods_from_outside_the_package_are_not_on_the_page(monkeypatch):
    monkeypatch.setitem(config.METHOD_CONFIGS, "new", NewConfig)
    assert "`new`" not in generate.render(page("docs/methods.md"))


# ------------------------------------------------------------------ names


def known_settings(*recipes: dict[str, Any]) -> dict[str, list[FieldInfo]]:
    """`a.b` of a recipe -> its fields: several where methods, or recipes, share a name."""
    found: dict[str, list[FieldInfo]] = {}
    for name, field in (pair for sections in recipes for pair in sections.items()):
        for section in sections_of(getattr(field, "annotation", field)):
            for path, inner in generate.settings(section, "method" if name in config.METHOD_CONFIGS else name):
                found.setdefault(path, []).append(inner)
    return found


def sections_of(kind: Any) -> list[type[config.Section]]:
    """The sections that a field may hold: one, those of a union, those of a list."""
    if isinstance(kind, type) and issubclass(kind, config.Section):
        return [kind]
    return [section for part in get_args(kind) for section in sections_of(part)]


LANGUAGE = known_settings(config.METHOD_CONFIGS, config.Recipe.model_fields)
POLICIES = known_settings(RPDRecipe.model_fields, DistilRecipe.model_fields)


def code_of(text: str) -> Iterator[str]:
    """Code spans, and fenced blocks of commands."""
    yield from fences(text, "bash")
    yield from spans(text)


def mistakes(text: str, settings: dict[str, list[FieldInfo]] = LANGUAGE) -> list[str]:
    """The settings that a page names and the recipe lacks, and values that it refuses."""
    found = []
    sections = "|".join(sorted({path.partition(".")[0] for path in settings}))
    named = re.compile(rf"(?<![\w./-])(?P<path>(?:{sections})\.[a-z_]+(?:\.[a-z_]+)*)(?:=(?P<value>\S+))?")
    for code in code_of(text):
        for match in named.finditer(code):
            path, value = match["path"], match["value"]
            if path.endswith(".py"):
                continue
            if path not in settings:
                found.append(f"{path} is no setting")
            elif value not in (None, "...") and not any(
                accepts(field, yaml.safe_load(value)) for field in settings[path]
            ):
                found.append(f"{path} cannot be {value}")
    return found


def accepts(field: FieldInfo, value) -> bool:
    adapter = TypeAdapter(Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation)
    try:
        adapter.validate_python(value)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize("name", PAGES)
def test_every_setting_named_exists(name):
    assert mistakes(page(name), POLICIES if name == "docs/control.md" else LANGUAGE) == []


def test_mistakes_are_found():
    text = "`optim.rate`, `method.beta=2`, `method.support=sampled`, `data.py`\n```bash\nkibitz train r.yaml eval.evry=2\n```\n"
    assert mistakes(text) == ["eval.evry is no setting", "optim.rate is no setting", "method.beta cannot be 2"]


@pytest.mark.parametrize("text", [text for name in PAGES for text in fences(page(name), "yaml")])
def test_every_recipe_shown_is_accepted(text):
    shown = yaml.safe_load(text)
    read = config.load(LEAST | shown).model_dump(mode="json")
    assert all(name in read for name in shown)


def test_every_metric_to_look_at_is_logged():
    """In the second column of the troubleshooting table: each is a name that the code writes into a row."""
    table = page("docs/methods.md").partition("## When a run goes wrong")[2].partition("\n## ")[0]
    cells = [line.split(" | ")[1] for line in table.splitlines() if line.startswith("| ")][1:]
    named = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    code = "".join(path.read_text(encoding="utf-8") for path in Path(kibitz.__file__).parent.rglob("*.py"))
    assert len(named) > 15
    assert {name for name in named if f'"{name}":' not in code and f'["{name}"]' not in code} == set()


# ------------------------------------------------------------------ links


def anchors(text: str) -> set[str]:
    """Headings as GitHub links them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(name: str) -> list[str]:
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page(name)))
    return sorted({target for target in targets if not re.match(r"https?://", target)})


@pytest.mark.parametrize(("name", "target"), [(name, target) for name in PAGES for target in links(name)])
def test_every_link_leads_somewhere(name, target):
    path, _, anchor = target.partition("#")
    file = (ROOT / name).parent / path if path else ROOT / name
    assert file.exists(), f"{name} links to {target}, which is not there"
    assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"no heading #{anchor} in {file.name}"
