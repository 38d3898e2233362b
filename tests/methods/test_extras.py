"""Options of every method: the KL to a reference model, gold responses, extrapolation past the teacher."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.lab import odd
from support.models import full_logp, make_model, of_written
from support.runs import STEP, TIMES, crash_and_resume, model_of, recipe, timeless

import kibitz.models.load
from kibitz import methods
from kibitz.losses.policy_gradient import distillation_advantage, extrapolated
from kibitz.methods.opd import SampledTokenOPD
from kibitz.methods.parts import scorer
from kibitz.methods.reference import reference_scorer

METHODS = {
    "opd": {"type": "opd"},
    "sampled": {"type": "opd", "support": "sampled"},
    "gkd": {"type": "gkd", "on_policy": 0.5},
    "skd": {"type": "skd", "accept_top_k": 3},
    "grpo": {"type": "grpo"},
}


# ------------------------------------------------------------------ the hold on a reference


@pytest.mark.parametrize("name", METHODS)
def test_the_hold_adds_the_kl_to_the_reference_at_every_token(lab, small_models, name):
    """Loss and gradient, against the plain method and a sum over the vocabulary in float64."""
    other = {"reference": {"model": str(small_models / "teacher")}}
    held = lab(METHODS[name] | other | {"reference_kl": 0.3})
    plain_method = methods.build(replace(held.parts, recipe=lab(METHODS[name], "plain").setup.parts.recipe))
    plain_loss, plain_gradient = held.values(plain_method.signal(held.rollouts, STEP), plain_method)
    loss, gradient = held.values()
    held.student.zero_grad()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for rollout in held.rollouts:
        student = full_logp(held.student, rollout)
        reference = full_logp(model_of(held.parts.reference), rollout).detach()
        total, count = total + (student.exp() * (student - reference)).sum(), count + rollout.num_tokens
    (0.3 * total / count).backward()
    want = torch.cat([p.grad.flatten() for p in held.student.parameters()])
    assert loss == pytest.approx(plain_loss + 0.3 * total.item() / count, rel=1e-4)
    torch.testing.assert_close(gradient, plain_gradient + want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


def test_the_reference_is_the_start_and_the_kl_to_it_is_zero_there(small_models, tmp_path):
    tree = recipe(
        small_models / "student",
        small_models / "teacher",
        tmp_path / "run",
        method={"type": "opd", "reference_kl": 0.5},
        optim={"lr": 1e-2},
    )
    run = kibitz.train(tree)
    free = kibitz.train(tree, ["method.reference_kl=0", f"output={tmp_path / 'free'}"])
    distances = [row["reference_kl"] for row in run.metrics]
    assert abs(distances[0]) < 1e-6
    assert distances[-1] > 0.05
    assert run.metrics[0]["loss"] == pytest.approx(free.metrics[0]["loss"], abs=1e-5)
    assert "reference_kl" not in free.metrics[0]
    flops = run.metrics[0]["flops"]
    assert flops["reference_scoring"] == pytest.approx(flops["student_training"] / 3)
    assert "reference_scoring" not in free.metrics[0]["flops"]


def test_a_strong_hold_keeps_the_student_where_it_was(small_models, tmp_path):
    def moved(name: str, strength: float) -> float:
        run = kibitz.train(
            recipe(
                small_models / "student",
                small_models / "teacher",
                tmp_path / name,
                method={"type": "opd", "reference_kl": strength},
                steps=10,
                optim={"lr": 5e-3},
            )
        )
        return run.evals[0]["reverse_kl"] - run.evals[-1]["reverse_kl"]

    assert moved("held", 100.0) < 0.5 * moved("free", 0.0)


def test_a_run_that_goes_on_is_held_to_the_first_start_and_replays_the_same(small_models, tmp_path):
    method = {"type": "opd", "reference_kl": 0.5, "replay": 0.5}
    sections = {"method": method, "save": {"every": 2}, "optim": {"lr": 1e-2}}
    models = small_models / "student", small_models / "teacher"
    whole = kibitz.train(recipe(*models, tmp_path / "whole", **sections))
    tree = recipe(*models, tmp_path / "part", **sections)
    run = crash_and_resume(tree)
    assert timeless(run.metrics) == timeless(whole.metrics)
    first, second = (load_file(r.checkpoint / "model.safetensors") for r in (whole, run))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_an_adapters_start_is_its_base_without_a_second_copy(small_models, tmp_path, targets, monkeypatch):
    """Bit for bit the run that loads the base again; a run that goes on is held to the base, not to its checkpoint."""
    student = make_model(tmp_path / "student", seed=1, tie_word_embeddings=False)
    tree = recipe(
        student,
        small_models / "teacher",
        tmp_path / "copied",
        student={"lora": {"rank": 4, "targets": targets}},
        method={"type": "opd", "reference_kl": 0.5, "reference": {"model": str(student)}},
        save={"every": 2},
        optim={"lr": 1e-2},
    )
    loaded, load = [], kibitz.models.load.load_weights
    monkeypatch.setattr("kibitz.models.load.load_weights", lambda *given: loaded.append(given[1]) or load(*given))
    copied = kibitz.train(tree)
    assert loaded.count("reference") == 1
    tree["method"].pop("reference")
    tree["output"] = str(tmp_path / "shared")
    run = crash_and_resume(tree)
    assert loaded.count("reference") == 1 and loaded.count("student") == 3
    assert run.metrics[-1]["reference_kl"] > 1e-3  # the hold is not on the student itself
    unlike = {"flops", *TIMES}  # the shared base counts the adapter beside it
    assert [{k: v for k, v in row.items() if k not in unlike} for row in run.metrics] == [
        {k: v for k, v in row.items() if k not in unlike} for row in copied.metrics
    ]
    first, second = (load_file(r.checkpoint / "adapter_model.safetensors") for r in (copied, run))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_references_that_cannot_be_are_refused(small_models, tmp_path):
    def train(method: dict):
        tree = recipe(small_models / "student", small_models / "teacher", tmp_path / "run", method=method)
        kibitz.train(tree)

    with pytest.raises(kibitz.RecipeError, match="nothing is compared with method.reference"):
        train({"type": "opd", "reference": {"model": str(small_models / "teacher")}})
    with pytest.raises(ValueError, match="student and method.reference have different tokenizers"):
        train({"type": "opd", "reference_kl": 0.1, "reference": {"model": str(small_models / "stranger")}})
    short = make_model(tmp_path / "short", max_position_embeddings=16)
    with pytest.raises(kibitz.RecipeError, match="the reference has 16 positions"):
        train({"type": "opd", "reference_kl": 0.1, "reference": {"model": str(short)}})
    with pytest.raises(kibitz.RecipeError, match="drop method.replay"):
        train({"type": "sft", "replay": 0.5})


# ------------------------------------------------------------------ gold responses


@pytest.mark.parametrize("normalize", ["token", "sequence"])
@pytest.mark.parametrize("name", ["opd", "gkd", "grpo"])
def test_replay_adds_the_mean_cross_entropy_of_gold_responses(lab, name, normalize):
    mixed = lab(METHODS[name] | {"replay": 0.3, "replay_coef": 0.7, "normalize": normalize})
    gold = [r for r in mixed.rollouts if r.objective == "replay"]
    own = [r for r in mixed.rollouts if not r.objective]
    assert len(gold) == 3  # 0.3 of 8, rounded up
    assert all(r.text == r.prompt.response for r in gold)
    plain = lab(METHODS[name] | {"normalize": normalize}, "plain")
    losses = [-of_written(mixed.both(r)[0], r) for r in gold]
    each = torch.stack([x.mean() for x in losses]) if normalize == "sequence" else torch.cat(losses)
    method = methods.build(replace(mixed.parts, recipe=plain.setup.parts.recipe))
    plain_loss, _ = mixed.values(method.signal(own, STEP), method)
    assert mixed.values()[0] == pytest.approx(plain_loss + 0.7 * each.mean().item(), rel=1e-4)


def test_the_trainers_step_is_the_one_that_is_tested_here(lab, small_models, tmp_path):
    """Loss and gradient of a run's first step, with two objectives of unequal size."""
    method = {"type": "opd", "replay": 0.25, "replay_coef": 0.7, "reference_kl": 0.3}
    loss, gradient = lab(method).values()
    models = small_models / "student", small_models / "teacher"
    row = kibitz.train(recipe(*models, tmp_path / "whole", method=method)).metrics[0]
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)


def test_gold_responses_leave_the_methods_own_numbers_alone(small_models, tmp_path):
    """The first step writes the same rollouts, and all but the loss, the gradient and the costs reads the same."""
    tree = recipe(
        small_models / "student",
        small_models / "teacher",
        tmp_path / "run",
        method={"type": "opd", "support": "sampled", "reward_coef": 1.0, "replay": 1.0},
        rollout={"store": True},
        steps=1,
    )
    run = kibitz.train(tree, grader=odd)
    plain = kibitz.train(tree, ["method.replay=0", f"output={tmp_path / 'plain'}"], grader=odd)
    row, other = run.metrics[0], plain.metrics[0]
    assert row["loss"] == pytest.approx(other["loss"] + row["replay_loss"], rel=1e-5)
    changed = {"loss", "grad_norm", "num_tokens", "replay_loss", "flops", *TIMES}
    assert {k: v for k, v in row.items() if k not in changed} == pytest.approx(
        {k: v for k, v in other.items() if k not in changed}
    )
    assert row["flops"]["teacher_scoring"] == other["flops"]["teacher_scoring"]
    assert row["flops"]["student_sampling"] == other["flops"]["student_sampling"]
    assert row["flops"]["student_training"] > other["flops"]["student_training"]
    stored = [json.loads(line) for line in (run.folder / "stored.jsonl").read_text().splitlines()]
    assert len(stored) == 16


def test_replay_teaches_what_the_data_says(small_models, tmp_path):
    tree = recipe(
        small_models / "student",
        small_models / "teacher",
        tmp_path / "run",
        method={"type": "grpo", "replay": 1.0},
        steps=20,
        optim={"lr": 5e-3},
    )
    run = kibitz.train(tree)
    assert run.metrics[-1]["replay_loss"] < run.metrics[0]["replay_loss"] - 0.3


# ------------------------------------------------------------------ past the teacher


def test_extrapolation_is_the_published_advantage():
    torch.manual_seed(0)
    student, teacher, reference = torch.randn(3, 50, dtype=torch.float64)
    for factor in (0.5, 1.0, 1.25, 3.0):
        want = factor * (teacher - reference) - (student - reference)
        got = distillation_advantage(student, extrapolated(teacher, reference, factor))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_factor_of_one_is_opd_in_loss_and_gradient(lab, small_models):
    """Through the code of ExOPD, with a reference that is far from both models: bit for bit."""
    plain = lab({"type": "opd", "support": "sampled"})
    make_model(small_models / "far", seed=9)
    other = {"reference": {"model": str(small_models / "far")}}
    far = lab({"type": "opd", "support": "sampled", "extrapolation": 1.25} | other, "far")
    inner = plain.method
    assert isinstance(inner, SampledTokenOPD)
    teacher = scorer(plain.parts, plain.parts.recipe.method)
    exopd = replace(inner, teacher=teacher, reference=reference_scorer(far.parts, "sampled"))
    loss, gradient = plain.values()
    same_loss, same_gradient = plain.values(exopd.signal(plain.rollouts, STEP), exopd)
    assert same_loss == loss
    assert torch.equal(same_gradient, gradient)
    _, further = far.values(far.method.signal(plain.rollouts, STEP))
    assert (further - gradient).norm() > 0.05 * gradient.norm()


def test_extrapolation_against_the_plain_models(lab):
    one = lab({"type": "opd", "support": "sampled", "extrapolation": 1.5, "kl_coef": 0.5, "discount": 0.9})
    for scored in one.scored():
        reference = full_logp(model_of(one.parts.reference), scored.rollout).detach()
        reference, student, teacher = (
            of_written(logp_TV, scored.rollout) for logp_TV in (reference, *one.both(scored.rollout))
        )
        each = 0.5 * (1.5 * (teacher - reference) - (student - reference))
        want = [sum(0.9 ** (s - t) * each[s].item() for s in range(t, len(each))) for t in range(len(each))]
        torch.testing.assert_close(scored.advantage_T, torch.tensor(want), rtol=1e-3, atol=1e-4)


def test_extrapolation_is_a_recipe_and_says_where_it_belongs(small_models, tmp_path):
    models = small_models / "student", small_models / "teacher"
    sampled = {"type": "opd", "support": "sampled", "extrapolation": 1.25}
    run = kibitz.train(recipe(*models, tmp_path / "run", method=sampled, steps=2))
    assert run.metrics[0]["flops"]["reference_scoring"] > 0
    for changes, message in (
        ({"support": "full"}, "extrapolation belongs to the policy gradient"),
        ({"baseline": True}, "drop it, or write method.policy.discount=0 without extrapolation"),
    ):
        with pytest.raises(kibitz.RecipeError, match=message):
            kibitz.train(recipe(*models, tmp_path / "no", method=sampled | changes))
