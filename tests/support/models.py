"""Tiny random models of real architectures, as Hugging Face folders, with the arithmetic world's tokenizer."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kibitz import worlds

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


def teacher_model(setup) -> Any:
    """The model behind a teacher that is one."""
    return setup.teacher.writer(lambda model: model)


def recipe(student: Path, teacher: Path | None, output: Path, /, **sections: Any) -> dict[str, Any]:
    """A recipe small enough for a test: 8 prompts of 2 samples a step, 12 tokens each."""
    base: dict[str, Any] = {
        "student": {"model": str(student)},
        "data": {"world": "arithmetic", "limit": 64},
        "method": {"type": "opd"},
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 2, "max_tokens": 12},
        "optim": {"lr": 1e-3},
        "steps": 4,
        "eval": {"every": 0, "num_prompts": 8, "heatmaps": 2},
        "threads": 1,
        "output": str(output),
    }
    if teacher is not None:
        base["teacher"] = {"model": str(teacher)}
    for name, section in sections.items():
        base[name] = (
            {**base[name], **section} if isinstance(section, dict) and isinstance(base.get(name), dict) else section
        )
    return base
