"""What must hold of whole methods, from the recipe to the gradient. The identities of single functions stand with these."""

import pytest
import torch
from support.lab import Lab
from support.models import full_logp, make_model, of_written, tokenizer
from support.runs import recipe

import kibitz


@pytest.mark.parametrize(
    "method",
    [
        {"type": "opd"},
        {"type": "opd", "divergence": "forward_kl", "support": "top_k", "top_k": 4},
        {"type": "gkd", "source": "teacher", "on_policy": 0.0},
        {"type": "skd", "accept_top_k": 2},
        {"type": "distillm2"},
        {"type": "minillm", "whiten": False},
        {"type": "opd", "reference_kl": 0.5},
    ],
    ids=str,
)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(tmp_path, method):
    make_model(tmp_path / "student", seed=1)
    make_model(tmp_path / "teacher", seed=1)
    loss, gradient = Lab(tmp_path, tmp_path / "run", method).values()
    assert abs(loss) < 1e-5
    assert gradient.abs().max() < 1e-5


def test_the_sampled_loss_is_the_published_one(lab):
    """-sum ratio_t (log T - log S_sampled) / N with coefficient 1 and discount 0, in float64; loss and gradient."""
    one = lab({"type": "opd", "support": "sampled"})
    one.student.zero_grad()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for rollout in one.rollouts:
        student = of_written(full_logp(one.student, rollout), rollout)
        teacher = of_written(one.both(rollout)[1], rollout)
        sampled = rollout.logp_T.double()
        total = total - ((student - sampled).exp() * (teacher - sampled)).sum()
        count += rollout.num_tokens
    (total / count).backward()
    want = torch.cat([p.grad.flatten() for p in one.student.parameters()])
    loss, gradient = one.values()
    assert loss == pytest.approx(total.item() / count, rel=1e-5)
    torch.testing.assert_close(gradient, want, rtol=1e-3, atol=1e-4 * want.abs().max().item())


def test_an_end_token_that_pads_too_is_learnt(tmp_path):
    """pad == eos: every response token has a loss, the end among them, and nothing else does."""
    for name, seed in (("student", 1), ("teacher", 2)):
        folder, tok = make_model(tmp_path / name, seed=seed), tokenizer()
        tok.pad_token = tok.eos_token
        tok.save_pretrained(folder)
    one = Lab(tmp_path, tmp_path / "run", {"type": "sft"})
    end = one.setup.parts.student.tokenizer.eos_token_id
    assert one.setup.parts.student.tokenizer.pad_token_id == end
    assert all(r.response_ids[-1] == end for r in one.rollouts)
    losses = [-of_written(one.both(rollout)[0], rollout) for rollout in one.rollouts]
    assert one.values()[0] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    without_end = torch.cat([loss[:-1] for loss in losses]).mean().item()
    assert one.values()[0] != pytest.approx(without_end, rel=1e-3)
    run = kibitz.train(
        recipe(tmp_path / "student", tmp_path / "teacher", tmp_path / "opd", steps=1, rollout={"store": True})
    )
    row = run.metrics[0]
    assert row["num_tokens"] == pytest.approx(16 * row["response_tokens"])


def test_two_objectives_and_an_anchor_do_not_depend_on_the_micro_batch(small_models, tmp_path):
    method = {"type": "distillm2", "reference_kl": 0.3, "replay": 0.5, "normalize": "sequence"}

    def numbers(name: str, **optim) -> list[float]:
        models = small_models / "student", small_models / "teacher"
        run = kibitz.train(recipe(*models, tmp_path / name, method=method, steps=2, optim={"lr": 1e-3, **optim}))
        names = ("loss", "grad_norm", "reference_kl", "replay_loss", "reverse_kl")
        return [row[name] for row in run.metrics for name in names]

    whole = numbers("whole")
    assert numbers("small", tokens_per_micro_batch=50) == pytest.approx(whole, rel=1e-3, abs=1e-5)
    assert numbers("single", tokens_per_micro_batch=1, chunk_tokens=3) == pytest.approx(whole, rel=1e-3, abs=1e-5)
