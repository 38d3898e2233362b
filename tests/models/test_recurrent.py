"""Students with a recurrent state: what they sample, how they read padded rows, that they learn, that equal ones are equal."""

import warnings

import pytest
import torch
from support.models import a_rollout, full_logp, language_model, make_model, of_written, random_prompts
from support.runs import recipe

import kibitz
from kibitz.batching import pack
from kibitz.engines.torch import TorchEngine
from kibitz.teachers import ScoreRequest
from kibitz.teachers.local import LocalScorer
from kibitz.types import Sampling

MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
PERIODS = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
JAMBA = {"num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
NEXT = {f"linear_{which}": size for which, size in [("num_value_heads", 4), ("num_key_heads", 2), ("key_head_dim", 8)]}
EXPERTS = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
RECURRENT = {
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "falcon_mamba": {"state_size": 4},
    "rwkv": {"attention_hidden_size": 32},
    "xlstm": {"num_heads": 4, "num_blocks": 2},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    "jamba": {**JAMBA, **PERIODS},
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 32, "mamba_n_heads": 4},
    "qwen3_next": {**LINEAR, **NEXT, **EXPERTS, "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1},
    "minimax": {**LINEAR, "num_local_experts": 2, "num_experts_per_tok": 1},
}
ROWS = [a_rollout([1, 5, 6], [7, 8, 9, 4]), a_rollout([1, 9], [4, 4, 5, 6, 7] * 3), a_rollout([1, 2, 3, 4, 5, 6], [9])]


@pytest.fixture(autouse=True)
def quiet():
    """That they cannot be driven with a KV cache is said, and is not what is tested."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*cannot be driven with the engine's KV cache|.*head of .* cannot be"
        )
        yield


def logits(model, rows):
    return model(pack(rows), lambda hidden_TD, head: head(hidden_TD))


@pytest.mark.parametrize("kind", RECURRENT)
def test_they_sample_from_a_plain_forward_pass_and_no_padding_reaches_a_state(kind, tmp_path):
    """Rows of many lengths that enter and leave; then rows together against rows alone, in value and in gradient."""
    model = language_model(make_model(tmp_path / "m", kind=kind, **RECURRENT[kind]))
    sampling = Sampling(max_tokens=12, stop_ids=(3,))
    for rollout in TorchEngine(model, 3).generate(random_prompts([1, 9, 4, 20, 3], model.vocab_size), sampling):
        with torch.no_grad():
            alone_T = of_written(full_logp(model, rollout), rollout).float()
        torch.testing.assert_close(rollout.logp_T, alone_T, atol=1e-4, rtol=0)
    together, alone = logits(model, ROWS), torch.cat([logits(model, [row]) for row in ROWS])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    grads = []
    for some in (together, alone):
        some.square().sum().backward()
        grads.append([p.grad.clone() for p in model.model.parameters() if p.grad is not None])
        model.model.zero_grad()
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * max(1.0, other.abs().max().item()))


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("mamba2", "falcon_mamba", "xlstm")]


@pytest.mark.parametrize("kind", ["mamba", "recurrent_gemma", "jamba", *SLOW])
def test_they_learn_from_a_teacher_and_stay_at_zero_beside_an_equal_one(kind, tmp_path):
    student, teacher = (make_model(tmp_path / str(seed), seed, kind, **RECURRENT[kind]) for seed in (0, 1))
    few = {"rollout": {"prompts_per_step": 4, "max_tokens": 6}, "optim": {"lr": 1e-2}, "eval": {"num_prompts": 2}}
    run = kibitz.train(recipe(student, teacher, tmp_path / "run", steps=3, **few))
    assert run.metrics[-1]["reverse_kl"] < run.metrics[0]["reverse_kl"]
    same = kibitz.train(recipe(student, student, tmp_path / "same", steps=2, **few))
    assert [row["reverse_kl"] for row in same.metrics] == [0.0, 0.0]
    assert same.metrics[0]["grad_norm"] == 0.0


def test_a_frozen_model_rounds_as_the_one_that_learns(tmp_path):
    """Of so few numbers torch multiplies by a frozen matrix in another order."""
    tiny = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "mamba_d_state": 1,
        "mamba_dt_rank": 1,
    }
    folder = make_model(tmp_path / "m", kind="jamba", **{**JAMBA, **PERIODS, **tiny})
    student, teacher = language_model(folder), language_model(folder, "teacher")
    rows = [a_rollout([1, 5, 6], [7, 8, 9, token]) for token in range(4, 12)]

    def gaps():
        (signals,) = [LocalScorer(teacher, ScoreRequest(tokens_per_micro_batch=1)).score([row.rollout for row in rows])]
        own = [student(pack([row]), lambda hidden_TD, head: hidden_TD) for row in rows]
        return [not torch.equal(one, said.hidden_TD) for one, said in zip(own, signals, strict=True)]

    teacher.requires_grad_(False)
    if not any(gaps()):
        pytest.skip("this processor multiplies such a shape in one way only")
    teacher.round_like(student)
    assert not any(gaps())
    assert all(p.grad is None for p in teacher.parameters())
