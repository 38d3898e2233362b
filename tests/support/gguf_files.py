"""Tiny random models of the shapes that a GGUF file can hold, with a byte-level tokenizer like SmolLM's."""

from pathlib import Path

import torch
from support.tokenizers_zoo import CHATML, byte_level
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHAPES = {"llama": {"tie_word_embeddings": True}, "qwen2": {"tie_word_embeddings": False}, "qwen3": {"head_dim": 128}}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tokenizer(splits: str = "smollm") -> PreTrainedTokenizerFast:
    """Byte-level BPE that ends a text and a turn with different tokens."""
    backend = byte_level(None, None, 400, SPECIAL)
    if splits == "smollm":
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "additional_special_tokens": SPECIAL[1:]}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    made.chat_template = CHATML
    return made


def folder_of(path: Path, kind: str, splits: str = "smollm", rows: int = 8, **changes) -> Path:
    """A random model with `rows` more rows than there are tokens; its numbers are float16's, so that such a file holds them."""
    words = tokenizer(splits)
    options = {**SIZES, **SHAPES[kind], "vocab_size": len(words) + rows, "max_position_embeddings": 128, **changes}
    config = AutoConfig.for_model(kind, **options, initializer_range=0.2, eos_token_id=words.eos_token_id)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data = (
            (torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.05) + (parameter.ndim == 1)).half().float()
        )
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path
