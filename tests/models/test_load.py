"""Models: the head called alone gives the model's own logits, and bad folders are refused in words."""

import warnings

import pytest
import torch
from support.models import ARCHITECTURES, a_rollout, language_model, make_model, tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from kibitz.batching import pack
from kibitz.config import ModelConfig
from kibitz.losses.chunked import over_chunks
from kibitz.losses.criteria import CrossEntropy
from kibitz.models import LanguageModel
from kibitz.models.load import check_folder, check_same_tokenizer, load_tokenizer, stop_ids


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_response_log_probabilities_equal_brute_force(kind, tmp_path):
    """Mixed lengths in one right-padded batch, soft-cap and scale behind the head, against one row at a time."""
    model = language_model(make_model(tmp_path, kind=kind, **ARCHITECTURES[kind]))
    assert model.head_stands_alone
    scored = [a_rollout([1, 5, 6], [7, 8]), a_rollout([1, 9], [4, 4, 5, 6, 7]), a_rollout([1, 2, 3, 4, 5, 6], [9])]
    batch = pack(scored)
    with torch.no_grad():
        _, values = model(batch, lambda hidden_TD, head: over_chunks(CrossEntropy(), hidden_TD, head, batch.tokens))
        brute = []
        for one in scored:
            ids = [*one.rollout.prompt.ids, *one.rollout.response_ids]
            logp = model.model(torch.tensor([ids])).logits[0, :, : model.vocab_size].double().log_softmax(-1)
            start = len(one.rollout.prompt.ids)
            brute += [logp[position - 1, ids[position]] for position in range(start, len(ids))]
    torch.testing.assert_close(values["student_logp"].double(), torch.stack(brute), rtol=0, atol=1e-5)


def test_a_head_that_cannot_be_called_alone_falls_back_to_logits_loudly(tmp_path):
    folder = make_model(tmp_path)
    plain = language_model(folder)
    ids = torch.tensor([[1, 5, 6, 7]])

    class Odd(type(plain.model)):
        """An architecture that does something behind its head under a name that nobody knows."""

        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.7
            return output

    with pytest.warns(UserWarning, match="cannot be called alone"):
        odd = LanguageModel(Odd.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    assert not odd.head_stands_alone
    with torch.no_grad():
        torch.testing.assert_close(odd.head(odd.hidden(ids)), plain.head(plain.hidden(ids)) * 1.7)


def test_logits_are_cut_to_the_tokenizer(tmp_path):
    """151,936 rows for 151,669 tokens is usual; what is behind the tokenizer's end gets no probability."""
    model = language_model(make_model(tmp_path, vocab_size=64))
    assert model.vocab_size == len(tokenizer())
    with torch.no_grad():
        assert model.head(model.hidden(torch.tensor([[1, 2]]))).shape[-1] == len(tokenizer())


def test_flops_count_each_matrix_once(tmp_path):
    """Against the matrices counted by hand: projections and MLP in the body, the head on scored positions."""
    model = language_model(make_model(tmp_path))
    body = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)
    norms = model.num_parameters - body - 2 * 32 * len(tokenizer())
    assert 0 < norms < 0.02 * model.num_parameters
    expected = 2 * (body + norms) * 10 + 2 * 2 * 4 * 8 * 100 + 2 * 32 * len(tokenizer()) * 6
    assert model.forward_flops(10, 100, 6) == expected


def test_bad_folders_are_refused_in_words(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="no model folder at /nowhere/at/all"):
        check_folder("/nowhere/at/all", "student")
    with pytest.raises(ValueError, match="it has no config.json"):
        check_folder(str(tmp_path / "empty"), "student")
    with pytest.raises(ValueError, match="pickled weights are not loaded"):
        check_folder(str(tmp_path / "pickled"), "teacher")
    broken = make_model(tmp_path / "broken")
    (broken / "config.json").write_text('{"model_type": "qwen3"')
    with pytest.raises(ValueError, match="is not a model that transformers can load"):
        load_tokenizer(ModelConfig(model=str(broken)), "student")
    truncated = make_model(tmp_path / "truncated")
    weights = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="is not a model that transformers can load"):
        language_model(truncated)


def test_tokenizers_that_differ_are_refused_with_a_token():
    ours = tokenizer()
    theirs = PreTrainedTokenizerFast(tokenizer_object=ours.backend_tokenizer, eos_token=ours.eos_token)
    check_same_tokenizer(ours, ours)
    theirs.add_tokens(["<tool>"])
    with pytest.raises(ValueError, match="'<tool>' is missing for the student"):
        check_same_tokenizer(ours, theirs)


def test_stop_ids_hold_every_end(tmp_path):
    model = language_model(make_model(tmp_path))
    model.model.generation_config.eos_token_id = [5, 6]
    assert stop_ids(model, ["="]) == tuple(sorted({5, 6, model.tokenizer.eos_token_id, model.tokenizer.encode("=")[0]}))
    with pytest.raises(ValueError, match="write a single token"):
        stop_ids(model, ["1+1"])


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_put_back_after_loading(tmp_path, capfd, shown):
    folder = make_model(tmp_path)
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    capfd.readouterr()
    try:
        language_model(folder).save(tmp_path / "again")
        (folder / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="is not a model that transformers can load"):
            language_model(folder)
        assert capfd.readouterr().err == ""
        assert logging.is_progress_bar_enabled() == shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def test_no_warning_for_ordinary_models(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert language_model(make_model(tmp_path)).head_stands_alone
