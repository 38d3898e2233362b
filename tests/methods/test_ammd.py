"""Adversarial moment matching: the derivation, the inner maximum, the student's gradient, and small runs."""

from itertools import product

import pytest
import torch
from support.runs import STEP, crash_and_resume, recipe, timeless

import kibitz
from kibitz import methods
from kibitz.config import RecipeError, load
from kibitz.losses.adversarial import MomentMatching, moment_gap
from kibitz.losses.divergences import total_variation
from kibitz.signals import Dense, Tokens
from kibitz.training.setup import prepare
from kibitz.types import Step


def two_policies(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    student, teacher = torch.log_softmax(logits, -1)
    return student, teacher


# ------------------------------------------------------------------ the derivation


@pytest.mark.parametrize("seed", range(3))
def test_the_performance_difference_is_an_off_policy_and_an_on_policy_moment(seed):
    """Words of 3 letters over 3, all of them enumerated, any reward of each letter after each beginning:

    J(T) - J(S) = E_{y~T} sum_t Q^S(s_t, y_t) - E_{a~S} Q^S(s_t, a)  =  E_{y~S} sum_t E_{a~T} Q^T(s_t, a) - Q^T(s_t, y_t)
    """
    size, length = 3, 3
    starts = [start for num in range(length) for start in product(range(size), repeat=num)]
    generator = torch.Generator().manual_seed(seed)
    reward = {s: torch.randn(size, generator=generator, dtype=torch.float64) for s in starts}
    student, teacher = (dict(zip(starts, p.exp(), strict=True)) for p in two_policies(seed, len(starts), size))

    def value(policy, start) -> torch.Tensor:
        return torch.tensor(0.0) if len(start) == length else policy[start] @ action_values(policy, start)

    def action_values(policy, start) -> torch.Tensor:
        return reward[start] + torch.stack([value(policy, (*start, a)) for a in range(size)])

    def expected(policy, of_state) -> torch.Tensor:
        """Over whole words of `policy`, the sum of `of_state(start, letter)`."""
        total = torch.tensor(0.0, dtype=torch.float64)
        for word in product(range(size), repeat=length):
            probability = torch.stack([policy[word[:t]][word[t]] for t in range(length)]).prod()
            total += probability * sum(of_state(word[:t], word[t]) for t in range(length))
        return total

    difference = value(teacher, ()) - value(student, ())
    off_policy = expected(teacher, lambda s, a: action_values(student, s)[a] - student[s] @ action_values(student, s))
    on_policy = expected(student, lambda s, a: teacher[s] @ action_values(teacher, s) - action_values(teacher, s)[a])
    torch.testing.assert_close(off_policy, difference)
    torch.testing.assert_close(on_policy, difference)
    exact = expected(student, lambda s, a: moment_gap(student[s].log(), teacher[s].log(), action_values(teacher, s)))
    torch.testing.assert_close(exact, difference)  # the expectation over the student's action, taken exactly


@pytest.mark.parametrize("seed", range(3))
def test_the_inner_maximum_is_twice_the_total_variation(seed):
    """The gap is linear in q, so that its maximum over the cube stands at a corner: all 64 are tried."""
    student, teacher = two_policies(seed, 6)
    corners = torch.tensor(list(product([-1.0, 1.0], repeat=6)), dtype=torch.float64)
    gaps = moment_gap(student, teacher, corners)
    bound = 2 * total_variation(student, teacher)
    torch.testing.assert_close(gaps.max(), bound)
    torch.testing.assert_close(corners[gaps.argmax()], (teacher - student).sign())


def test_ascent_of_an_unrestricted_table_finds_the_maximum():
    student, teacher = two_policies(3, 5, 8)
    table = torch.zeros(5, 8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        (-moment_gap(student, teacher, table.tanh()).sum()).backward()
        optimizer.step()
    bound = 2 * total_variation(student, teacher)
    reached = moment_gap(student, teacher, table.tanh())
    torch.testing.assert_close(reached, bound, rtol=3e-3, atol=0)
    assert (reached < bound).all()


# ------------------------------------------------------------------ the student's side


def test_the_students_gradient_is_the_policy_gradient_over_all_actions():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(4, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher, q = (torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    zeros, signal = torch.zeros(4, dtype=torch.long), Dense(teacher, lambda h: h)
    tokens = Tokens(zeros, torch.ones(4), torch.zeros(4), signal)
    values = MomentMatching(lambda student_CV, teacher_CV: q)(logits, tokens)
    (found,) = torch.autograd.grad(values["loss"].sum(), logits)
    wanted = torch.zeros_like(logits)
    for action in range(7):
        logp = torch.log_softmax(logits, -1)[:, action]
        (score,) = torch.autograd.grad(logp.sum(), logits)
        wanted -= (logp.exp() * q[:, action])[:, None].detach() * score
    torch.testing.assert_close(found, wanted)
    assert {"reverse_kl", "student_entropy", "top_k_overlap"} <= values.keys()


def test_a_student_that_equals_its_teacher_has_no_gradient(models, tmp_path):
    """Nothing tells the two apart, so that the action values stay zero and so does the gradient."""
    student, _ = models
    run = kibitz.train(recipe(student, student, tmp_path / "run", method={"type": "ammd"}, optim={"lr": 1e-2}))
    assert [row["grad_norm"] for row in run.metrics] == [0.0] * 4
    assert [row["moment_bound_on_policy"] for row in run.metrics] == [0.0] * 4


def test_the_action_values_climb_to_the_bound(models, tmp_path):
    """On fixed text, and a student that does not move: 300 steps reach 90% of the largest gap there is."""
    tree = recipe(*models, tmp_path / "run", method={"type": "ammd", "q_steps": 300, "q_bound": 2.0})
    setup = prepare(tree)
    method = methods.build(setup.parts)
    rollouts = method.rollout(setup.stream.take(8), Step(0, 1, seed=7))
    scored = method.signal(rollouts, STEP)
    assert {s.objective: sum(t.objective == s.objective for t in scored) for s in scored} == {
        "on_policy": 8,
        "off_policy": 8,
    }
    metrics = setup.parts.ledger.metrics
    for name in ("on_policy", "off_policy"):
        assert 0.9 * metrics[f"moment_bound_{name}"] < metrics[f"moment_gap_{name}"] < metrics[f"moment_bound_{name}"]


# ------------------------------------------------------------------ runs


@pytest.mark.parametrize("method", [{}, {"on_policy": 1.0}, {"on_policy": 0.0, "source": "dataset"}])
def test_it_resumes_bit_for_bit(models, tmp_path, method):
    sections = {"method": {"type": "ammd", **method}, "save": {"every": 2}}
    whole = kibitz.train(recipe(*models, tmp_path / "whole", **sections))
    tree = recipe(*models, tmp_path / "part", **sections)
    run = crash_and_resume(tree)
    assert timeless(run.metrics) == timeless(whole.metrics)
    for file in sorted(path.name for path in (whole.checkpoint / "training").glob("*.safetensors")):
        parts = [(r.checkpoint / "training" / file).read_bytes() for r in (run, whole)]
        assert parts[0] == parts[1], file


def test_the_loss_does_not_depend_on_the_micro_batch_or_the_chunk(models, tmp_path):
    def losses(name: str, **optim) -> list[float]:
        tree = recipe(*models, tmp_path / name, method={"type": "ammd"}, steps=3, optim={"lr": 1e-3, **optim})
        rows = kibitz.train(tree).metrics
        return [row[key] for row in rows for key in ("loss", "grad_norm", "moment_gap_on_policy")]

    whole = losses("whole")
    assert losses("micro", tokens_per_micro_batch=50, chunk_tokens=7) == pytest.approx(whole, rel=2e-3, abs=1e-5)


def test_what_the_opponent_costs_is_counted(models, tmp_path):
    """Twice the steps: twice the cost but for the one pass in the loss; and none of it on other phases' account."""
    costs = [
        kibitz.train(
            recipe(*models, tmp_path / str(steps), method={"type": "ammd", "q_steps": steps}, steps=1)
        ).metrics[0]["flops"]
        for steps in (2, 4, 6)
    ]
    spent = [cost.pop("opponent_training") for cost in costs]
    assert spent[2] - spent[1] == pytest.approx(spent[1] - spent[0])
    assert 0 < 2 * spent[0] - spent[1] < 0.2 * spent[0]
    assert costs[0] == costs[1] == costs[2]


@pytest.mark.slow
def test_a_few_steps_on_the_arithmetic_world_lower_the_reverse_kl(tmp_path):
    from kibitz.cli import demo

    tree = demo.recipe(str(tmp_path / "run"))
    tree |= {"method": {"type": "ammd"}, "steps": 12, "eval": {"every": 0, "num_prompts": 96, "heatmaps": 0}}
    tree["rollout"]["prompts_per_step"], tree["optim"] = 32, {"lr": 1e-3}
    first, last = kibitz.train(tree).evals
    assert last["reverse_kl"] < 0.8 * first["reverse_kl"]


def test_what_cannot_be_is_refused(models, tmp_path):
    with pytest.raises(RecipeError, match="leaves one of the two moments without any.*on_policy=1 or 0"):
        load(recipe(*models, tmp_path / "run", method={"type": "ammd", "on_policy": 0.01}))
    with pytest.raises(RecipeError, match="method ammd needs a teacher"):
        load(recipe(models[0], None, tmp_path / "run", method={"type": "ammd"}))
    with pytest.raises(RecipeError, match=r"drop method\.reference_kl"):
        load(recipe(*models, tmp_path / "run", method={"type": "ammd", "reference_kl": 0.1}))
