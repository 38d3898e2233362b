"""What every test stands on: one thread, no network, and small models with random weights."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "100", "NO_COLOR": "1"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Two cores are shared, and sums come out the same only on one thread."""
    import torch

    torch.set_num_threads(1)


def save_model(folder: Path, tokenizer, seed: int, hidden: int = 32) -> Path:
    """A Qwen3 of two layers with random weights, as a Hugging Face folder."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_models(tmp_path_factory) -> Path:
    """A folder with `student` and `teacher` of one tokenizer, and `stranger` of another."""
    from kibitz import worlds

    home = tmp_path_factory.mktemp("models")
    tokenizer = worlds.get("arithmetic").tokenizer()
    save_model(home / "student", tokenizer, seed=1)
    save_model(home / "teacher", tokenizer, seed=2, hidden=48)
    tokenizer.add_tokens(["x", "y"])
    save_model(home / "stranger", tokenizer, seed=3)
    return home
