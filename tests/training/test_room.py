"""What a run chooses by the memory of a GPU, and that the check before it foresees the same."""

import pytest
import torch
from support.models import language_model, make_model
from support.runs import recipe

from kibitz import config
from kibitz.config import ModelConfig
from kibitz.models.kept import kept_on_meta
from kibitz.parallel.ranks import Ranks
from kibitz.preflight import budget
from kibitz.preflight.shapes import shape_of
from kibitz.training import room

SOFT = {"kind": "gemma2", "sliding_window": 16, "query_pre_attn_scalar": 8, "layer_types": None}
LONGEST = 120


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        "qwen3": make_model(tmp_path_factory.mktemp("qwen3") / "m", num_hidden_layers=3),
        "gemma2": make_model(tmp_path_factory.mktemp("gemma2") / "m", **SOFT),
    }


def asked(folder, tmp_path, **sections):
    return config.load(
        recipe(folder, folder, tmp_path / "run", rollout={"prompts_per_step": 64, "max_tokens": 100}, **sections)
    )


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
@pytest.mark.parametrize("micro_batches", [0.2, 1.0, 8.0])
def test_plan_and_run_choose_alike(kind, micro_batches, folders, tmp_path):
    """For GPUs with room for so many micro-batches of 16,384 tokens. The run counts what real passes keep, the plan shapes."""
    student, asks = language_model(folders[kind]), asked(folders[kind], tmp_path)
    shape = shape_of(ModelConfig(model=str(folders[kind])), torch.float32)
    free = 16.0 * shape.num_parameters + micro_batches * 16_384 * shape.kept_per_token(LONGEST)
    run = room._chosen(asks, [student, student], LONGEST, int(free), 1)
    plan = budget.memory(asks, budget.Models(shape, [shape]), 20, room=free + 2 * shape.bytes)
    chosen = room.choices(run)
    assert plan.chosen["optim.checkpointing"] == chosen["optim.checkpointing"]
    for name in ("optim.tokens_per_micro_batch", "optim.chunk_tokens"):
        assert plan.chosen[name] == pytest.approx(chosen[name], rel=0.15)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
@pytest.mark.parametrize("share", [0.25, 1.0, 4.0])
def test_a_plan_with_its_own_choices_fits(kind, share, folders, tmp_path):
    shape = shape_of(ModelConfig(model=str(folders[kind])), torch.bfloat16)
    models, asks = budget.Models(shape, [shape]), asked(folders[kind], tmp_path)
    size = share * budget.memory(asks, models, 20).peak
    plan = budget.memory(asks, models, 20, room=size)
    assert plan.chosen and plan.peak <= size


@pytest.mark.parametrize("recomputed", [False, True])
def test_on_a_cpu_a_micro_batch_keeps_so_many_bytes_and_the_plan_knows(recomputed, folders, tmp_path, monkeypatch):
    student = language_model(folders["qwen3"])
    asks = asked(folders["qwen3"], tmp_path, optim={"checkpointing": recomputed})
    shape = shape_of(ModelConfig(model=str(folders["qwen3"])), torch.float32)
    whole = budget.memory(asks, budget.Models(shape, [shape]), 20, program=1.0).phases["training"]["activations"]
    monkeypatch.setattr(room, "ON_A_CPU", 0.25 * whole)
    chosen = room.fitted(asks, [student, student], LONGEST, Ranks()).optim.tokens_per_micro_batch
    assert LONGEST < chosen < 64 * LONGEST
    plan = budget.memory(asks, budget.Models(shape, [shape]), 20, program=1.0).phases["training"]["activations"]
    assert plan == pytest.approx(0.25 * whole, rel=0.15)
    given = asked(folders["qwen3"], tmp_path, optim={"checkpointing": recomputed, "tokens_per_micro_batch": 16_384})
    assert room.fitted(given, [student, student], LONGEST, Ranks()).optim.tokens_per_micro_batch == 16_384


def test_what_the_field_says_of_a_cpu_is_what_is_chosen():
    said = config.OptimConfig.model_fields["tokens_per_micro_batch"].description
    assert f"{room.ON_A_CPU >> 20} MiB" in said


def test_what_a_recipe_gives_is_kept(folders, tmp_path):
    asks = asked(folders["qwen3"], tmp_path, optim={"tokens_per_micro_batch": 777, "checkpointing": False})
    shape = shape_of(ModelConfig(model=str(folders["qwen3"])), torch.bfloat16)
    plan = budget.memory(asks, budget.Models(shape, [shape]), 20, room=1e6)
    assert plan.chosen["optim.tokens_per_micro_batch"] == 777 and plan.chosen["optim.checkpointing"] is False


def test_eager_attention_keeps_the_square_of_a_length(folders):
    """At another length than those it was counted at."""
    shape = shape_of(ModelConfig(model=str(folders["gemma2"])), torch.bfloat16)
    assert shape.squares > 0
    for length in (96, 200):
        assert shape.kept_per_token(length) == pytest.approx(kept_on_meta(shape.model, length), rel=0.02)
    assert shape_of(ModelConfig(model=str(folders["qwen3"])), torch.bfloat16).squares == 0
