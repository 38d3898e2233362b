"""What engines are asked for: the student that writes, prompts, settings of sampling, and what a user can get wrong in them."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel

from kibitz.types import Prompt, Sampling


class Student(Protocol):
    """The parts of a model that the engine needs. `vocab_size` is the tokenizer's: logits beyond it belong to padding."""

    model: PreTrainedModel
    vocab_size: int

    @property
    def device(self) -> torch.device: ...


def longest_text(prompts: Sequence[Prompt], sampling: Sampling) -> int:
    """The most tokens, with its prompt, that a rollout can have."""
    return max(len(prompt.ids) for prompt in prompts) + sampling.max_tokens


def check_sampling(sampling: Sampling) -> None:
    rules: list[tuple[str, Callable[[float], bool], str]] = [
        ("max_tokens", lambda x: x >= 1, "at least 1"),
        ("num_samples", lambda x: x >= 1, "at least 1"),
        ("temperature", lambda x: 0.0 <= x < float("inf"), "0 (greedy) or greater"),
        ("top_p", lambda x: 0.0 < x <= 1.0, "greater than 0 and at most 1 (1 switches it off)"),
        ("top_k", lambda x: x >= 0, "0 (off) or greater"),
        ("epsilon", lambda x: 0.0 <= x < 1.0, "at least 0 (off) and less than 1"),
    ]
    for name, holds, what in rules:
        value = getattr(sampling, name)
        if not holds(value):
            raise ValueError(f"{name} must be {what}, and is {value}")


def check_prompts(prompts: Sequence[Prompt], sampling: Sampling, student: Student) -> None:
    context = getattr(student.model.config.get_text_config(), "max_position_embeddings", None)
    vocabulary = student.model.get_input_embeddings().weight.shape[0]
    for prompt in prompts:
        length = len(prompt.ids)
        if length == 0:
            raise ValueError(f"prompt {prompt.key!r} has no token ids: give it a text, or at least the BOS token")
        if max(prompt.ids) >= vocabulary or min(prompt.ids) < 0:
            raise ValueError(
                f"prompt {prompt.key!r} has token ids that the student does not have: was it tokenized for another model?"
            )
        if context is not None and length + sampling.max_tokens > context:
            raise ValueError(
                f"prompt {prompt.key!r} has {length} tokens; with {sampling.max_tokens} new ones it exceeds the "
                f"student's context of {context}: "
                + (f"write rollout.max_tokens={context - length} or less" if length < context else "shorten it")
            )
