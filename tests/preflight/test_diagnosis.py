"""A diagnosis of real models: what it finds, and that the recipe that it suggests is one that trains."""

import json
from pathlib import Path

import pytest

import kibitz
from kibitz import config, worlds
from kibitz.preflight import check_files, worst
from kibitz.preflight.diagnosis import diagnose


def of_world(name: str, student: str | Path = "student", teacher: str = "teacher", **sections) -> config.Recipe:
    world = worlds.get(name)
    place = student if isinstance(student, Path) else world.checkpoint(student)
    tree = {
        "student": {"model": str(place)},
        "teacher": {"model": str(world.checkpoint(teacher))},
        "data": {"world": name},
    }
    return config.load({**tree, "threads": 1, **sections})


@pytest.fixture(scope="module")
def found() -> dict:
    return diagnose(of_world("arithmetic"), 64)


def test_the_first_context_holds_the_operators_of_the_misconception(found):
    """The student reads a+b*c from the left, and a-b*c: no word of that stands in the code."""
    (pattern,) = found["contexts"][0]["patterns"]
    assert pattern in {("near", "+", None, "*"), ("near", "-", None, "*")}
    (other,) = found["contexts"][1]["patterns"]
    assert {pattern[1], other[1]} == {"+", "-"}
    assert found["contexts"][0]["share"] + found["contexts"][1]["share"] > 0.7


def test_numbers_are_those_of_the_answers(found):
    numbers = found["numbers"]
    assert (numbers["num_prompts"], numbers["num_answers"]) == (64, 64)
    assert numbers["teacher_accuracy"]["accuracy"] > 0.85 > numbers["accuracy"]["accuracy"] + 0.1
    assert sum(numbers["both"].values()) == 64
    right = numbers["both"]["both"] + numbers["both"]["student"]
    assert numbers["accuracy"]["accuracy"] == right / 64
    assert numbers["wrong"] == 64 - right
    assert numbers["accuracy"]["accuracy"] < numbers["predicted"] <= 1
    assert numbers["predicted"] == pytest.approx(
        numbers["accuracy"]["accuracy"] + numbers["mended"] * numbers["forked"] / 64
    )
    assert 0.1 < numbers["worst_percent"] < 0.6
    assert [row["share"] for row in numbers["prefixes"]] == [0.25, 0.5, 0.75]


def test_places_lead_to_the_tokens_of_the_examples(found):
    for one in [*found["contexts"], *found["tokens"]]:
        for pair, token in one["places"]:
            row = found["examples"][pair]["tokens"][token]
            assert row["student_logp"] - row["teacher_logp"] > 1
    first = found["tokens"][0]
    pair, token = first["places"][0]
    row = found["examples"][pair]["tokens"][token]
    assert (row["text"], row["teacher_top"][0][0]) == (first["said"], first["instead"])


def test_it_is_a_tree_for_json(found):
    assert json.loads(json.dumps(found, allow_nan=False))["student"] == found["student"]


def test_the_recipe_has_a_reason_for_each_line_and_trains(found, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(found["recipe"])
    wanted = config.load(path)
    assert (wanted.method.type, wanted.method.support, wanted.data.world) == ("opd", "full", "arithmetic")
    assert wanted.threads == 1
    assert all(why for _, _, why in found["reasons"])
    assert max(map(len, found["recipe"].splitlines())) < 130
    assert worst(list(check_files(wanted))) != "red"
    run = kibitz.train(
        path,
        ["steps=2", "rollout.prompts_per_step=4", "eval.num_prompts=4", "data.limit=64", f"output={tmp_path / 'run'}"],
    )
    assert len(run.metrics) == 2


def test_what_the_person_wrote_stays_and_is_not_advised(models, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+{i}"}) + "\n" for i in range(1, 7)))
    tree = {
        "student": {"model": str(models[0])},
        "teacher": {"model": str(models[1])},
        "data": {"prompts": str(prompts)},
    }
    recipe = config.load(tree, ["rollout.max_tokens=6", "optim.lr=3e-4", "steps=7"])
    found = diagnose(recipe, 4)
    (tmp_path / "recipe.yaml").write_text(found["recipe"])
    again = config.load(tmp_path / "recipe.yaml")
    assert (again.rollout.max_tokens, again.optim.lr, again.steps) == (6, 3e-4, 7)
    assert not {"rollout.max_tokens", "optim.lr", "steps"} & {setting for setting, _, _ in found["reasons"]}
    assert again.data.limit is None
    assert found["numbers"]["num_answers"] == 4
    assert "accuracy" not in found["numbers"]  # nobody can grade these
    assert "predicted" not in found["numbers"]


def test_equal_models_have_nothing_to_learn(models, tmp_path):
    tree = {"student": {"model": str(models[0])}, "teacher": {"model": str(models[0])}, "data": {"world": "arithmetic"}}
    found = diagnose(config.load(tree, ["rollout.max_tokens=6"]), 4)
    assert found["contexts"] == found["tokens"] == []
    assert "nothing to learn" in found["doubts"][0]
    assert f"# But: {found['doubts'][0][:40]}" in found["recipe"]


def test_a_teacher_that_scores_nothing_is_refused_before_anything_loads():
    tree = {"student": {"model": "nowhere"}, "teacher": {"chat": "http://127.0.0.1:9"}, "data": {"world": "arithmetic"}}
    with pytest.raises(ValueError, match="which a chat endpoint and stored scores cannot: write --teacher"):
        diagnose(config.load({**tree, "method": {"type": "sft", "source": "teacher"}}), 4)


def test_a_teacher_far_away_is_learnt_by_skd(models, monkeypatch):
    """Random models of the same vocabulary: the tokens that both find likely hold less of the probability than is asked for."""
    monkeypatch.setattr("kibitz.preflight.advice.GOOD_OVERLAP", 1.1)
    tree = {"student": {"model": str(models[0])}, "teacher": {"model": str(models[1])}, "data": {"world": "arithmetic"}}
    found = diagnose(config.load(tree, ["rollout.max_tokens=6"]), 4)
    assert found["reasons"][0][:2] == ["method.type", "skd"]


@pytest.mark.slow
def test_another_planted_error_is_found_as_the_first_context(tmp_path):
    """The shipped teacher learns to take a-b-c and a-b+c from the right, and is then compared with what it was."""
    teacher = str(worlds.get("arithmetic").checkpoint("teacher"))
    run = kibitz.train(
        {
            "student": {"model": teacher},
            "data": {"world": "arithmetic", "options": {"backwards": 0.9}, "limit": 4000},
            "method": {"type": "sft"},
            "rollout": {"prompts_per_step": 64, "samples_per_prompt": 1, "max_tokens": 64},
            "optim": {"lr": 1e-3},
            "steps": 60,
            "eval": {"every": 0, "num_prompts": 8, "heatmaps": 0},
            "save": {"every": 0},
            "threads": 1,
            "output": str(tmp_path / "run"),
        }
    )
    assert run.checkpoint is not None
    found = diagnose(of_world("arithmetic", run.checkpoint), 128)
    assert found["contexts"][0]["patterns"][0] in {("near", "-", None, "+"), ("near", "-", None, "-")}
