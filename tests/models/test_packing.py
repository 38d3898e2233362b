"""Rows without padding: the same numbers, none of the padding's positions, and no model that mixes sequences up."""

import warnings

import pytest
import torch
from support.models import ARCHITECTURES, a_rollout, language_model, make_model
from support.runs import recipe

import kibitz
from kibitz.batching import pack, without_padding
from kibitz.losses.chunked import over_chunks
from kibitz.losses.criteria import CrossEntropy
from kibitz.models.packing import pack_rows, packing_error

SCORED = [a_rollout([1, 5, 6], [7, 8, 9, 4]), a_rollout([1, 9], [4, 4, 5, 6, 7, 3]), a_rollout([1], [9])]
KINDS = {**ARCHITECTURES, "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}}
MAMBA = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8, "layer_types": None}


def losses(model, scored=SCORED):
    batch = pack(scored)
    return model(batch, lambda hidden_TD, head: over_chunks(CrossEntropy(), hidden_TD, head, batch.tokens))


def test_nothing_is_lost_but_the_padding():
    batch = pack(SCORED)
    ids_1N, position_1N, place = without_padding(batch.ids_BL, batch.length_B)
    assert ids_1N.tolist() == [[t for one in SCORED for t in (*one.rollout.prompt.ids, *one.rollout.response_ids)]]
    assert position_1N.tolist() == [[*range(7), *range(8), *range(2)]]
    assert torch.equal(ids_1N[0, place[batch.position_T] + 1], batch.tokens.token_T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_packed_rows_give_the_loss_and_the_gradient_of_padded_ones(kind, attention, tmp_path):
    folder = make_model(tmp_path, kind=kind, **KINDS[kind])
    padded, packed = language_model(folder, attention=attention), language_model(folder, attention=attention)
    pack_rows([packed], True)
    assert packed.packed
    (loss, values), (other, others) = losses(padded), losses(packed)
    torch.testing.assert_close(others["student_logp"], values["student_logp"], rtol=0, atol=1e-5)
    loss.backward()
    other.backward()
    for (name, ours), theirs in zip(padded.model.named_parameters(), packed.model.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_the_body_sees_no_padding(tmp_path):
    model, seen = language_model(make_model(tmp_path)), []
    model.model.base_model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    losses(model)
    pack_rows([model], True)
    seen.clear()
    losses(model)
    assert seen == [(1, sum(len(s.rollout.prompt.ids) + s.rollout.num_tokens for s in SCORED))]


def test_recurrent_layers_and_blind_ones_are_found_out(tmp_path):
    """Mamba's state runs on into the next sequence; Bloom's positions come from the mask."""
    mamba = language_model(make_model(tmp_path / "mamba", kind="mamba", state_size=8, head_dim=None))
    bloom = language_model(make_model(tmp_path / "bloom", kind="bloom", n_layer=2, n_head=4))
    for model in (mamba, bloom):
        said = packing_error(model)
        assert said is not None, type(model.model).__name__
        with pytest.raises(ValueError, match=r"optim\.packing: the student \(\w+\) .*write optim.packing=false"):
            pack_rows([model], True)
        assert not model.packed


def test_a_model_whose_positions_are_ignored_is_found_out(tmp_path):
    """Whatever the reason: here positions never arrive, and attention runs across."""
    model = language_model(make_model(tmp_path))
    body = model.model.base_model
    plain = body.forward
    body.forward = lambda ids, position_ids=None, **options: plain(ids, **options)
    assert "lets a sequence see the one before it" in packing_error(model)
    body.forward = lambda ids, position_ids=None, **options: plain(
        ids, position_ids=None if position_ids is None else 3 * position_ids + 1, **options
    )
    assert packing_error(model) is not None


def test_both_models_pack_or_neither(tmp_path, monkeypatch):
    qwen = language_model(make_model(tmp_path / "qwen"))
    mamba = language_model(make_model(tmp_path / "mamba", kind="mamba", state_size=8, head_dim=None))
    monkeypatch.setattr("kibitz.models.packing._has_kernel", lambda model: True)
    with pytest.warns(UserWarning, match="rows are padded, not packed: the student \\(MambaForCausalLM\\)"):
        pack_rows([qwen, mamba], "auto")
    assert not qwen.packed and not mamba.packed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack_rows([qwen], "auto")
        assert qwen.packed


def test_auto_pads_where_a_mask_would_cost_the_square(tmp_path):
    model = language_model(make_model(tmp_path))
    pack_rows([model], "auto")
    assert not model.packed


def test_a_packed_run_learns_as_a_padded_one_and_its_own_teacher_teaches_nothing(small_models, tmp_path):
    def run(output, packing, teacher="teacher"):
        plain = recipe(small_models / "student", small_models / teacher, output, steps=3)
        return [row["loss"] for row in kibitz.train(plain, [f"optim.packing={packing}"]).metrics]

    assert run(tmp_path / "packed", "true") == pytest.approx(run(tmp_path / "padded", "false"), abs=1e-5)
    assert run(tmp_path / "same", "true", "student") == [0.0, 0.0, 0.0]
