"""The recipe: what it refuses, in which words, and that it comes back from YAML as it went in."""

import json

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.paths import ROOT
from support.runs import LEAST

from kibitz import config
from kibitz.config import Recipe, RecipeError, Section

SCHEMA = ROOT / "recipe.schema.json"


def refusal(*overrides: str, **changes) -> str:
    """What is said about the smallest recipe with these changes."""
    with pytest.raises(RecipeError) as caught:
        config.load(LEAST | changes, overrides)
    return str(caught.value)


def sections() -> list[type[Section]]:
    found = [value for value in vars(config).values() if isinstance(value, type) and issubclass(value, Section)]
    return [section for section in found if section not in (Section, config.Columns)]


# ------------------------------------------------------------------ what it accepts


def test_three_keys_are_enough():
    recipe = config.load(LEAST)
    assert (recipe.method.type, recipe.optim.lr, recipe.steps) == ("opd", 5e-5, 150)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optim.lr=1e-4", ("optim", "lr"), 1e-4),  # YAML 1.1 takes 1e-4 for text
        ("optim.lr=0.0001", ("optim", "lr"), 1e-4),
        ("optim.betas=[0.8, 0.9]", ("optim", "betas"), (0.8, 0.9)),
        ("optim.clip=null", ("optim", "clip"), None),
        ("data.shuffle=false", ("data", "shuffle"), False),
        ("data.template.enable_thinking=false", ("data", "template"), {"enable_thinking": False}),
        ("rollout.stop=['=']", ("rollout", "stop"), ["="]),
        ("method.divergence=jsd", ("method", "divergence"), "jsd"),
        ("output=runs/a=b", ("output",), "runs/a=b"),
    ],
)
def test_overrides(override, path, value):
    found = config.load(LEAST | {"method": {"type": "opd"}}, [override])
    for name in path:
        found = getattr(found, name)
    assert found == value


def test_the_last_override_wins():
    assert config.load(LEAST, ["steps=3", "steps=4"]).steps == 4


def test_overrides_leave_the_source_alone():
    source = json.loads(json.dumps(LEAST))
    config.load(source, ["student.model=other", "optim.lr=1"])
    assert source == LEAST


def test_a_recipe_can_be_loaded_again_with_overrides():
    first = config.load(LEAST, ["optim.lr=0.5"])
    second = config.load(first, ["steps=7"])
    assert (second.optim.lr, second.steps, first.steps) == (0.5, 7, 150)


@given(
    lr=st.floats(1e-12, 10),
    steps=st.integers(1, 10**6),
    name=st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\x85\0"), min_size=1
    ),  # PyYAML folds U+0085
    method=st.sampled_from([{"type": "opd", "divergence": "jsd", "beta": 0.25}, {"type": "sft"}, {"type": "grpo"}]),
)
def test_what_is_dumped_is_loaded(lr, steps, name, method):
    recipe = config.load(
        LEAST | {"student": {"model": name}, "optim": {"lr": lr}, "steps": steps, "method": method}, ["seed=3"]
    )
    assert config.load(yaml.safe_load(config.dump(recipe))) == recipe


def test_a_recipe_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        config.load(LEAST).steps = 3


# ------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.learning_rate=1", ["unknown key optim.learning_rate"]),
        ("optim.momentun=1", ["unknown key optim.momentun", "did you mean momentum?"]),
        ("stepps=3", ["unknown key stepps", "did you mean steps?"]),
        ("student.modle=a", ["unknown key student.modle", "did you mean model?"]),
        ("method.divergance=jsd", ["unknown key method.divergance", "did you mean divergence?"]),
        ("data.columns.promt=x", ["unknown key data.columns.promt", "did you mean prompt?"]),
        ("optim.lr=-1", ["optim.lr", "greater than 0", "-1"]),
        ("optim.lr=0", ["optim.lr", "greater than 0"]),
        ("optim.lr=.nan", ["optim.lr"]),
        ("optim.lr=fast", ["optim.lr", "number", "'fast'"]),
        ("steps=0", ["steps", "greater than or equal to 1"]),
        ("rollout.top_p=1.5", ["rollout.top_p", "less than or equal to 1"]),
        ("method.type=opdd", ["unknown method 'opdd'", ", ".join(config.METHOD_CONFIGS), "did you mean opd?"]),
        ("method.divergence=kl", ["method.divergence", "reverse_kl"]),
        ("method.support=sampled method.divergence=jsd", ["support: sampled estimates reverse_kl only"]),
        ("method.support=sampled rollout.top_p=0.9", ["write rollout.temperature=1"]),
        ("method.type=grpo rollout.samples_per_prompt=1", ["rollout.samples_per_prompt of 2 or more"]),
        ("method.type=grpo rollout.top_k=5", ["untruncated rollouts"]),
        ("data.world=arithmetic", ["either data.prompts", "or data.world"]),
        ("teacher=null", ["opd needs a teacher"]),
        ("optim.lr", ["cannot read the override 'optim.lr'", "a.b=value"]),
        ("=3", ["cannot read the override"]),
    ],
)
def test_refused_in_one_sentence_that_says_what_to_write(override, words):
    said = refusal(*override.split(), method={"type": "opd"})
    assert all(word in said for word in words), said
    assert "\n" not in said


def test_a_missing_section_is_named():
    with pytest.raises(RecipeError, match="student is missing"):
        config.load({"data": {"world": "arithmetic"}, "method": {"type": "sft"}})


def test_all_mistakes_are_told_at_once():
    said = refusal("optim.lr=-1", "steps=0")
    assert "optim.lr" in said
    assert "steps" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "holds no recipe"),
        ("", "holds no recipe"),
        ("student: {model: [", "is not YAML"),
        ("\xff\xfe", "student"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8" if words != "student" else "latin-1")
    with pytest.raises(RecipeError, match="is not YAML" if words == "student" else words):
        config.load(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match="there is no recipe at"):
        config.load(tmp_path / "nothing.yaml")


# ------------------------------------------------------------------ the schema


def test_the_schema_in_the_repository_is_that_of_the_code():
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == json.loads(json.dumps(config.json_schema())), (
        "write it again: kibitz schema --output recipe.schema.json"
    )


def test_the_schema_accepts_what_the_code_accepts_and_refuses_unknown_keys():
    schema = config.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(LEAST)
    assert validator.is_valid(yaml.safe_load(config.dump(config.load(LEAST))))
    assert not validator.is_valid(LEAST | {"stepps": 3})
    assert not validator.is_valid(LEAST | {"optim": {"lr": -1}})


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_field_is_described(section):
    """A field that is itself a section is described by that section's docstring."""
    leaves = {
        name: field
        for name, field in section.model_fields.items()
        if name != "type" and not any(part in str(field.annotation) for part in ("Config", "Columns"))
    }
    assert [name for name, field in leaves.items() if not field.description] == []
    assert section.__doc__


def test_every_method_says_its_type():
    for name, section in config.METHOD_CONFIGS.items():
        assert section.model_fields["type"].default == name


def test_the_recipe_of_the_design_is_accepted():
    design = """
    student: {model: path-or-hub-name}
    teacher: {model: path-or-hub-name}
    data:    {prompts: prompts.jsonl}
    method:  {type: opd, divergence: reverse_kl, support: full}
    rollout: {engine: torch, prompts_per_step: 64, samples_per_prompt: 4, max_tokens: 1024, temperature: 1.0}
    optim:   {name: adamw, lr: 5.0e-5, schedule: linear, warmup_steps: 0, clip: 1.0}
    steps:   150
    eval:    {every: 20}
    save:    {every: 50, keep: 2}
    seed:    0
    output:  runs/my-run
    """
    recipe = config.load(yaml.safe_load(design))
    assert isinstance(recipe, Recipe)
    assert recipe == config.load(LEAST, ["student.model=path-or-hub-name", "teacher.model=path-or-hub-name",
                                         "data.prompts=prompts.jsonl", "output=runs/my-run"])  # fmt: skip
