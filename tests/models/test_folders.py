"""Model folders that were changed: none loads silently, whatever happened to its tensors, its index or its settings."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.folders import CHANGES, as_float8, as_integers, changed, not_a_number, remove, reshape
from support.models import CPU, language_model, make_model, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kibitz.config import ModelConfig, StudentConfig
from kibitz.models import LanguageModel, load_student, pick_device
from kibitz.models.flops import forward_flops
from kibitz.models.language_model import num_ids
from kibitz.models.load import check_folder, load_tokenizer, share_vocabulary, stop_ids
from kibitz.types import Prompt

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj.weight"


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def adapter(sound, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    section = StudentConfig.model_validate({"model": str(sound), "lora": {"rank": 2}})
    load_student(section, CPU, tokenizer()).save(folder)
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_no_tensor_of_a_model_can_be_changed_silently(change, sound, tmp_path):
    """Each fourth tensor, of all kinds: embedding, norms, projections, head."""
    names = sorted(load_file(sound / FILE))
    for number, name in enumerate(names[::4]):
        folder = changed(sound, tmp_path / str(number), lambda tensors, name=name: change(tensors, name))
        with pytest.raises(ValueError, match=r"student\.model: "):
            language_model(folder)


def test_a_tensor_of_another_float_dtype_keeps_its_numbers(sound, tmp_path):
    name = UP

    def halve(tensors):
        tensors[name] = tensors[name].half()

    loaded = language_model(changed(sound, tmp_path / "m", halve)).model.state_dict()[name]
    assert loaded.dtype == torch.float32 and torch.equal(loaded, load_file(sound / FILE)[name].half().float())


@pytest.mark.parametrize("change", CHANGES)
def test_no_tensor_of_an_adapter_can_be_changed_silently(change, adapter, tmp_path):
    names = sorted(load_file(adapter / "adapter_model.safetensors"))
    for number, name in enumerate(names[::9]):
        folder = tmp_path / str(number)
        changed(adapter, folder, lambda tensors, name=name: change(tensors, name), "adapter_model.safetensors")
        with pytest.raises(ValueError, match=r"adapter|NaN|stores|lora"):
            language_model(folder)


def test_an_adapter_is_refused_when_a_run_goes_on_from_it(sound, adapter, tmp_path):
    section = StudentConfig.model_validate({"model": str(sound), "lora": {"rank": 2}})
    load_student(section, CPU, tokenizer(), resumed_from=adapter)
    for change, words in {
        remove: "it is not the adapter that",
        reshape: "not an adapter of",
        not_a_number: "NaN",
    }.items():
        folder = tmp_path / change.__name__
        changed(
            adapter, folder, lambda tensors, change=change: change(tensors, min(tensors)), "adapter_model.safetensors"
        )
        with pytest.raises(ValueError, match=words):
            load_student(section, CPU, tokenizer(), resumed_from=folder)


def with_index(source, target, weight_map):
    """A copy of a folder with an index; the tensors lie beside it under another name."""
    shutil.copytree(source, target)
    (target / FILE).rename(target / "part.safetensors")
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


def test_an_index_names_safetensors_in_its_folder_only(sound, tmp_path):
    names = sorted(load_file(sound / FILE))
    whole = language_model(with_index(sound, tmp_path / "good", dict.fromkeys(names, "part.safetensors")))
    assert torch.equal(whole.model.state_dict()[names[0]], load_file(sound / FILE)[names[0]])
    shutil.copy(sound / FILE, tmp_path / "elsewhere.safetensors")
    torch.save(load_file(sound / FILE), tmp_path / "weights.bin")
    for number, file in enumerate(
        ["../weights.bin", "weights.bin", "../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors"), "", 7]
    ):
        folder = with_index(sound, tmp_path / str(number), dict.fromkeys(names, "part.safetensors") | {names[3]: file})
        shutil.copy(tmp_path / "weights.bin", folder)
        with pytest.raises(ValueError, match=r"only \*.safetensors|outside of the folder|is no index"):
            check_folder(str(folder), "teacher")
        with pytest.raises(ValueError, match=r"student.model"):
            language_model(folder)
    folder = with_index(sound, tmp_path / "half", {})
    (folder / INDEX).write_text('{"weight_map": [')
    with pytest.raises(ValueError, match="is no index"):
        check_folder(str(folder), "teacher")


def test_an_index_that_names_a_file_that_is_not_there(sound, tmp_path):
    names = sorted(load_file(sound / FILE))
    folder = with_index(sound, tmp_path / "m", dict.fromkeys(names, "part.safetensors") | {names[0]: "b.safetensors"})
    with pytest.raises(ValueError, match="is not a model that transformers can load"):
        language_model(folder)


@pytest.mark.parametrize("method", ["nope", "bitsandbytes", "finegrained_fp8"])
def test_a_quantization_that_is_not_loaded_excuses_no_integers(method, sound, tmp_path):
    """transformers ignores a name that it does not know, and one without the settings that it needs."""
    for number, change in enumerate((as_integers, as_float8)):
        folder = changed(sound, tmp_path / str(number), lambda tensors, change=change: change(tensors, UP))
        edit_json(folder / "config.json", quantization_config={"quant_method": method})
        with pytest.raises(ValueError, match=f"stores {UP} as .* names no quantization that is loaded"):
            language_model(folder)


def test_settings_that_fail_in_the_first_pass_are_a_sentence(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "replicated")
    edit_json(folder / "adapter_config.json", layer_replication=[[0, 1], [0, 2]])
    with pytest.raises(ValueError, match=r"student: Qwen3ForCausalLM cannot read 8 tokens, .* IndexError"):
        language_model(folder)
    heads = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "num_key_value_heads": 4, "head_dim": 8}
    folder = make_model(tmp_path / "heads", kind="deepseek_v3", first_k_dense_replace=2, **heads)
    with pytest.raises(ValueError, match=r"teacher: DeepseekV3ForCausalLM cannot read 8 tokens, .* RuntimeError"):
        language_model(folder, "teacher")


def two_of(folder):
    """The tensors of a folder in two shards, with an index; the whole file is gone."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / FILE).items()}
    (folder / FILE).unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + (name > names[9])}-of-00002.safetensors" for name in names}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors, names


def whole_again(folder, tensors, names):
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / FILE, {"format": "pt"})


def a_third_shard(folder, tensors, names):
    save_file({"more": tensors[names[0]]}, folder / "model-00003-of-00003.safetensors", {"format": "pt"})


def no_index(folder, tensors, names):
    whole_again(folder, tensors, names)
    (folder / INDEX).unlink()


def one_in_both(folder, tensors, names):
    second = {name: tensor for name, tensor in tensors.items() if name > names[9]} | {names[0]: tensors[names[0]] + 1}
    save_file(second, folder / "model-00002-of-00002.safetensors", {"format": "pt"})


@pytest.mark.parametrize("change", [whole_again, a_third_shard, no_index, one_in_both])
def test_weights_that_are_there_twice_are_refused(change, sound, tmp_path):
    """Loaders differ in which of them they take."""
    folder = shutil.copytree(sound, tmp_path / "m")
    tensors, names = two_of(folder)
    loaded = language_model(folder).model.state_dict()
    assert all(torch.equal(loaded[name], tensors[name]) for name in names)
    change(folder, tensors, names)
    for role in ("student", "teacher"):
        with pytest.raises(ValueError, match=rf"{role}\.model: .*(weights of one model or of two|leave one out)"):
            language_model(folder, role)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 9000, b"[]", b"null"])
def test_broken_settings_of_generation_are_not_passed_over(text, sound, adapter, tmp_path):
    """They say where responses end; transformers takes none in their place."""
    for number, source in enumerate((sound, adapter)):
        folder = shutil.copytree(source, tmp_path / str(number))
        (folder / "generation_config.json").write_bytes(text)
        with pytest.raises(ValueError, match=r"student\.model: "):
            language_model(folder)


def test_tied_embeddings_are_stored_once_and_load(tmp_path):
    folder = make_model(tmp_path / "m", kind="llama", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / FILE)
    model = language_model(folder).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_model_that_reads_both_ways_is_refused(kind, tmp_path, sound):
    """BERT's own weights, and other weights under its name."""
    folder = make_model(tmp_path / "m", kind=kind)
    with pytest.raises(ValueError, match="reads the tokens behind a token too"):
        language_model(folder)
    shutil.copy(sound / FILE, folder / FILE)
    with pytest.raises(ValueError, match="lacks"):
        language_model(folder)


def test_ends_of_a_response_are_ids(sound):
    model = language_model(sound)
    for wrong in ("x", [1, None], True, -1, 1.0, ["2"]):
        model.model.generation_config.eos_token_id = wrong
        with pytest.raises(ValueError, match="eos_token_id"):
            stop_ids(model, [])


def test_a_model_without_a_row_for_any_end_is_refused(sound):
    model = language_model(sound)
    model.cut_vocabulary(model.tokenizer.eos_token_id)
    model.model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="none of those that end a response"):
        stop_ids(model, [])


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "", "xpu", "cpu:x"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match=r"^device: "):
        pick_device(name)
    assert pick_device("cpu") == CPU


# ------------------------------------------------------------------ vocabularies


def with_a_gap(folder, gap=20):
    """The tokenizer of a folder, whose EOS stands beyond as many ids as it has tokens."""
    tree, far = json.loads((folder / "tokenizer.json").read_text()), len(tokenizer()) + gap
    eos = tokenizer().eos_token
    tree["model"]["vocab"][eos] = far
    for added in tree["added_tokens"]:
        added["id"] = far if added["content"] == eos else added["id"]
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    return AutoTokenizer.from_pretrained(folder)


def test_ids_behind_a_gap_belong_to_the_vocabulary(tmp_path):
    folder = make_model(tmp_path / "m", vocab_size=len(tokenizer()) + 30)
    tok = with_a_gap(folder)
    assert tok.eos_token_id >= len(tok)
    model = language_model(folder)
    assert model.vocab_size == num_ids(tok) == tok.eos_token_id + 1
    assert num_ids(tokenizer()) == len(tokenizer())


def test_models_of_one_tokenizer_share_the_rows_that_both_have(tmp_path):
    size = len(tokenizer())
    small, large = (language_model(make_model(tmp_path / str(n), seed=n, vocab_size=size + n)) for n in (-1, 7))
    ids = torch.tensor([[1, 2, 3]])
    before = large.head(large.hidden(ids))
    share_vocabulary([large, small])
    assert small.vocab_size == large.vocab_size == size - 1
    assert torch.equal(large.head(large.hidden(ids)), before[..., : size - 1])
    with pytest.raises(ValueError, match=f"holds the token {size - 1}, and the student has rows for {size - 1}"):
        small.check_lengths([Prompt((1, size - 1), "", "row")], 1)


def test_a_model_of_another_tokenizer_keeps_its_rows(tmp_path):
    ours = language_model(make_model(tmp_path / "a"))
    tok = tokenizer()
    tok.add_tokens(["<tool>"])
    theirs = LanguageModel(language_model(make_model(tmp_path / "b", vocab_size=len(tok))).model, tok)
    share_vocabulary([ours, theirs])
    assert (ours.vocab_size, theirs.vocab_size) == (len(tokenizer()), len(tok))


# ------------------------------------------------------------------ architectures


def test_llama_4_has_a_body(tmp_path):
    moe = {"attention_chunk_size": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
    model = language_model(make_model(tmp_path / "m", kind="llama4_text", **moe))
    ids = torch.tensor([[1, 2, 3]])
    assert model.head_stands_alone
    torch.testing.assert_close(model.head(model.hidden(ids)), model.model(ids).logits[..., : model.vocab_size])


RECURRENT = {
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2},
    "falcon_mamba": {"state_size": 4},
    "rwkv": {"attention_hidden_size": 32, "head_dim": None},
    "xlstm": {"num_heads": 4, "num_blocks": 2},
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_models_without_attention_have_no_square_in_their_flops(kind):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 40}
    changes = {key: value for key, value in RECURRENT[kind].items() if value is not None}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **changes))
    short, long = (forward_flops(model, 10, squared, 3) for squared in (100, 10_000))
    assert short == long > 2 * 3 * model.get_output_embeddings().weight.numel()


EXPERTS = {
    "qwen3_moe": ({"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, 3 * 32 * 16),
    "mixtral": ({"num_local_experts": 8, "num_experts_per_tok": 2}, 3 * 32 * 64),
    "gpt_oss": ({"num_local_experts": 8, "num_experts_per_tok": 2}, 3 * 32 * 64 + 2 * 64 + 32),
    "granitemoe": ({"num_local_experts": 8, "num_experts_per_tok": 2}, 3 * 32 * 64),
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_of_experts_those_count_that_a_token_visits(kind):
    """Against the same model with every expert: six of eight idle, in two layers."""
    changes, size = EXPERTS[kind]
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    sizes |= {"num_key_value_heads": 2, "vocab_size": 40}

    def flops(**more):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **changes, **more}))
        return forward_flops(model, 10, 100, 3)

    assert flops(num_experts_per_tok=8) - flops() == 2 * 10 * 2 * 6 * size


@pytest.mark.parametrize("name", ["modèle", "org/ü", "-x", "a..b", "a b", "x" * 120, "a/b/c"])
def test_a_name_that_the_hub_cannot_have_is_a_folder_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="teacher.model: there is no model folder at "):
        load_tokenizer(ModelConfig(model=name), "teacher")
