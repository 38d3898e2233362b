"""The preflight check: sizes against real models, and each accident that it exists for, planted."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from support.models import language_model, make_model, tokenizer
from support.runs import recipe
from support.vllm_stub import Stub
from typer.testing import CliRunner

from kibitz import config, methods, preflight
from kibitz.cli import app
from kibitz.config import FrozenConfig, LocalTeacherConfig, ModelConfig
from kibitz.models.load import load_tokenizer
from kibitz.preflight import budget, measured, texts
from kibitz.preflight.finding import Finding, worst
from kibitz.preflight.shapes import shape_of
from kibitz.preflight.speed import Speed
from kibitz.signals import TopK
from kibitz.teachers import ScoreRequest, build
from kibitz.teachers.local import LocalScorer
from kibitz.training.setup import prepare
from kibitz.types import Prompt

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}={% endif %}"
)
THINKING = CHATML + "{% if enable_thinking is defined and not enable_thinking %}();{% endif %}"
SILENT = Path("no-run-is-made-here")


def loaded(small_models, **sections) -> config.Recipe:
    return config.load(recipe(small_models / "student", small_models / "teacher", SILENT, **sections), [])


def lights(findings) -> dict[str, str]:
    return {finding.name: finding.light for finding in findings}


# ------------------------------------------------------------------ sizes, against real models


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_sizes_are_those_of_the_loaded_model(kind, tmp_path):
    folder = make_model(tmp_path / "m", kind=kind, num_hidden_layers=3, num_key_value_heads=1)
    shape = shape_of(ModelConfig(model=str(folder)), torch.float32)
    model = language_model(folder)
    assert shape.num_parameters == model.num_parameters
    assert next(shape.model.parameters()).device.type == "meta"
    from transformers import DynamicCache

    cache = model.model(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 5 * shape.cache_bytes_per_token == held


@pytest.mark.parametrize(("rows", "length"), [(64, 1), (4, 32)])
def test_activations_are_what_the_backward_pass_really_keeps(rows, length, small_models):
    model = language_model(small_models / "student")
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage()._cdata, t) is None or t, lambda t: t
    ):
        model.hidden(torch.zeros(rows, length, dtype=torch.long))
    real = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in parameters)
    planned = shape_of(ModelConfig(model=str(small_models / "student")), torch.float32).activation_bytes_per_token
    assert rows * length * planned == pytest.approx(real, rel=0.05)


def test_the_cost_is_what_the_ledger_counts(small_models, tmp_path):
    import kibitz

    tree = recipe(small_models / "student", small_models / "teacher", tmp_path / "run", steps=1)
    run = kibitz.train(tree)
    row, prompts = run.metrics[0], 16
    shapes = [shape_of(ModelConfig(model=str(small_models / n)), torch.float32) for n in ("student", "teacher")]
    loaded_recipe = config.load(
        {**tree, "rollout": {**tree["rollout"], "max_tokens": round(row["response_tokens"])}}, []
    )
    lengths = [len(p.ids) for p in prepare(loaded_recipe, overwrite=True).stream.prompts]
    estimate = budget.cost(loaded_recipe, shapes[0], shapes[1:], lengths, Speed(1e12, 1e15), price=None)
    assert prompts == tree["rollout"]["prompts_per_step"] * tree["rollout"]["samples_per_prompt"]
    assert sum(estimate.flops.values()) == pytest.approx(sum(row["flops"].values()), rel=0.1)
    assert estimate.hours == pytest.approx(sum(estimate.flops.values()) / (1e12 * budget.UTILISATION) / 3600)


def test_memory_that_does_not_fit_is_red_and_names_the_largest_part(small_models):
    shape = shape_of(ModelConfig(model=str(small_models / "student")), torch.float32)
    plan = budget.memory(loaded(small_models), budget.Models(shape, [shape]), 20)
    fits = budget.memory_finding(plan, 2 * plan.peak, "the device")
    tight = budget.memory_finding(plan, 1.05 * plan.peak, "the device")
    over = budget.memory_finding(plan, 0.99 * plan.peak, "the device")
    assert [f.light for f in (fits, tight, over)] == ["green", "amber", "red"]
    assert "optim.tokens_per_micro_batch" in over.text
    none = budget.memory_finding(plan, 0.5 * sum(plan.held.values()), "the device")
    assert "do not fit" in none.text


def test_several_devices_share_moments_and_masters_and_nothing_else(small_models):
    """As docs/machines.md has it; a teacher is shared only where the recipe shards it."""
    shape = shape_of(ModelConfig(model=str(small_models / "student")), torch.float32)
    whole = 4.0 * shape.num_parameters
    alone = budget.memory(loaded(small_models), budget.Models(shape, [shape]), 20)
    two = budget.memory(loaded(small_models), budget.Models(shape, [shape]), 20, devices=2)
    assert sum(alone.held.values()) == whole * (1 + 1 + 2)
    assert sum(two.held.values()) == whole * (1 + 1 + 2 / 2 + 1 / 2)
    assert two.phases["training"]["gradients"] == alone.phases["training"]["gradients"] == whole
    sharded = budget.memory(
        loaded(small_models, parallel={"shard_teacher": True}), budget.Models(shape, [shape]), 20, devices=2
    )
    assert sum(two.held.values()) - sum(sharded.held.values()) == (whole - 4 * shape.num_around) / 2


def test_of_a_student_in_parts_a_device_holds_its_part_and_what_is_together(small_models):
    """The whole appears nowhere; copies of the parts (HSDP) are shared by fewer."""
    model = language_model(small_models / "student")
    shape = shape_of(ModelConfig(model=str(small_models / "student")), torch.float32)
    whole = 4.0 * model.num_parameters
    layer = sum(p.nbytes for p in model.model.model.layers[0].parameters())
    around = whole - len(model.model.model.layers) * layer
    for parallel, shards in (({}, 8), ({"replicate": 2}, 4)):
        asks = loaded(small_models, parallel={"whole_copy": False, **parallel})
        plan = budget.memory(asks, budget.Models(shape), 20, devices=8)
        assert sum(plan.held.values()) == whole * (1 + 2) / shards + around + 2 * layer
        assert plan.phases["training"]["gradients"] == whole / shards + around + 2 * layer
    rounded = budget.memory(
        asks, budget.Models(shape_of(ModelConfig(model=str(small_models / "student")), torch.bfloat16)), 20, 8
    )
    assert sum(rounded.held.values()) == whole * (1 / 2 + 1 + 2) / 4 + (around + 2 * layer) / 2
    assert budget.memory(loaded(small_models), budget.Models(shape), 20) == budget.memory(
        asks, budget.Models(shape), 20
    )


def test_several_processes_write_their_shares_side_by_side(small_models):
    shape = shape_of(ModelConfig(model=str(small_models / "student")), torch.float32)
    one, four = (budget.memory(loaded(small_models), budget.Models(shape), 20, devices) for devices in (1, 4))
    assert one.phases["rollouts"]["keys and values"] == 4 * four.phases["rollouts"]["keys and values"]


def test_a_judge_and_a_reference_take_the_memory_that_they_really_have(small_models):
    """Both are models beside the student; a judge learns, too."""
    shape = shape_of(ModelConfig(model=str(small_models / "student")), torch.float32)
    asks = loaded(small_models, method={"type": "gad", "source": "teacher", "reference_kl": 0.1})
    setup = prepare(asks, overwrite=True)
    judge = methods.build(setup.parts).method
    while not hasattr(judge, "judge"):
        judge = judge.method
    parameters = judge.judge.optimizer.parameters
    models = budget.Models(shape, [shape], reference=shape, discriminator=shape)
    without, plan = budget.memory(asks, budget.Models(shape, [shape]), 20), budget.memory(asks, models, 20)
    more = {name: size for name, size in plan.held.items() if name not in without.held}
    assert more["reference weights"] == sum(p.nbytes for p in setup.parts.reference.models[0].model.parameters())
    assert more["judge weights"] == sum(p.nbytes for p in judge.model.model.parameters())
    width = setup.parts.student.model.config.hidden_size
    learnt = sum(p.nbytes for p in parameters) - 4 * width  # but for the number on top
    assert more["judge's moments and masters"] == 2 * learnt
    assert plan.phases["scoring"]["judge's gradients"] == learnt
    assert len(more) == 3


def test_the_check_counts_what_the_method_loads(small_models):
    def held(**method):
        asks = loaded(small_models, method=method)
        (found,) = (f for f in preflight.check_files(asks, preflight.Options(teraflops=1.0)) if f.name == "memory")
        return found.numbers["bytes"]["held"].keys()

    assert {"judge weights", "reference weights"} <= held(type="gad", source="teacher", reference_kl=0.1)
    assert not {"judge weights", "reference weights"} & held(type="opd")


@pytest.mark.parametrize(
    ("options", "held", "visits"),
    [
        ({}, 1.0, 0.0),
        ({"quantize": "int8"}, 0.25, 0.0),
        ({"quantize": "nf4"}, (0.5 + 1 / 64 + 1 / 4096) / 4, 0.0),
        ({"offload": "body"}, 0.0, 1.0),
        ({"offload": "layers"}, 0.0, 0.5),
    ],
)
def test_a_teacher_that_is_kept_small_is_planned_small(options, held, visits, small_models):
    """Shares of the bytes of its two layers: what is there all the time, and what comes to score. Norms are not rounded."""
    student = shape_of(ModelConfig(model=str(small_models / "student")), torch.float32)
    shape = shape_of(FrozenConfig(model=str(small_models / "teacher"), **options), torch.float32)
    layers = 4.0 * sum(p.numel() for p in shape.model.model.layers.parameters())
    norms = 4.0 * sum(p.numel() for p in shape.model.model.layers.parameters() if p.dim() == 1)
    held = held if "offload" in options else (norms + held * (layers - norms)) / layers
    plan = budget.memory(loaded(small_models), budget.Models(student, [shape]), 20)
    assert plan.held["teacher weights"] == pytest.approx(4 * shape.num_parameters - layers + held * layers)
    assert plan.phases["scoring"].get("weights that come to be read with", 0.0) == visits * layers
    assert "weights that come to be read with" not in plan.phases["training"]


def test_an_adapter_is_its_own_reference_without_weights(small_models):
    tree = recipe(
        small_models / "student", small_models / "teacher", SILENT, method={"type": "opd", "reference_kl": 0.1}
    )
    shape = shape_of(ModelConfig(model=str(small_models / "student")), torch.float32)
    models = budget.Models(shape, [shape], reference=shape)
    assert "reference weights" in budget.memory(config.load(tree, []), models, 20).held
    tree["student"]["lora"] = {"rank": 4}
    plan = budget.memory(config.load(tree, []), models, 20)
    assert "reference weights" not in plan.held and "reference's hidden states" in plan.phases["training"]
    waiting = budget.memory(config.load(tree, ["optim.hidden_states=cpu"]), models, 20)
    assert not {"reference's hidden states", "teacher's hidden states"} & waiting.phases["training"].keys()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"]])
def test_an_adapter_is_as_large_as_the_one_that_is_trained(targets, small_models):
    tree = recipe(small_models / "student", small_models / "teacher", SILENT)
    tree["student"]["lora"] = {"rank": 4, "targets": targets}
    asks = config.load(tree, [])
    shape = shape_of(ModelConfig(model=str(small_models / "student")), torch.float32)
    trained = prepare(asks, overwrite=True).parts.student.num_trainable
    assert shape.lora_parameters(4, targets) == trained
    assert budget.memory(asks, budget.Models(shape), 20).held["moments of the optimizer"] == 8 * trained


@pytest.mark.parametrize(
    ("optim", "size"), [({}, 8), ({"name": "muon"}, 8), ({"name": "sgd"}, 0), ({"name": "sgd", "sgd_momentum": 0.9}, 4)]
)
def test_moments_take_what_the_optimizer_keeps(optim, size, small_models):
    shape = shape_of(ModelConfig(model=str(small_models / "student")), torch.float32)
    held = budget.memory(loaded(small_models, optim=optim), budget.Models(shape), 20).held
    assert held["moments of the optimizer"] == size * shape.num_parameters


def test_money_is_hours_times_devices_times_price(small_models):
    shape = shape_of(ModelConfig(model=str(small_models / "student")), torch.float32)
    one = budget.cost(loaded(small_models), shape, [], [10], Speed(1e9, 1e15), price=2.0)
    two = budget.cost(loaded(small_models), shape, [], [10], Speed(1e9, 1e15), price=2.0, devices=2)
    assert one.money == pytest.approx(2.0 * one.hours)
    assert two.hours == pytest.approx(one.hours / 2)
    assert two.money == pytest.approx(one.money)


def test_rollouts_take_the_time_of_what_they_read(small_models):
    """One row of a fast machine: each token reads all weights, and the keys and values of half a response on average."""
    recipe = loaded(small_models, rollout={"prompts_per_step": 3, "samples_per_prompt": 1, "max_rows": 1}, steps=1)
    shape = shape_of(ModelConfig(model=str(small_models / "student")), torch.float32)
    found = budget.cost(recipe, shape, [], [10], Speed(1e30, 1e6), None)
    tokens = recipe.rollout.max_tokens
    weights = 3 * tokens * 4 * shape.num_parameters
    keys_and_values = 3 * sum((10 + t + 0.5) * shape.cache_bytes_per_token for t in range(tokens))
    assert 3600 * found.hours == pytest.approx((weights + keys_and_values) / (1e6 * budget.UTILISATION))


# ------------------------------------------------------------------ planted accidents: text


def test_other_token_ids_are_red():
    other = tokenizer()
    other.add_tokens(["x"])
    finding = texts.tokenizers(tokenizer(), other)
    assert finding.light == "red"
    assert finding.numbers["shared"] == len(tokenizer())
    assert texts.tokenizers(tokenizer(), tokenizer()).light == "green"


def test_a_teacher_that_ends_elsewhere_is_named_with_the_remedy():
    tok = tokenizer()
    semicolon = tok.encode("=", add_special_tokens=False)[0]
    finding = texts.ends(tok, tok, {tok.eos_token_id}, {tok.eos_token_id, semicolon})
    assert finding.light == "amber"
    assert "rollout.stop: ['=']" in finding.text
    assert texts.ends(tok, tok, {tok.eos_token_id}, {semicolon}).light == "red"
    assert texts.ends(tok, tok, {tok.eos_token_id, semicolon}, {semicolon}).light == "green"


def test_ends_are_read_from_the_generation_settings(tmp_path):
    folder = make_model(tmp_path / "m")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [2, 7]}))
    where = ModelConfig(model=str(folder))
    assert texts.stop_tokens(where, load_tokenizer(where, "teacher"), []) == {2, 7}
    assert texts.stop_tokens(where, load_tokenizer(where, "teacher"), ["="]) > {2, 7}


def test_templates_that_differ_are_shown_line_by_line(small_models):
    ours, theirs = tokenizer(), tokenizer()
    ours.chat_template = "{{ messages[0].content }}="
    theirs.chat_template = "({{ messages[0].content }})="
    finding = texts.chat_template(loaded(small_models), ours, theirs, [{"role": "user", "content": "1+1"}])
    assert finding.light == "amber"
    assert any("(" in theirs_line and "(" not in ours_line for ours_line, theirs_line in finding.differences)
    ours.chat_template = None
    assert "no" in texts.chat_template(loaded(small_models), ours, theirs).text
    theirs.chat_template = None
    assert texts.chat_template(loaded(small_models), ours, theirs).light == "green"


def test_a_thinking_mode_left_open_is_amber_and_says_which_way_it_stands(small_models):
    tok = tokenizer()
    tok.chat_template = THINKING.replace("<|{{ m.role }}|>", "").replace("\\n", "")
    messages = [{"role": "user", "content": "1+1"}]
    left = texts.thinking(loaded(small_models), tok, messages)
    assert left.light == "amber"
    assert left.numbers == {"default": True}
    chosen = loaded(small_models, data={"template": {"enable_thinking": False}})
    assert texts.thinking(chosen, tok, messages).light == "green"


def test_a_doubled_beginning_is_red():
    tok = tokenizer()
    bos = tok.bos_token_id
    if bos is None:
        tok.add_special_tokens({"bos_token": "<bos>"})
        bos = tok.bos_token_id
    prompts = [Prompt(ids=(bos, bos, 4), text="1", key="a"), Prompt(ids=(bos, 4), text="2", key="b")]
    finding = texts.first_token(tok, tok, prompts)
    assert finding.light == "red"
    assert "1 prompts" in finding.text
    assert texts.first_token(tok, tok, prompts[1:]).light == "green"


def test_lengths_against_positions(small_models):
    prompts = [20, 3]
    asks = loaded(small_models, rollout={"max_tokens": 30})
    assert texts.lengths(asks, prompts, [64, None]).light == "green"
    finding = texts.lengths(asks, prompts, [64, 40])
    assert finding.light == "red"
    assert "rollout.max_tokens=20" in finding.text


# ------------------------------------------------------------------ planted accidents: models


@pytest.fixture(scope="module")
def setup(small_models):
    return prepare(loaded(small_models), overwrite=True)


def test_a_student_reads_zero_against_itself_and_not_against_other_weights(setup):
    rollouts = measured.write(setup, 6)
    assert measured.itself(setup, rollouts).light == "green"
    other = copy.deepcopy(setup.parts.student)
    with torch.no_grad():
        other.model.get_output_embeddings().weight[3, 3] += 0.5
    assert measured.itself(setup, rollouts, other).light == "red"


def test_an_engine_with_other_weights_is_red(setup):
    rollouts = measured.write(setup, 6)
    assert measured.engine_gap(setup, rollouts).light == "green"
    for rollout in rollouts:
        rollout.logp_T = rollout.logp_T - 0.1
    assert measured.engine_gap(setup, rollouts).light == "amber"
    for rollout in rollouts:
        rollout.logp_T = rollout.logp_T - 0.4
    assert measured.engine_gap(setup, rollouts).light == "red"


def test_a_teacher_that_ignores_the_temperature_is_red(setup):
    rollouts = measured.write(setup, 2)
    scores = [setup.parts.teacher.scorer(ScoreRequest("top_k", 5, tau)).score(rollouts)[0] for tau in (1.0, 2.0)]
    assert all(isinstance(score, TopK) for score in scores)
    assert measured.loss_temperature(*scores).light == "green"
    assert measured.loss_temperature(scores[0], scores[0]).light == "red"


def test_distance_from_every_kind_of_signal(setup):
    rollouts = measured.write(setup, 6)
    exact, coarse, sampled = (
        measured.opinions(setup, rollouts, setup.parts.teacher.scorer(ScoreRequest(kind, 4)).score(rollouts))
        for kind in ("dense", "top_k", "sampled")
    )
    kl = [found[0].numbers["reverse_kl"] for found in (exact, coarse, sampled)]
    assert 0 < kl[1] < kl[0]
    assert kl[2] > 0
    assert exact[0].numbers["teacher_logp"] == pytest.approx(sampled[0].numbers["teacher_logp"], abs=1e-4)
    same = measured.opinions(setup, rollouts, LocalScorer(setup.parts.student, ScoreRequest()).score(rollouts))
    assert same[0].light == "amber"
    assert "nothing to learn" in same[0].text


def test_a_teacher_as_sharp_as_greedy_is_noticed(setup):
    assert measured._sharpness(0.3, 0.5).light == "green"
    assert measured._sharpness(1e-5, 0.5).light == "amber"


def test_who_is_better_at_the_task(setup):
    def answers(*rewards: float):
        rollouts = measured.write(setup, len(rewards))
        for rollout, reward in zip(rollouts, rewards, strict=True):
            rollout.reward = reward
        return rollouts

    good, bad = answers(*[1.0] * 12), answers(*[0.0] * 12)
    assert measured.task(setup, good, bad).light == "green"
    assert measured.task(setup, bad, good).light == "red"
    assert measured.task(setup, good, good).light == "amber"


def test_responses_that_never_end_are_noticed(setup):
    rollouts = measured.write(setup, 6)
    for number, rollout in enumerate(rollouts):
        rollout.finished = number < 3
    finding = measured.endings(rollouts, 12)
    assert finding.light == "amber"
    assert "50% cut off" in finding.text


def test_an_architecture_that_cannot_be_planned_is_said_and_stops_nothing(small_models, tmp_path):
    folder = make_model(tmp_path / "m")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "hidden_size": -3}))
    asks = config.load(recipe(folder, small_models / "teacher", SILENT), [])
    found = lights(preflight.check_files(asks, preflight.Options(teraflops=1)))
    assert found["sizes"] == "amber"
    assert "memory" not in found


def test_the_worst_light_is_that_of_the_whole():
    assert worst([]) == "green"
    assert worst([Finding("a", "green", ""), Finding("b", "red", ""), Finding("c", "amber", "")]) == "red"


# ------------------------------------------------------------------ the command


def says(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def file(tmp_path, small_models) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(small_models / "student", small_models / "teacher", tmp_path / "run")))
    return path


def test_the_command_prints_lights_and_makes_nothing(file, tmp_path):
    answer = says("check", file, "--prompts", 4, "--teraflops", 1, "--price", 2)
    assert answer.exit_code == 0, answer.output
    for name in ("tokenizer", "memory", "cost", "student against itself", "distance", "task"):
        assert f"{name}:" in answer.stdout
    assert not (tmp_path / "run").exists()


def test_json_holds_every_finding(file):
    answer = says("check", file, "--prompts", 4, "--json", "--teraflops", 1)
    tree = json.loads(answer.stdout)
    assert {"tokenizer", "memory", "cost", "overlap"} <= {row["name"] for row in tree["findings"]}
    assert tree["light"] == preflight.worst([Finding("", row["light"], "") for row in tree["findings"]])


def test_a_red_light_is_exit_code_1_and_loads_no_weights(file):
    answer = says("check", file, "--memory", "0.000001", "--teraflops", 1)
    assert answer.exit_code == 1
    assert "STOP memory" in answer.stdout
    assert "student against itself" not in answer.stdout


def test_a_mistaken_recipe_is_exit_code_2(file):
    answer = says("check", file, "rollout.max_token=3")
    assert answer.exit_code == 2
    assert "max_tokens" in answer.stderr


def test_what_models_say_cannot_reach_the_terminal():
    from rich.console import Console

    from kibitz.cli.check import show

    console = Console(record=True, width=80, force_terminal=False)
    show(console, Finding("x", "amber", "\x1b[31mred[/]", {}, (("[bold]a\x1b[2J", "b"),)))
    assert "\x1b" not in console.export_text()


# ------------------------------------------------------------------ teachers that are no models here


def asks(small_models, teacher: dict, **sections) -> config.Recipe:
    return config.load({**recipe(small_models / "student", None, SILENT, **sections), "teacher": teacher}, [])


def test_a_server_is_compared_with_a_copy_of_its_model(small_models):
    method = {"type": "opd", "support": "top_k", "top_k_of": "teacher", "top_k": 8}
    with Stub(small_models / "teacher") as stub:
        asked = asks(small_models, {"url": stub.url, "patience": 0.0}, method=method)
        right, wrong = (
            {
                f.name: f
                for f in preflight.check(asked, preflight.Options(None, 1.0, prompts=4, local_teacher=str(copy)))
            }
            for copy in (small_models / "teacher", small_models / "student")
        )
    assert right["server against local teacher"].light == "green"
    assert right["server against local teacher"].numbers["mean"] < 1e-3
    assert wrong["server against local teacher"].light == "red"
    assert right["distance"].numbers["reverse_kl"] > 0


def test_stored_scores_and_chat_endpoints_are_checked_as_far_as_they_go(small_models, tmp_path):
    store = tmp_path / "s"
    kept = build.load(LocalTeacherConfig(model=str(small_models / "teacher"), store=str(store)), torch.device("cpu"))
    kept.scorer(ScoreRequest()).score(measured.write(prepare(loaded(small_models), overwrite=True), 2))
    with Stub(small_models / "teacher") as stub:
        pairs = [({"stored": str(store)}, {"type": "opd"}), ({"chat": stub.url}, {"type": "sft", "source": "teacher"})]
        for teacher, method in pairs:
            asked = asks(small_models, teacher, method=method)
            found = lights(preflight.check(asked, preflight.Options(teraflops=1, prompts=2)))
            assert found["student against itself"] == "green"
            assert "distance" not in found


# ------------------------------------------------------------------ shapes that are not plain attention

UNUSUAL = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_mixtures_and_recurrent_models_have_a_plan(kind, tmp_path):
    """In both dtypes, and in float32 what a real backward pass keeps: of rows as long as a chunk of Mamba 2."""
    folder = make_model(tmp_path, kind=kind, **UNUSUAL[kind])
    wide, narrow = (shape_of(ModelConfig(model=str(folder)), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert 0.4 < narrow.activation_bytes_per_token / wide.activation_bytes_per_token < 1.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = language_model(folder)
        kept, parameters = {}, {p.untyped_storage()._cdata for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage()._cdata, t) is None or t, lambda t: t
        ):
            model.hidden(torch.zeros(2, 256, dtype=torch.long))
    real = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in parameters)
    assert 512 * wide.activation_bytes_per_token == pytest.approx(real, rel=0.25)


def test_a_gpu_writes_as_many_rows_as_it_has_room_for(small_models):
    """The plan says how many, and rollouts then fit; the CPU writes what is asked."""
    asks = loaded(small_models, rollout={"prompts_per_step": 64, "max_tokens": 100})
    shape = shape_of(ModelConfig(model=str(small_models / "student")), torch.bfloat16)
    free = budget.memory(asks, budget.Models(shape), 20)
    assert free.rows == 128
    parts = free.phases["rollouts"]
    a_row = (parts["keys and values"] + parts["logits of a token"]) / 128
    room = sum(free.held.values()) + 32.5 * a_row / 0.8  # the engine takes that share of what is free
    tight = budget.memory(asks, budget.Models(shape), 20, room=room)
    assert tight.rows == 32
    assert 4 * tight.phases["rollouts"]["keys and values"] == parts["keys and values"]
    read = [budget.decoded_bytes(asks, shape, 20, 1, rows) for rows in (32, 128)]
    assert read[0] - read[1] == 3 * 100 * shape.bytes  # four waves read the weights where one did
