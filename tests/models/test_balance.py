"""Mixtures of experts whose configuration asks for a load-balancing loss: its value, its gradient, and who pays it."""

import pytest
import torch
from support.models import a_rollout, language_model, make_model
from support.runs import recipe

import kibitz
from kibitz.batching import pack
from kibitz.losses.balance import load_balance
from kibitz.losses.criteria import CrossEntropy
from kibitz.methods import token_loss

ASKED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
KINDS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
ROWS = [a_rollout([1, 5, 6], [7, 8, 9, 4]), a_rollout([1, 9], [4, 4, 5, 6, 7, 7, 8]), a_rollout([1, 2, 3, 4, 5], [9])]


def loss_of(model, rows):
    total, values = token_loss(model, pack(rows), CrossEntropy(), None)
    return total, values


def by_transformers(model, row):
    """The cross-entropy of a row's response, and transformers' own auxiliary loss of the row alone."""
    ids_1L = torch.tensor([[*row.rollout.prompt.ids, *row.rollout.response_ids]])
    output, first = model.model(ids_1L, output_router_logits=True), len(row.rollout.prompt.ids)
    logp_TV = output.logits[0, first - 1 : -1, : model.vocab_size].log_softmax(-1)
    return -logp_TV.gather(-1, ids_1L[0, first:, None]).sum(), output.aux_loss


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_transformers_own_of_each_row_weighted_by_its_tokens(kind, packed, tmp_path):
    model = language_model(make_model(tmp_path / "m", kind=kind, **KINDS[kind], **ASKED))
    if packed and kind == "gpt_oss":
        pytest.skip("its attention takes no block-diagonal mask here")
    model.pack_rows(packed)
    total, values = loss_of(model, ROWS)
    total.backward()
    got = {name: p.grad for name, p in model.model.named_parameters()}
    model.model.zero_grad()
    wanted = torch.zeros(())
    for row in ROWS:
        entropy, balance = by_transformers(model, row)
        wanted = wanted + entropy + 0.5 * balance * row.rollout.num_tokens
    wanted.backward()
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values["loss"].sum(), wanted.detach(), rtol=1e-5, atol=1e-5)
    assert values["balance_loss"].shape == (12,)
    for name, p in model.model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=1e-4)


def test_it_does_not_depend_on_micro_batches_nor_is_it_paid_for_what_is_not_learnt(tmp_path):
    model = language_model(make_model(tmp_path / "m", kind="mixtral", **KINDS["mixtral"], **ASKED))
    together = loss_of(model, ROWS)[0]
    torch.testing.assert_close(together, sum(loss_of(model, [row])[0] for row in ROWS), rtol=1e-5, atol=1e-5)
    idle = a_rollout([1, 5, 6], [7, 8])
    idle.weight_T = torch.zeros(2)
    assert loss_of(model, [idle])[0].item() == 0.0


def test_recomputed_activations_balance_alike(tmp_path):
    folder, grads = make_model(tmp_path / "m", kind="mixtral", **KINDS["mixtral"], **ASKED), []
    for again in (False, True):
        model = language_model(folder)
        if again:
            model.recompute_activations()
        loss_of(model, ROWS)[0].backward()
        grads.append([p.grad for p in model.model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_a_uniform_router_has_k_and_one_that_always_chooses_the_same_more():
    row_N = torch.tensor([0, 0, 0, 1, 1, -1])
    first = torch.tensor([20.0, 10.0, 0.0, 0.0]).expand(6, 4)
    assert load_balance([first], row_N, 2, 2).tolist() == pytest.approx([4.0, 4.0], rel=1e-3)
    even = torch.eye(4).repeat(2, 1)[:, [0, 1, 2, 3]] * 1e-3
    assert load_balance([even], torch.zeros(8, dtype=torch.long), 1, 1).item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"output_router_logits": True, "router_aux_loss_coef": 0.0}])
def test_who_does_not_ask_for_it_has_none(changes, tmp_path):
    folder = make_model(tmp_path / "m", kind="mixtral", **KINDS["mixtral"], **changes)
    assert language_model(folder).balance == 0.0
    assert "balance_loss" not in loss_of(language_model(folder), ROWS)[1]
    assert language_model(make_model(tmp_path / "dense")).balance == 0.0


def test_a_run_learns_it_and_logs_it(tmp_path):
    folder = make_model(tmp_path / "m", kind="mixtral", **KINDS["mixtral"], **ASKED)
    teacher = make_model(tmp_path / "t", 1)
    run = kibitz.train(recipe(folder, teacher, tmp_path / "run", steps=6, optim={"lr": 1e-2}))
    balance = [row["balance_loss"] for row in run.metrics]
    assert balance[-1] < balance[0] and min(balance) > 0
    assert all(row["loss"] == pytest.approx(row["reverse_kl"] + row["balance_loss"], rel=1e-4) for row in run.metrics)
