"""Models of the Llama and Qwen shapes as one GGUF file, for llama.cpp, Ollama and what else runs beside a person.

A file holds the weights, the vocabulary, the chat template and the tokens that end a response. Matrices are float16 or
8-bit blocks (Q8_0: 32 numbers share a scale); vectors, such as the norms, stay float32.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kibitz.config import ModelConfig
from kibitz.data import turn_end
from kibitz.models.gguf import DIGITS_ALONE, require_gguf
from kibitz.models.load import end_ids, load_tokenizer, load_weights

if TYPE_CHECKING:
    import gguf

KINDS = ("float16", "q8_0")
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""`model_type` of a config.json -> the architecture of a GGUF file."""
BY_LLAMA_CPP = "export the folder and convert it by llama.cpp's convert_hf_to_gguf.py"
BLOCK = 32  # numbers that share a scale in Q8_0
LARGEST = 65504.0  # of float16
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types


def export_gguf(source: str, output: Path, kind: str) -> None:
    """Write the model of a folder as a GGUF file, whole or not at all; an adapter is merged into its base."""
    if kind not in KINDS:
        raise ValueError(f"--gguf {kind} is none of {', '.join(KINDS)}")
    if output.exists():
        raise ValueError(f"{output} is there already: write --output ANOTHER.gguf")
    config = ModelConfig(model=source, dtype="float32")
    tokenizer = load_tokenizer(config, "model")
    model = load_weights(config, "model", torch.device("cpu"))
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    try:
        write_gguf(model, tokenizer, partial, kind)
        partial.rename(output)
    finally:
        partial.unlink(missing_ok=True)


def write_gguf(model: Any, tokenizer: PreTrainedTokenizerBase, path: Path, kind: str = "float16") -> None:
    """Write a model and its tokenizer. Raise ValueError, before anything is written, for what a GGUF file of these
    architectures cannot hold."""
    require_gguf()
    import gguf

    config = model.config.get_text_config()
    _check(config)
    words = vocabulary(tokenizer, model.get_input_embeddings().num_embeddings)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    _write_sizes(writer, config, kind)
    _write_tokenizer(writer, tokenizer, words, model.generation_config)
    for name, tensor in named_tensors(model, config):
        data, how = _stored(name, tensor, kind)
        writer.add_tensor(name, data, raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(config: Any) -> None:
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"kibitz writes GGUF files of {', '.join(ARCHITECTURES)}, and this model is a {config.model_type}: {BY_LLAMA_CPP}"
        )
    rope = _rope(config)
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"this model stretches its positions (rope_type {rope['rope_type']}), which kibitz does not write into a GGUF file: "
            f"{BY_LLAMA_CPP}"
        )
    if getattr(config, "mlp_bias", False) or (config.model_type == "llama" and config.attention_bias):
        raise ValueError(f"this model has biases that a GGUF file of its architecture does not hold: {BY_LLAMA_CPP}")


def _rope(config: Any) -> Mapping[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def _write_sizes(writer: "gguf.GGUFWriter", config: Any, kind: str) -> None:
    import gguf

    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    file_types = {"float16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_name(Path(str(config._name_or_path)).name or config.model_type)
    writer.add_file_type(file_types[kind])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


# ------------------------------------------------------------------ weights


def named_tensors(model: Any, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Each tensor once, by the name that it has in a GGUF file; a head that is tied to the embedding is left out."""
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"a GGUF file of the architecture {config.model_type} has no place for {key}")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
        if config.model_type == "llama" and heads is not None:
            tensor = _interleaved(tensor, heads)
        yield name, tensor.detach()


def _interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """The rows of queries or keys as llama.cpp rotates them: of each head the two that turn together stand side by side."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _stored(name: str, tensor: Tensor, kind: str) -> tuple[np.ndarray, Any]:
    """The numbers as they lie in the file, and of what type they are."""
    import gguf
    from gguf.quants import quantize

    values = tensor.to("cpu", torch.float32).numpy()
    if values.ndim == 1:
        return values, gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and values.shape[-1] % BLOCK == 0:
        return quantize(values, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
    if np.abs(values).max() > LARGEST:
        raise ValueError(f"{name} holds numbers above {LARGEST:.0f}, the largest of float16: write --gguf q8_0")
    return values.astype(np.float16), gguf.GGMLQuantizationType.F16


# ------------------------------------------------------------------ tokenizer


def _write_tokenizer(
    writer: "gguf.GGUFWriter", tokenizer: Any, words: Sequence[tuple[str, int]], settings: Any
) -> None:
    spelled = _spelled(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter(spelled))
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types([kind for _, kind in words])
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in spelled["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if (end := turn_end(tokenizer)) != tokenizer.eos_token_id:
        writer.add_eot_token_id(end)
    others = sorted({*end_ids(tokenizer, settings, [])} - {tokenizer.eos_token_id, end})
    if others:
        writer.add_eom_token_id(others[0])  # the third and last place that a file has
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(
        tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    )
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def vocabulary(tokenizer: Any, num_rows: int) -> list[tuple[str, int]]:
    """The word and the type of each row of the embedding; rows without a word are unused."""
    if _spelled(tokenizer)["model"]["type"] != "BPE" or _decoder(_spelled(tokenizer)) != "ByteLevel":
        raise ValueError(
            "kibitz writes byte-level BPE tokenizers into GGUF files (GPT-2's, Llama 3's, Qwen's, SmolLM's), and this one is "
            f"another: {BY_LLAMA_CPP}"
        )
    added = tokenizer.added_tokens_decoder
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    if max(words) >= num_rows:
        raise ValueError(
            f"the tokenizer has a token {max(words)} and the embedding {num_rows} rows: the model is of another"
        )
    kinds = {index: CONTROL if token.special else USER_DEFINED for index, token in added.items()}
    return [
        (words[index], kinds.get(index, NORMAL)) if index in words else (f"[PAD{index}]", UNUSED)
        for index in range(num_rows)
    ]


def _spelled(tokenizer: Any) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _decoder(spelled: Mapping[str, Any]) -> str | None:
    decoder = spelled.get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    return "ByteLevel" if any(part.get("type") == "ByteLevel" for part in parts) else None


def splitter(spelled: Mapping[str, Any]) -> str:
    """The name by which llama.cpp knows how a tokenizer splits a text before it merges (`tokenizer.ggml.pre`)."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    whole = spelled.get("pre_tokenizer") or {}
    parts = whole.get("pretokenizers", [whole])
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return DIGITS_ALONE[0]
    if kinds == ["Split", "ByteLevel"]:
        pattern = parts[0]["pattern"].get("Regex")
        for name in ("llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o"):
            if GGUF_PRE_TOKENIZER_SPLITS.get(name) == pattern:
                return name
    raise ValueError(f"llama.cpp has no name that kibitz knows for how this tokenizer splits a text: {BY_LLAMA_CPP}")
