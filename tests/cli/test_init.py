"""`kibitz init`: five answers become a recipe that loads, that `check` accepts, and that says why each line is there."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT
from typer.testing import CliRunner

from kibitz import config
from kibitz.cli import app
from kibitz.cli.init import recipe_text
from kibitz.config import plain_yaml
from kibitz.config.commented import commented


def says(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "my prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+2*3", "answer": "7"}) + "\n" for i in range(1, 9)))
    return path


def test_flags_make_a_recipe_that_check_accepts(models, prompts, tmp_path):
    path = tmp_path / "new" / "recipe.yaml"
    flags = ("--student", models[0], "--teacher", models[1], "--prompts", prompts, "--max-tokens", 8)
    answer = says("init", path, *flags)
    assert answer.exit_code == 0, answer.output
    assert "kibitz check" in answer.stdout
    recipe = config.load(path)
    assert (recipe.student.model, recipe.data.prompts, recipe.rollout.max_tokens) == (str(models[0]), str(prompts), 8)
    checked = says("check", path, "--files-only", "--json")
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout)["light"] != "red"


@pytest.mark.parametrize("prompts", ["world:arithmetic", "owner/data"])
@pytest.mark.parametrize("lora", [True, False])
def test_each_line_has_its_reason(prompts, lora):
    text = recipe_text("a/student", "a/teacher", prompts, 512, lora)
    recipe = config.load(yaml.safe_load(text))
    assert (recipe.data.world or recipe.data.prompts) in prompts
    assert (recipe.student.lora is not None) == lora
    settings = [line for line in text.splitlines() if line.startswith("  ") and not line.strip().startswith("#")]
    lines = text.splitlines()
    for line in settings:
        above = lines[lines.index(line) - 1].strip()
        assert "  # " in line or above.startswith("#") or line.startswith("    "), line
    assert max(map(len, lines)) <= 130


def test_nobody_to_answer_is_told_which_flag(tmp_path):
    answer = says("init", tmp_path / "r.yaml", "--student", "s")
    assert answer.exit_code == 2
    assert "write --teacher" in answer.stderr
    assert not (tmp_path / "r.yaml").exists()


def test_a_file_that_is_there_stays(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("mine")
    flags = ("--student", "s", "--teacher", "t", "--prompts", "p.jsonl")
    assert "--force" in says("init", path, *flags).stderr
    assert path.read_text() == "mine"
    assert says("init", path, *flags, "--force").exit_code == 0
    assert config.load(path).rollout.max_tokens == 1024


@pytest.mark.slow
def test_a_person_is_asked_five_questions(tmp_path):
    """At a terminal of its own, as `pty` makes one."""
    screen, terminal = pty.openpty()
    path = tmp_path / "r.yaml"
    asked = subprocess.Popen(
        [sys.executable, "-m", "kibitz", "init", str(path)], stdin=terminal, stdout=terminal, stderr=terminal, cwd=ROOT
    )
    os.write(screen, b"my/student\nmy/teacher\nworld:arithmetic\nmany\n300\ny\n")
    assert asked.wait(600) == 0
    os.close(terminal)
    recipe = config.load(path)
    assert (recipe.student.model, recipe.data.world, recipe.rollout.max_tokens) == ("my/student", "arithmetic", 300)
    assert recipe.student.lora is not None
    os.close(screen)


@pytest.mark.parametrize("name", ["1e-5", "yes", "2026-11-26", "1:30", "0x10", "null", "=", "a: b # c"])
def test_a_name_that_looks_like_something_else_stays_a_name(name):
    """What is written is read by the strict reader of recipes."""
    assert plain_yaml.parse(commented({"student": {"model": name}}, {"student.model": "why"}, ["head"])) == {
        "student": {"model": name}
    }


def test_a_reason_can_be_no_more_than_a_comment():
    text = commented({"a": {"b": 1}, "c": [1, 2]}, {"a.b": "why\nd: 3", "c": "long " * 60}, ["head\ne: 4"])
    assert yaml.safe_load(text) == {"a": {"b": 1}, "c": [1, 2]}
