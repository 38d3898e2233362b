"""YAML as a recipe: each scalar is what it says, a key stands once, and no text grows when it is read."""

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import LEAST

from kibitz import config
from kibitz.config import Recipe, RecipeError, Section, plain_yaml

TREE = LEAST | {"method": {"type": "opd"}}


def refused(tmp_path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        config.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------ scalars


def kinds_of(annotation: Any) -> set[type]:
    """The scalar types that a field says it takes; empty where it takes anything."""
    if get_origin(annotation) is Annotated:
        return kinds_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return set().union(*map(kinds_of, get_args(annotation)))
    if get_origin(annotation) is Literal:
        return {str}
    return {annotation} if annotation in (int, float, bool, str, type(None)) else {dict}


def leaves(section: type[Section], above: str = "") -> dict[str, set[type]]:
    found: dict[str, set[type]] = {}
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            found |= leaves(inner, f"{above}{name}.")
        elif name not in ("type", "teacher", "method", "track"):
            found[above + name] = kinds_of(inner)
    return found


FIELDS = leaves(Recipe) | leaves(config.OPDConfig, "method.")
SCALARS = st.one_of(
    st.booleans(), st.integers(-10, 300), st.integers(), st.floats(), st.text(max_size=4), st.none(),
    st.sampled_from(["yes", "off", "3", "1e-4", "010", "1:30", "2026-11-26", ".nan", "0x10", "1_000", "~", "="]),
)  # fmt: skip


def test_all_kinds_of_fields_are_among_them():
    assert len(FIELDS) > 100
    assert {int, float, bool, str} <= set().union(*FIELDS.values())


@pytest.mark.parametrize("place", FIELDS)
@settings(max_examples=25)
@given(value=SCALARS)
def test_a_field_takes_no_scalar_for_another(place, value):
    """Whatever is written there, either it is refused in a sentence or the recipe holds that very value."""
    written = plain_yaml.dump({"a": value}).removeprefix("a: ")
    try:
        recipe = config.load(TREE, [f"{place}={written}"])
    except RecipeError:
        return
    found = recipe
    for name in place.split("."):
        found = getattr(found, name)
    if isinstance(found, Section) or (isinstance(value, bool) and found == "off"):
        return  # a text may stand for a section, and YAML reads off as false
    assert found == value or str(found) == str(value).rstrip("/")
    assert type(found) in FIELDS[place] or FIELDS[place] & {dict}
    assert type(found) is type(value) or (type(found), type(value)) == (float, int)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("steps: yes", "got True; YAML reads yes, no, on and off as true and false"),
        ("steps: 1.0", "got 1.0: write it without a point"),
        ("steps: '3'", "got '3', which is text: write it without quotes"),
        ("steps: 010", "valid integer, got '010'"),
        ("steps: 1:30", "valid integer, got '1:30'"),
        ("seed: 99999999999999999", "seed: an integer in a recipe is at most 2^53"),
        (f"seed: {'9' * 5000}", "line 1: 99999999999999999999... is too large a number"),
        ("optim: {lr: true}", "optim.lr: input should be a valid number, got True"),
        ("optim: {lr: .inf}", "optim.lr: write a finite number, got inf"),
        ("data: {world: arithmetic, options: {corrupted: .nan}}", "data.options.corrupted: write a finite number"),
        ("data: {world: arithmetic, shuffle: 1}", "data.shuffle: input should be a valid boolean, got 1"),
        ("data: {world: arithmetic, shuffle: 'no'}", "which is text: write it without quotes"),
        ("data: {world: arithmetic, split: no}", "quote the word"),
        ("output: 2026", "output: input should be a valid string, got 2026"),
        ('output: "\\ud800"', "half a surrogate pair"),
        ('output: "a\\0b"', "holds a NUL"),
        ("steps: 1__0", "valid integer, got '1__0'"),
        ("optim: {lr: 1_.0}", "valid number, got '1_.0'"),
    ],
)
def test_a_scalar_of_another_kind_is_refused(tmp_path, line, words):
    assert words in refused(tmp_path, line)


def test_what_yaml_calls_a_date_is_text():
    recipe = config.load(TREE, ["data.template={date_string: 2026-11-26}", "output=2026-11-26", "optim.lr=1E-4"])
    assert recipe.data.template == {"date_string": "2026-11-26"}
    assert (recipe.output, recipe.optim.lr) == ("2026-11-26", 1e-4)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85"), max_size=8))
def test_a_text_is_dumped_as_a_text(text):
    for read in (plain_yaml.parse, yaml.safe_load):
        assert read(plain_yaml.dump({"a": text})) == {"a": text}


# ------------------------------------------------------------------ trees


def test_a_key_that_stands_twice_is_named_with_both_lines(tmp_path):
    said = refused(tmp_path, "steps: 3\noptim:\n  lr: 1.0\n  clip: 1.0\n  lr: 2.0\n")
    assert "the key 'lr' stands twice, in line 3 and in line 5" in said
    assert "line 1 and in line 2" in refused(tmp_path, "steps: 3\nsteps: 3\n")


def test_an_anchor_may_save_writing(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "student: &model {model: a}\nteacher: *model\ndata: {world: arithmetic}\nrollout: &r {top_k: 3}\n"
        "eval: {every: 0}\n"
    )
    assert config.load(path).teacher.model == "a"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{','.join([f'*{old}'] * 9)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "aliases multiply it"),
        (MERGES, "aliases multiply it"),
        ("a: &a [*a]", "deep"),
        ("a: " + "[" * 40 + "]" * 40, "deep"),
        ("a: " + "[" * 9000 + "]" * 9000, "deep"),
        ("a: " + "{a: " * 9000 + "}" * 9000, "deep"),
        ("\n".join(" " * depth + "a:" for depth in range(900)), "deep"),
        ("x" * 1_000_001, "characters are no recipe"),
        ("a: [\n  b: c: d\n", "line 2: "),
        ("a: !!python/object/apply:os.system [true]", "line 1: could not determine a constructor"),
        ("a: !!set [1]", "is not YAML"),
        ("a: !!bool 3", "is not YAML: KeyError"),
        ("a: !!timestamp soon", "is not YAML"),
        ("a: {<<: {x: 1}, <<: {x: 2}}", "the key '<<' stands twice"),
        ("? [a, b]\n: 1", "is not YAML"),
    ],
    ids=str,
)
def test_no_text_grows_when_it_is_read(tmp_path, text, words):
    assert words in refused(tmp_path, text)


def test_no_override_and_no_dict_grows_either():
    for override in ("steps=" + "[" * 9000, "data.options=" + "[" * 40 + "]" * 40, "optim={lr: 1.0, lr: 2.0}"):
        with pytest.raises(RecipeError, match="deep|stands twice"):
            config.load(TREE, [override])
    listed = TREE | {"teacher": ["a", {"model": "b"}]}
    assert config.load(listed, ["teacher.0.model=c"]).teachers[0].model == "c"
    for override in ("teacher.0.model.name=c", "teacher.\u0661.model=c", "teacher.-1.model=c"):
        with pytest.raises(RecipeError, match="teacher"):
            config.load(listed, [override])
    deep: Any = 1
    for _ in range(9000):
        deep = [deep]
    for odd, words in ((deep, "deep"), ({1, 2}, "text, numbers"), (b"x", "text, numbers"), (float("nan"), "finite")):
        with pytest.raises(RecipeError, match=words):
            config.load(TREE | {"data": {"world": "arithmetic", "options": {"a": odd}}})
