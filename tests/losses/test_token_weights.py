"""Which tokens count and how much: against numbers by hand, and whatever the micro-batches."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.models import of_written
from support.runs import STEP, recipe

import kibitz
from kibitz import methods
from kibitz.batching import pack
from kibitz.config import GRPOConfig, PolicyConfig, RecipeError
from kibitz.losses import POLICY_LOSSES, token_weights
from kibitz.losses.token_weights import by_turn
from kibitz.models.load import single_tokens
from kibitz.training import setup
from kibitz.training.guards import Guards
from kibitz.types import Writer

POLICY_NAMES = list(POLICY_LOSSES)


@pytest.fixture
def lab(lab):
    """Each of the methods on text of its own student."""
    return partial(lab, own=True)


def columns(run: kibitz.Run, *names: str) -> list[float]:
    return [row[name] for row in run.metrics for name in names]


# -------------------------------------------------------------------------------------------------- normalisation


def test_sequence_mean_counts_tokens_and_keeps_their_weights_apart():
    weights = [torch.tensor([1.5, 0.0, 1.5]), torch.tensor([1.0]), torch.zeros(2)]
    rescaled = token_weights.sequence_mean(weights)  # N = 3, S = 2: 3/4 for each of two tokens, 3/2 for the one alone
    assert [w.tolist() for w in rescaled] == [[1.125, 0.0, 1.125], [1.5], [0.0, 0.0]]
    assert token_weights.sequence_mean([torch.zeros(2), torch.zeros(0)])[0].tolist() == [0.0, 0.0]


def test_sft_is_the_mean_over_responses_of_each_ones_mean(lab):
    """Against the plain model in float64, response by response."""
    token, sequence = (lab({"type": "sft", "normalize": name}, name) for name in ("token", "sequence"))
    losses = [-of_written(token.both(r)[0], r) for r in token.rollouts]
    assert len({len(loss) for loss in losses}) > 2
    by_token, by_sequence = torch.cat(losses).mean().item(), torch.stack([x.mean() for x in losses]).mean().item()
    assert by_token != pytest.approx(by_sequence, rel=1e-2)
    assert token.objective() == pytest.approx(by_token, rel=1e-5)
    assert sequence.objective() == pytest.approx(by_sequence, rel=1e-5)


@pytest.mark.parametrize("method", [{"type": "opd"}, {"type": "opd", "support": "sampled"}, {"type": "grpo"}])
def test_the_mean_of_means_for_every_kind_of_loss(lab, method):
    one = lab(method | {"normalize": "sequence"})
    plain = methods.build(replace(one.parts, recipe=lab(method, "plain").setup.parts.recipe))
    means = []
    for scored in plain.signal(one.rollouts, STEP):
        total, _ = plain.loss(one.student, pack([scored]))
        means.append(total.item() / scored.rollout.num_tokens)
    assert one.objective() == pytest.approx(sum(means) / len(means), rel=1e-4, abs=1e-6)


def test_cut_off_responses_are_not_among_those_that_are_averaged(lab):
    """Masked before the shares and the means are taken, not after."""
    one = lab({"type": "opd", "normalize": "sequence"}, guards={"cut_off": "mask"}, rollout={"max_tokens": 5})
    one.rollouts, _ = Guards(one.setup.parts.recipe.guards).mask(one.rollouts)
    whole = [i for i, r in enumerate(one.rollouts) if r.finished]
    assert 0 < len(whole) < len(one.rollouts)
    scored = one.scored()
    assert all(scored[i].weight_T.sum() == 0 for i in range(len(scored)) if i not in whole)
    means = []
    for i in whole:
        student, teacher = one.both(one.rollouts[i])
        means.append((student.exp() * (student - teacher)).sum(-1).mean().item())
    assert one.objective(scored) == pytest.approx(sum(means) / len(means), rel=1e-4)


# ------------------------------------------------------------------------------------------------------ selection


def test_equal_scores_are_settled_by_place_and_not_by_rounding_noise():
    noise = torch.tensor([0.0, 3e-6, -3e-6, 2e-6, 1e-6])
    for shift in range(5):
        kept = token_weights.top_share(1.0 + noise.roll(shift), torch.ones(5), 0.4)
        assert kept.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert token_weights.top_share(torch.tensor([1.0, 1.001]), torch.ones(2), 0.5).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("share", [0.2, 0.77])
@pytest.mark.parametrize("rule", ["entropy", "tip"])
def test_the_tokens_kept_are_those_of_brute_force(lab, rule, share):
    one = lab({"type": "opd", "token_weight": rule, "token_share": share})
    pairs = [one.both(r) for r in one.rollouts]
    score_T = torch.cat([-(s.exp() * s).sum(-1) for s, _ in pairs])
    if rule == "tip":
        kl_T = torch.cat([(s.exp() * (s - t)).sum(-1) for s, t in pairs])
        h_T, d_T = ((x - x.min()) / (x.max() - x.min()) for x in (score_T, kl_T))
        score_T = h_T + d_T - h_T * d_T
    num = math.ceil(share * len(score_T))
    kept_T = torch.cat(one.weights())
    assert set(kept_T.tolist()) == {0.0, 1.0}
    assert kept_T.sum() == num
    assert score_T[kept_T == 1].min() > score_T[kept_T == 0].max() - 2e-4  # scores agree to four decimals


def test_the_loss_is_the_mean_over_the_chosen_tokens(lab):
    one = lab({"type": "opd", "token_weight": "entropy", "token_share": 0.3})
    chosen = []
    for rollout, weight_T in zip(one.rollouts, one.weights(), strict=True):
        student, teacher = one.both(rollout)
        chosen.append((student.exp() * (student - teacher)).sum(-1)[weight_T > 0])
    assert one.objective() == pytest.approx(torch.cat(chosen).mean().item(), rel=1e-5)


@pytest.mark.parametrize("method", [{}, {"support": "sampled"}, {"support": "top_k", "top_k": 20}])
def test_importance_of_early_tokens_by_hand(lab, method):
    """1 + gamma (1 - what came before / all of it), over the log-ratio of the written tokens, sequence by sequence."""
    one = lab({"type": "opd", "token_weight": "iw", **method})
    for rollout, weight_T in zip(one.rollouts, one.weights(), strict=True):
        student, teacher = one.both(rollout)
        index = torch.tensor(rollout.response_ids)[:, None]
        sizes = (teacher - student).gather(-1, index)[:, 0].abs().tolist()
        want = [1 + 0.5 * (1 - sum(sizes[:t]) / sum(sizes)) for t in range(len(sizes))]
        assert weight_T.tolist() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("method", [{"token_weight": "entropy"}, {"token_weight": "tip", "normalize": "sequence"},
                                    {"token_weight": "iw"}])  # fmt: skip
def test_weights_do_not_depend_on_the_micro_batch_or_the_chunk(lab, method):
    method = {"type": "opd", **method}
    whole = torch.cat(lab(method, "whole", optim={"tokens_per_micro_batch": 4096}).weights())
    for name, optim in {
        "micro": {"tokens_per_micro_batch": 50},
        "single": {"tokens_per_micro_batch": 1, "chunk_tokens": 3},
    }.items():
        torch.testing.assert_close(torch.cat(lab(method, name, optim=optim).weights()), whole, rtol=1e-4, atol=0)


def test_the_loss_that_is_logged_is_the_one_that_is_learnt(lab):
    one = lab({"type": "opd", "token_weight": "iw", "normalize": "sequence"})
    scored = one.scored()
    _, values = one.method.loss(one.student, pack(scored))
    assert values["loss"].mean().item() == pytest.approx(one.objective(scored), rel=1e-5)
    assert values["loss"].mean().item() != pytest.approx(values["reverse_kl"].mean().item(), rel=1e-2)


def test_choosing_takes_no_gradients(lab):
    one = lab({"type": "opd", "token_weight": "tip"})
    seen = []

    def watched(student_CS, teacher_CS):
        seen.append(student_CS.requires_grad)
        return (student_CS - teacher_CS).sum(-1)

    one.method = methods.build(replace(one.parts, divergence=watched))
    scored = one.scored()
    assert seen and not any(seen)
    one.method.loss(one.student, pack(scored))
    assert seen[-1]


# --------------------------------------------------------------------------------------------------- special tokens


def test_masked_tokens_have_no_weight_and_are_not_chosen(lab):
    tokens = ["1", "+", "<eos>"]
    one = lab({"type": "opd", "mask_tokens": tokens, "token_weight": "entropy", "token_share": 0.5})
    ids = set(single_tokens(one.student.tokenizer, tokens, "here"))
    token_T = torch.tensor([t for r in one.rollouts for t in r.response_ids])
    masked_T = torch.tensor([t.item() in ids for t in token_T])
    weight_T = torch.cat(one.weights())
    assert masked_T.any() and not weight_T[masked_T].any()
    assert weight_T.sum() == math.ceil(0.5 * int((~masked_T).sum()))
    for kind in ("sft", "grpo"):
        assert torch.cat(lab({"type": kind, "mask_tokens": tokens}, kind).weights()).tolist() == (~masked_T).tolist()


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("12", "method.mask_tokens: '12' is 2 tokens for this tokenizer; write a single token"),
        ("", "method.mask_tokens: '' is 0 tokens"),
        ("x", "method.mask_tokens: 'x' is unknown to this tokenizer"),
    ],
)
def test_a_mask_that_is_not_one_token_is_refused_before_weights_load(lab, monkeypatch, token, message):
    monkeypatch.setattr(setup, "load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match=message):
        lab({"type": "opd", "mask_tokens": [token]})


# ---------------------------------------------------------------------------------------------------- policy losses


@pytest.mark.parametrize("method", [{"type": "opd", "support": "sampled"}, {"type": "grpo"}])
def test_on_policy_all_policy_losses_are_one(lab, method):
    """The ratio is 1 up to what engine and trainer disagree by, so no bound is touched: equal to the last bit."""
    values = {}
    for name in POLICY_NAMES:
        one = lab(method | {"policy_loss": name}, name)
        scored = one.scored()
        total, tokens = one.method.loss(one.student, pack(scored))
        total.backward()
        grads = [p.grad for p in one.student.parameters() if p.grad is not None]
        values[name] = (tokens["loss"], torch.cat([g.flatten() for g in grads]))
        assert tokens["mismatch"].max() < 1e-4
        assert tokens["ratio"].sub(1).abs().max() < 1e-4 and not tokens["ratio_clipped"].any()
    for loss_T, grad in values.values():
        assert torch.equal(loss_T, values["sampled_token"][0])
        torch.testing.assert_close(grad, values["sampled_token"][1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", [{"type": "opd", "support": "sampled", "policy_loss": "ppo_clip"}, {"type": "grpo"}])
def test_mismatch_is_the_distance_of_the_log_probabilities(lab, method):
    """And where it is wide, the policy loss of the recipe is at work."""
    one = lab(method)
    for rollout in one.rollouts:
        rollout.logp_T = rollout.logp_T + 0.3
    _, values = one.method.loss(one.student, pack(one.scored()))
    torch.testing.assert_close(values["mismatch"], torch.full_like(values["mismatch"], 0.3), rtol=1e-3, atol=0)
    torch.testing.assert_close(values["ratio"], torch.full_like(values["ratio"], math.exp(-0.3)), rtol=1e-3, atol=0)
    assert (values["ratio_clipped"] == (values["advantage"] < 0)).all()  # below 1 - 0.2 the minimum is the clipped one


@pytest.mark.parametrize(
    (
        "options",
        "learns",
    ),  # ratios 0.4, 1, 1.4, 6 at S_sampled = 0.1; the weight of an advantage of 1 in minus the loss
    [
        ({}, [0.4, 1, 1.4, 6]),
        ({"policy_loss": "ppo_clip"}, [0.4, 1, 1.2, 1.2]),
        ({"policy_loss": "ppo_clip", "clip_ratio": 0.5}, [0.4, 1, 1.4, 1.5]),
        ({"policy_loss": "truncated"}, [0.4, 1, 1.4, 5]),
        ({"policy_loss": "truncated", "ratio_cap": 1.1}, [0.4, 1, 1.1, 1.1]),
        ({"policy_loss": "banded"}, [0, 1, 1.4, 0]),
        ({"policy_loss": "banded", "ratio_floor": 0.3, "ratio_cap": 1.2}, [0.4, 1, 0, 0]),
        ({"policy_loss": "one_sided"}, [0.4, 1, 1.4, 6]),
        ({"policy_loss": "one_sided", "max_drop": 0.05}, [0, 1, 1.4, 6]),
    ],
)
@pytest.mark.parametrize("section", [PolicyConfig, GRPOConfig])
def test_the_bounds_of_a_recipe_reach_the_loss(section, options, learns):
    config = section(**{"policy_loss": "sampled_token", **options})
    old_T, ratio_T = torch.full((4,), 0.1), torch.tensor([0.4, 1.0, 1.4, 6.0])
    loss_T = methods.policy_loss(config)((old_T * ratio_T).log(), old_T.log(), torch.ones(4))
    assert (-loss_T).tolist() == pytest.approx(learns, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "method",
    [
        {"type": "opd", "token_weight": "entropy", "token_share": 0.4},
        {"type": "gkd", "on_policy": 0, "token_weight": "tip", "normalize": "sequence"},
        {"type": "opd", "support": "sampled", "token_weight": "iw", "normalize": "sequence"},
        {"type": "grpo", "normalize": "sequence", "policy_loss": "banded"},
        {"type": "sft", "normalize": "sequence", "mask_tokens": ["<eos>"]},
    ],
)
def test_a_run_does_not_depend_on_the_micro_batch_or_the_chunk(small_models, tmp_path, method):
    def numbers(name: str, **optim) -> list[float]:
        models = small_models / "student", small_models / "teacher"
        tree = recipe(*models, tmp_path / name, method=method, steps=2, optim={"lr": 1e-3, **optim})
        run = kibitz.train(tree, ["eval.num_prompts=1"], grader=lambda prompt, text: float(len(text) % 3))
        return columns(run, "loss", "grad_norm", "num_tokens")

    whole = numbers("whole")
    assert numbers("single", tokens_per_micro_batch=1, chunk_tokens=3) == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_with_all_tokens_kept_a_run_is_the_plain_one_bit_for_bit(small_models, tmp_path):
    runs = {}
    for name, options in {"plain": {}, "all": {"token_weight": "tip", "token_share": 1.0}}.items():
        models = small_models / "student", small_models / "teacher"
        tree = recipe(*models, tmp_path / name, method={"type": "opd", **options}, steps=2)
        runs[name] = kibitz.train(tree, ["eval.num_prompts=1"])
    names = ("loss", "grad_norm", "num_tokens", "reverse_kl")
    assert columns(runs["all"], *names) == columns(runs["plain"], *names)
    first, second = (load_file(run.checkpoint / "model.safetensors") for run in runs.values())
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"policy_loss": "banded"}, "policy_loss belongs to the policy gradient: write method.support=sampled"),
        (
            {"support": "sampled", "token_weight": "tip"},
            "write method.token_weight=entropy, or method.policy.baseline=true",
        ),
        ({"support": "sampled", "mask_tokens": ["1"], "discount": 0.5}, "write method.policy.discount=0"),
        ({"support": "sampled", "policy_loss": "banded", "ratio_floor": 1.5}, "ratio_floor.*less than or equal to 1"),
        ({"support": "sampled", "policy_loss": "clip"}, "policy_loss"),
        ({"token_weight": "entropy", "token_share": 0}, "token_share.*greater than 0"),
        ({"normalize": "sequences"}, "method.normalize"),
    ],
)
def test_settings_that_are_refused(lab, method, message):
    with pytest.raises(RecipeError, match=message):
        lab({"type": "opd", **method})


def test_tip_on_sampled_tokens_is_possible_where_the_baseline_needs_the_distribution_anyway(lab):
    one = lab({"type": "opd", "support": "sampled", "baseline": True, "token_weight": "tip"})
    dense = lab({"type": "opd", "token_weight": "tip"}, "dense")
    assert torch.equal(torch.cat(one.weights()), torch.cat(dense.weights()))


# ------------------------------------------------------------------ turns

ENVIRONMENT = torch.tensor([0, 0, 0, 1, 1, 0, 1, 0, 0], dtype=torch.bool)  # turns of 3, 1 and 2 tokens


def test_even_turns_share_the_sum_and_keep_proportions_inside():
    weight_T = torch.tensor([1.0, 2.0, 1.0, 0.0, 0.0, 5.0, 0.0, 1.0, 2.0])
    found = by_turn(weight_T, ENVIRONMENT, "even")
    sums = [found[0:3].sum(), found[5:6].sum(), found[7:9].sum()]
    assert sums == pytest.approx([4.0, 4.0, 4.0])
    assert found[1] == 2 * found[0]
    assert found[8] == 2 * found[7]
    assert found[ENVIRONMENT].tolist() == [0.0] * 3


def test_first_and_last_turn_skip_those_with_nothing_to_learn():
    weight_T = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0])
    assert by_turn(weight_T, ENVIRONMENT, "first").nonzero()[:, 0].tolist() == [5]
    assert by_turn(weight_T, ENVIRONMENT, "last").nonzero()[:, 0].tolist() == [7, 8]
    assert by_turn(weight_T * 0, ENVIRONMENT, "last").sum() == 0


def test_one_turn_is_left_as_it_is_and_the_environment_is_never_learnt():
    weight_T = torch.tensor([1.0, 0.5, 1.0])
    none = torch.zeros(3, dtype=torch.bool)
    for rule in ("even", "first", "last"):
        assert torch.equal(by_turn(weight_T, none, rule), weight_T)
        assert by_turn(weight_T, ~none, rule).tolist() == [0.0] * 3


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_even_turns_against_a_loop(environment, draw):
    weights = [draw.choice([0.0, 0.5, 1.0]) for _ in environment]
    turns: list[list[int]] = []
    for place, outside in enumerate(environment):
        if not outside:
            if place == 0 or environment[place - 1]:
                turns.append([])
            turns[-1].append(place)
    learnt = [turn for turn in turns if sum(weights[i] for i in turn) > 0]
    expected = [0.0] * len(weights)
    for turn in learnt:
        total = sum(weights[i] for t in learnt for i in t)
        for i in turn:
            expected[i] = weights[i] * total / len(learnt) / sum(weights[j] for j in turn)
    found = by_turn(torch.tensor(weights), torch.tensor(environment), "even")
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_recipe_weighs_turns(lab):
    lab = lab({"type": "opd", "turn_weight": "last"})
    rollout = next(r for r in lab.rollouts if r.num_tokens >= 5)
    rollout.writer_T = torch.full((rollout.num_tokens,), Writer.STUDENT, dtype=torch.uint8)
    rollout.writer_T[2] = Writer.ENVIRONMENT
    weights = lab.weights()[lab.rollouts.index(rollout)].tolist()
    assert weights == [0.0, 0.0, 0.0] + [1.0] * (rollout.num_tokens - 3)
