"""Lines with which a recipe fits into a smaller device."""

import pytest
import torch
from support.runs import recipe

from kibitz import config, preflight
from kibitz.config import ModelConfig
from kibitz.preflight import budget, fitting
from kibitz.preflight.shapes import shape_of


@pytest.fixture
def asked(small_models, tmp_path):
    """A recipe, and its plan as a function of what is changed in it."""
    loaded = config.load(recipe(small_models / "student", small_models / "teacher", tmp_path / "run", rollout={
        "prompts_per_step": 64, "max_tokens": 100}))  # fmt: skip
    shapes = [shape_of(ModelConfig(model=str(small_models / name)), torch.bfloat16) for name in ("student", "teacher")]
    return loaded, lambda changed: budget.memory(changed, budget.Models(shapes[0], shapes[1:]), 20)


def test_what_fits_is_left_as_it_is(asked):
    loaded, plan = asked
    assert fitting.changes(loaded, plan, plan(loaded).peak / 0.9) == []


@pytest.mark.parametrize("share", [0.95, 0.8, 0.6, 0.45])
def test_the_lines_make_it_fit(asked, share):
    """Written into the recipe they give a plan below nine tenths of the room; without the last one it would not fit."""
    loaded, plan = asked
    room = share * plan(loaded).peak
    lines = fitting.changes(loaded, plan, room)
    assert lines
    tree = loaded.model_dump(mode="json", exclude_unset=True)
    assert plan(config.load(tree, lines)).peak <= 0.9 * room < plan(config.load(tree, lines[:-1])).peak


def test_what_cannot_fit_has_no_lines(asked):
    loaded, plan = asked
    assert fitting.changes(loaded, plan, sum(plan(loaded).held.values())) is None


def test_check_says_each_phase_and_the_lines(asked):
    """--memory is that of a GPU, on which `dtype: auto` is bfloat16. What a recipe says is not chosen anew."""
    loaded, plan = asked
    loaded = config.load(loaded, ["optim.tokens_per_micro_batch=16384", "optim.checkpointing=false"])
    gibibytes = 0.7 * plan(loaded).peak / 2**30
    options = preflight.Options(teraflops=1.0, gibibytes=gibibytes)
    (found,) = (one for one in preflight.check_files(loaded, options) if one.name == "memory")
    assert found.light == "red"
    assert all(phase in found.text for phase in ("rollouts", "scoring", "training"))
    assert "It would fit with optim." in found.text
