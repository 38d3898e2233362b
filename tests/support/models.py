"""Tiny random models of real architectures, as Hugging Face folders, with the arithmetic world's tokenizer."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kibitz import worlds
from kibitz.config import ModelConfig
from kibitz.models.load import LanguageModel, load_model
from kibitz.signals import Scored
from kibitz.types import Prompt, Rollout

CPU = torch.device("cpu")

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


def language_model(folder: Path, role: str = "student", **options: Any) -> LanguageModel:
    return load_model(ModelConfig(model=str(folder), **options), role, CPU)


def bare_model(config: Any, seed: int = 0, std: float = 0.25, vocab_size: int | None = None) -> SimpleNamespace:
    """What an engine needs of a model, whose weights are far from the initial ones: norms that are not 1, biases that are not
    0, peaked logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.ndim > 1 else 0.5, std=std)
    return SimpleNamespace(model=model.eval(), vocab_size=vocab_size or config.vocab_size, device=CPU)


def random_prompts(lengths: list[int], vocab_size: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
    return [Prompt(tuple(row), "", f"row-{i}") for i, row in enumerate(ids)]


def full_logp(model: Any, rollout: Rollout, prompt_ids: tuple[int, ...] | None = None) -> torch.Tensor:
    """log p of every token at each place of the response, `[T, V]` in float64: one sequence through the plain model, behind
    another prompt than the rollout's if one is given. Gradients flow."""
    prompt_ids = rollout.prompt.ids if prompt_ids is None else prompt_ids
    ids_1L = torch.tensor([[*prompt_ids, *rollout.response_ids]])
    logits = model.model(ids_1L, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    return logits[:, : model.vocab_size].double().log_softmax(-1)


def of_written(logp_TV: torch.Tensor, rollout: Rollout) -> torch.Tensor:
    """`[T]`: of each row, what stands at the token that was written."""
    return logp_TV.gather(-1, torch.tensor(rollout.response_ids)[:, None])[:, 0]


def a_rollout(prompt: list[int], response: list[int]) -> Scored:
    rollout = Rollout(Prompt(tuple(prompt), "", "key"), response, torch.zeros(len(response)), finished=False)
    return Scored(rollout, torch.ones(len(response)))
