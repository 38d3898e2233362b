"""GGUF files in and out: the same numbers, the same tokens, the same greedy text, and errors in words."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from support.gguf_files import SHAPES, folder_of, tokenizer
from support.tokenizers_zoo import CHATML
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from kibitz.cli import app
from kibitz.config import ModelConfig
from kibitz.models import load_model
from kibitz.models.gguf import read_gguf
from kibitz.models.gguf_export import export_gguf, write_gguf
from kibitz.models.load import stop_ids

gguf = pytest.importorskip("gguf")

TEXT = "The year 2048, and  12 more:\n\tdéjà vu 漢字"


def greedy(model, words, count: int = 12) -> list[int]:
    talk = [{"role": "user", "content": TEXT}]
    ids = words.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    options = {
        "max_new_tokens": count,
        "do_sample": False,
        "eos_token_id": None,
        "attention_mask": torch.ones_like(ids),
    }
    return model.generate(ids, **options)[0].tolist()


def by_transformers(path: Path):
    """The file as transformers reads it, without any help of ours."""
    options = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    return model, AutoTokenizer.from_pretrained(path.parent, **options)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_float16_file_holds_every_number_and_gives_the_same_greedy_text(kind, tmp_path):
    folder = folder_of(tmp_path / "model", kind, "gpt-2")  # digits alone are what transformers passes over
    export_gguf(str(folder), tmp_path / "model.gguf", "float16")
    before = load_model(ModelConfig(model=str(folder)), "model", torch.device("cpu"))
    model, words = by_transformers(tmp_path / "model.gguf")
    ours, theirs = before.model.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=0, msg=name)
    assert greedy(model, words) == greedy(before.model, before.tokenizer)


@pytest.mark.parametrize("kind", SHAPES)
def test_an_8_bit_file_is_off_by_half_a_step_of_each_block_at_most(kind, tmp_path):
    folder = folder_of(tmp_path / "model", kind, "gpt-2")
    export_gguf(str(folder), tmp_path / "model.gguf", "q8_0")
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    found = read_gguf(tmp_path / "model.gguf", "float32")
    for name, weight in found.model.state_dict().items():
        if weight.ndim == 1:
            torch.testing.assert_close(weight, before[name], rtol=0, atol=0, msg=name)
        else:
            blocks = before[name].reshape(-1, 32)
            step = blocks.abs().amax(-1, keepdim=True) / 127
            error = (weight.reshape(-1, 32) - blocks).abs()
            assert (error <= 0.5 * step + 127 * step * 2**-11).all(), name  # rounding, and a scale of float16
            assert error.max() > 0
    again = tmp_path / "again"
    found.save(again)
    model, words = by_transformers(tmp_path / "model.gguf")
    loaded = load_model(ModelConfig(model=str(again)), "model", torch.device("cpu"))
    assert greedy(loaded.model, loaded.tokenizer) == greedy(model, words)


@pytest.mark.parametrize("splits", ["smollm", "gpt-2"])
def test_tokens_template_and_ends_go_out_and_come_in_again(splits, tmp_path):
    folder = folder_of(tmp_path / "model", "llama", splits)
    before = load_model(ModelConfig(model=str(folder)), "model", torch.device("cpu"))
    export_gguf(str(folder), tmp_path / "model.gguf", "float16")
    found = read_gguf(tmp_path / "model.gguf")
    assert found.notes == ()
    assert found.model.dtype == torch.float16, "the file's own type"
    found.save(tmp_path / "again")
    again = load_model(ModelConfig(model=str(tmp_path / "again")), "model", torch.device("cpu"))
    assert again.tokenizer.chat_template == CHATML
    for text in (TEXT, "1234567", " 99  100", "<|im_start|>user\n7<|im_end|>"):
        assert again.tokenizer(text)["input_ids"] == before.tokenizer(text)["input_ids"]
    ends = {before.tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")}
    assert set(stop_ids(again, [])) == ends == set(stop_ids(before, []))
    assert not hasattr(again.model.config, "quantization_config")


def test_a_file_by_the_gguf_package_alone_is_imported(tmp_path):
    """Written here tensor by tensor, so that two mistakes of ours cannot cancel; the command line, and what it says."""
    words = tokenizer("gpt-2")
    path, rows, width = tmp_path / "by-hand.gguf", len(words), 32
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {"context_length": 64, "embedding_length": width, "block_count": 1, "feed_forward_length": 48,
                        "attention.head_count": 2, "attention.head_count_kv": 1, "rope.dimension_count": 16,
                        "vocab_size": rows}.items():  # fmt: skip
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 5000.0)
    spelled = json.loads(words.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([words.convert_ids_to_tokens(i) for i in range(rows)])
    writer.add_token_types([3 if i in words.all_special_ids else 1 for i in range(rows)])
    writer.add_token_merges([" ".join(pair) for pair in spelled["merges"]])
    writer.add_eos_token_id(words.convert_tokens_to_ids("<|endoftext|>"))
    writer.add_eot_token_id(words.convert_tokens_to_ids("<|im_end|>"))
    torch.manual_seed(0)
    shapes = {"token_embd": (rows, width), "output_norm": (width,), "blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,),
              "blk.0.attn_q": (32, width), "blk.0.attn_k": (16, width), "blk.0.attn_v": (16, width),
              "blk.0.attn_output": (width, 32), "blk.0.ffn_gate": (48, width), "blk.0.ffn_up": (48, width),
              "blk.0.ffn_down": (width, 48)}  # fmt: skip
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    answer = CliRunner().invoke(app, ["import", str(path), "--output", str(tmp_path / "folder"), "--json"])
    assert answer.exit_code == 0, answer.output
    told = json.loads(answer.stdout)
    assert (told["architecture"], told["dtype"], told["notes"]) == ("llama", "float32", [])
    assert told["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    model = load_model(ModelConfig(model=str(tmp_path / "folder")), "model", torch.device("cpu")).model
    torch.testing.assert_close(model.get_input_embeddings().weight, tensors["token_embd"], rtol=0, atol=0)
    assert model.config.tie_word_embeddings and model.config.num_hidden_layers == 1
    assert set(told["stop_ids"]) == {words.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|im_end|>")}
    # llama.cpp keeps the two numbers that turn together side by side, transformers half a head apart
    query = model.model.layers[0].self_attn.q_proj.weight.reshape(2, 2, 8, width)
    torch.testing.assert_close(query.swapaxes(1, 2).reshape(32, width), tensors["blk.0.attn_q"], rtol=0, atol=0)


# ------------------------------------------------------------------ mistakes


def refused(*words: object) -> str:
    answer = CliRunner().invoke(app, [str(word) for word in words])
    assert answer.exit_code == 2, answer.output
    assert answer.stdout == ""
    return " ".join(answer.stderr.split())


def test_what_is_no_gguf_file_is_told_in_a_sentence(tmp_path):
    output = tmp_path / "out"
    assert "there is no file" in refused("import", tmp_path / "none.gguf", "--output", output)
    (tmp_path / "words.gguf").write_text("not a model")
    assert "does not begin with the letters GGUF" in refused("import", tmp_path / "words.gguf", "--output", output)
    assert "is a folder: name the GGUF file in it, such as words.gguf" in refused(
        "import", tmp_path, "--output", output
    )
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x05" * 20)
    assert "damaged or cut off" in refused("import", tmp_path / "cut.gguf", "--output", output)
    assert "--dtype int4 is none of" in refused("import", tmp_path / "cut.gguf", "--output", output, "--dtype", "int4")
    output.mkdir()
    assert "is there already" in refused("import", tmp_path / "cut.gguf", "--output", output)


def a_file(path: Path, architecture: str, **fields: int) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        writer.add_uint16(name.replace("_", "."), value)
    writer.add_tensor("token_embd.weight", torch.zeros(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_an_unknown_architecture_and_a_part_of_a_file_are_named(tmp_path):
    strange = a_file(tmp_path / "strange.gguf", "rwkv6")
    assert "architecture rwkv6, which transformers does not read" in refused(
        "import", strange, "--output", tmp_path / "out"
    )
    part = a_file(tmp_path / "part.gguf", "llama", split_count=3)
    assert "is one of 3 parts: join them first" in refused("import", part, "--output", tmp_path / "out")


def test_without_its_extra_the_sentence_says_what_to_install(monkeypatch, tmp_path):
    path = a_file(tmp_path / "a.gguf", "llama")
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else there(name, *more))
    assert "need gguf: pip install 'kibitz[gguf]'" in refused("import", path, "--output", tmp_path / "out")


def test_what_a_gguf_file_cannot_hold_is_refused_before_it_is_written(tmp_path, small_models):
    out = tmp_path / "out.gguf"
    assert "--gguf q2_k is none of float16, q8_0" in refused(
        "export", small_models / "student", "--output", out, "--gguf", "q2_k"
    )
    assert "byte-level BPE" in refused("export", small_models / "student", "--output", out, "--gguf", "float16")
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    folder = folder_of(tmp_path / "model", "llama", rope_parameters=scaled)
    assert "rope_type linear" in refused("export", folder, "--output", out, "--gguf", "float16")
    words, large = tokenizer(), folder_of(tmp_path / "large", "llama")
    model = AutoModelForCausalLM.from_pretrained(large)
    model.get_input_embeddings().weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match="largest of float16"):
        write_gguf(model, words, tmp_path / "large.gguf", "float16")
    assert not out.exists()
    out.write_text("here")
    assert "is there already" in refused("export", folder, "--output", out, "--gguf", "float16")
