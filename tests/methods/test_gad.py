"""Generative adversarial distillation: the judge, the reward that it is, and runs of both."""

import math
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from support.models import make_model
from support.runs import STEP, crash_and_resume, recipe, timeless

import kibitz
from kibitz import methods
from kibitz.config import RecipeError, load
from kibitz.losses.adversarial import bradley_terry
from kibitz.losses.policy_gradient import group_advantages
from kibitz.training.setup import prepare
from kibitz.types import Prompt, Rollout, Step


def built(tree: dict):
    setup = prepare(tree)
    return setup, methods.build(setup.parts)


def answer(ids: list[int], prompt: tuple[int, ...] = (3, 4, 5)) -> Rollout:
    return Rollout(Prompt(prompt, "", "key"), ids, torch.zeros(len(ids)), finished=True)


# ------------------------------------------------------------------ the judge


def test_bradley_terry_by_hand():
    """log(1 + e^(worse - better)), whose slope is the probability of the wrong preference; far out it stays finite."""
    better = torch.tensor([0.0, 2.0, -1.0, -500.0], dtype=torch.float64, requires_grad=True)
    worse = torch.tensor([0.0, 0.5, 3.0, 500.0], dtype=torch.float64, requires_grad=True)
    loss = bradley_terry(better, worse)
    wanted = [math.log(2), math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(4)), 1000.0]
    assert loss.tolist() == pytest.approx(wanted)
    up, down = torch.autograd.grad(loss.sum(), [better, worse])
    wrong = [0.5, 1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-4)), 1.0]
    assert up.tolist() == pytest.approx([-share for share in wrong])
    assert down.tolist() == pytest.approx(wrong)


def test_a_score_is_of_the_last_token_and_not_of_the_padding(models, tmp_path):
    """Alone, and among longer ones; it moves with any token of the response, not with what stands behind it."""
    _, method = built(recipe(models[0], None, tmp_path / "run", method={"type": "gad"}))
    torch.nn.init.normal_(method.judge.module.score.weight, generator=torch.Generator().manual_seed(0))
    short, long = answer([6, 7]), answer([8, 9, 10, 11, 12])
    with torch.no_grad():
        together, alone = method._scores([long, short]), [method._scores([one]) for one in (long, short)]
        other = method._scores([answer([7, 7])])
    torch.testing.assert_close(together, torch.cat(alone))
    assert abs(other - together[1]) > 1e-3


def test_it_learns_to_separate_two_distributions(models, tmp_path):
    """Three tokens from one half of the digits against three from the other: fresh pairs are told apart, all 100 of them."""
    tree = recipe(models[0], None, tmp_path / "run", method={"type": "gad", "discriminator": {"lr": 3e-3}})
    setup, method = built(tree)
    generator = torch.Generator().manual_seed(0)

    def draw(low: int) -> Rollout:
        return answer(torch.randint(low, low + 5, (3,), generator=generator).tolist())

    for _ in range(40):
        method.comparisons = [[draw(3), draw(8), draw(8)] for _ in range(8)]
        method._judge()
    assert setup.parts.ledger.metrics["discriminator_loss"] < 0.2
    method.comparisons = [[draw(3), draw(8)] for _ in range(100)]
    method._judge()
    assert setup.parts.ledger.metrics["discriminator_accuracy"] == 1.0


def test_its_step_does_not_depend_on_the_micro_batch(models, tmp_path):
    def state(name: str, **optim) -> dict[str, torch.Tensor]:
        tree = recipe(models[0], None, tmp_path / name, method={"type": "gad"}, steps=1, optim=optim)
        return load_file(kibitz.train(tree).checkpoint / "training" / "discriminator.safetensors")

    whole, parts = state("whole"), state("parts", tokens_per_micro_batch=40)
    moments = [key for key in whole if key.endswith("exp_avg")]
    assert len(moments) > 10
    for key in moments:
        torch.testing.assert_close(parts[key], whole[key], rtol=1e-3, atol=1e-7)


# ------------------------------------------------------------------ the reward


def test_the_policy_gradient_of_its_score_is_exact_in_expectation(models, tmp_path):
    """Answers of one token out of five, all pairs of two samples enumerated: the gradient of minus E_S[D], by the half that
    the mean of two leaves of it."""
    setup, method = built(recipe(models[0], None, tmp_path / "run", method={"type": "gad", "normalize_std": False}))
    torch.nn.init.normal_(method.judge.module.score.weight, generator=torch.Generator().manual_seed(0))
    words, prompt = [4, 5, 6, 7, 8], Prompt((3, 9), "", "key")
    with torch.no_grad():
        scores = method._scores([answer([word], prompt.ids) for word in words])
        hidden = setup.parts.student.hidden(torch.tensor([prompt.ids]))[0, -1]
        sampled = torch.log_softmax(setup.parts.student.head(hidden[None])[0, words].double(), -1)
    logits = sampled.clone().requires_grad_()  # a student of five words
    (wanted,) = torch.autograd.grad(-(torch.softmax(logits, -1) @ scores.double()), logits)

    found = torch.zeros_like(logits)
    for pair in product(range(5), repeat=2):
        advantages = group_advantages(scores[list(pair)].double())
        logp = torch.log_softmax(logits, -1)[list(pair)]
        loss = methods.policy_loss(method.config)(logp, sampled[list(pair)], advantages).mean()
        (gradient,) = torch.autograd.grad(loss, logits)
        found += sampled[list(pair)].sum().exp() * gradient
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(found, wanted / 2)


def test_scores_are_given_before_the_judge_learns_from_them(models, tmp_path):
    """Each answer's tokens share its score, less the mean of its group, by the group's deviation."""
    setup, method = built(recipe(models[0], None, tmp_path / "run", method={"type": "gad", "warmup": 0.0}))
    torch.nn.init.normal_(method.judge.module.score.weight, generator=torch.Generator().manual_seed(0))
    rollouts = method.rollout(setup.stream.take(4), Step(0, 9, seed=7))
    with torch.no_grad():
        scores_GN = method._scores(rollouts).view(4, 2)
    scored = method.signal(rollouts, STEP)
    for one, advantage in zip(scored, group_advantages(scores_GN, True).flatten(), strict=True):
        torch.testing.assert_close(one.advantage_T, advantage.expand(one.rollout.num_tokens), rtol=1e-4, atol=1e-4)
    assert [comparison[0].text for comparison in method.comparisons] == [r.prompt.response for r in rollouts[::2]]
    assert all(comparison[1:] == rollouts[2 * i : 2 * i + 2] for i, comparison in enumerate(method.comparisons))


# ------------------------------------------------------------------ runs


def test_the_warm_up_is_sft_on_the_same_text(models, tmp_path):
    """To the bit, for the student; the judge learns all the while."""
    gad = kibitz.train(recipe(models[0], None, tmp_path / "gad", method={"type": "gad", "warmup": 0.5}))
    sft = kibitz.train(recipe(models[0], None, tmp_path / "sft", method={"type": "sft"}))
    assert [row["loss"] for row in gad.metrics][:2] == [row["loss"] for row in sft.metrics][:2]
    assert ["ratio" in row for row in gad.metrics] == [False, False, True, True]
    assert all(row["flops"]["opponent_training"] > 0 and row["flops"]["student_sampling"] > 0 for row in gad.metrics)
    assert all("teacher_sampling" not in row["flops"] for row in gad.metrics)
    assert gad.metrics[3]["discriminator_loss"] != gad.metrics[0]["discriminator_loss"]


def test_the_grader_does_not_leak_into_the_loss(models, tmp_path):
    runs = [
        kibitz.train(recipe(models[0], None, tmp_path / name, method={"type": "gad", "warmup": 0.25}), grader=grader)
        for name, grader in {"zero": lambda p, t: 0.0, "length": lambda p, t: float(len(t))}.items()
    ]
    first, second = ((run.checkpoint / "model.safetensors").read_bytes() for run in runs)
    assert first == second
    assert runs[0].metrics[-1]["reward"] != runs[1].metrics[-1]["reward"]


@pytest.mark.parametrize("source", ["dataset", "teacher"])
def test_it_resumes_bit_for_bit_with_its_judge(models, tmp_path, source):
    sections = {"method": {"type": "gad", "source": source, "warmup": 0.25}, "save": {"every": 2}}
    whole = kibitz.train(recipe(*models, tmp_path / "whole", **sections))
    tree = recipe(*models, tmp_path / "part", **sections)
    run = crash_and_resume(tree)
    assert timeless(run.metrics) == timeless(whole.metrics)
    for file in ("model.safetensors", "training/discriminator.safetensors", "training/optimizer.safetensors"):
        assert (run.checkpoint / file).read_bytes() == (whole.checkpoint / file).read_bytes(), file


def test_the_judge_may_stand_on_another_model(models, tmp_path):
    other = make_model(tmp_path / "other", seed=5, hidden_size=16, num_hidden_layers=1)
    method = {"type": "gad", "discriminator": {"model": str(other), "lr": 1e-2}}
    run = kibitz.train(recipe(models[0], None, tmp_path / "run", method=method, steps=1))
    state = load_file(run.checkpoint / "training" / "discriminator.safetensors")
    assert state["weights|score.weight"].shape == (1, 16)
    assert not any("lm_head" in name for name in state)


@pytest.mark.slow
def test_it_pleases_a_judge_that_tells_teacher_from_student_on_the_arithmetic_world(tmp_path):
    """The teacher's text alone, read by nobody but the judge: the student comes nearer to the teacher."""
    from kibitz.cli import demo

    tree = demo.recipe(str(tmp_path / "run"))
    tree |= {"method": {"type": "gad", "source": "teacher"}, "steps": 15}
    tree |= {"eval": {"every": 0, "num_prompts": 96, "heatmaps": 0}, "optim": {"lr": 1e-3}}
    tree["rollout"] |= {"prompts_per_step": 12, "samples_per_prompt": 4}
    first, last = kibitz.train(tree).evals
    assert last["reverse_kl"] < first["reverse_kl"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"rollout": {"samples_per_prompt": 1}}, "rollout.samples_per_prompt of 2 or more"),
        ({"rollout": {"top_k": 5}}, "drop rollout.top_p and rollout.top_k"),
        ({"rollout": {"epsilon": 0.1}}, "drop rollout.epsilon"),
        ({"method": {"type": "gad", "source": "teacher"}}, "method gad needs a teacher"),
    ],
)
def test_what_cannot_be_is_refused(models, tmp_path, sections, message):
    with pytest.raises(RecipeError, match=message):
        load(recipe(models[0], None, tmp_path / "run", **{"method": {"type": "gad"}, **sections}))


def test_a_judge_with_another_tokenizer_is_refused_before_any_weights_load(models, small_models, tmp_path):
    method = {"type": "gad", "discriminator": {"model": str(small_models / "stranger")}}
    with pytest.raises(ValueError, match="student and method.discriminator have different tokenizers"):
        prepare(recipe(models[0], None, tmp_path / "run", method=method))
    method["discriminator"]["model"] = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="method.discriminator.model: .*nowhere"):
        prepare(recipe(models[0], None, tmp_path / "run", method=method))
