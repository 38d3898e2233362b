"""Tiny random models of real architectures, as Hugging Face folders, with the arithmetic world's tokenizer."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kibitz import worlds
from kibitz.signals import Scored
from kibitz.types import Prompt, Rollout

ARCHITECTURES = {
    "qwen3": {},
    "llama": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer():
    return worlds.get("arithmetic").tokenizer()


def make_model(folder: Path, seed: int = 0, kind: str = "qwen3", **changes: Any) -> Path:
    """A random model in a folder; `changes` go into its configuration."""
    tok = tokenizer()
    options = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "vocab_size": len(tok)}
    options |= {"eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id, "bos_token_id": tok.bos_token_id}
    # far from uniform, so that two seeds disagree and gradients are not tiny
    config = AutoConfig.for_model(kind, **{**options, "initializer_range": 0.2, **changes})
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def a_rollout(prompt: list[int], response: list[int]) -> Scored:
    rollout = Rollout(Prompt(tuple(prompt), "", "key"), response, torch.zeros(len(response)), finished=False)
    return Scored(rollout, torch.ones(len(response)))
