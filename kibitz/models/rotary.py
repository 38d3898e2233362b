"""Rotary factors that depend on the length of a text (LongRoPE of Phi-3.5 and Phi-4-mini, dynamic NTK), held for a whole run.

transformers chooses them by the last position in a batch. A row's numbers would depend on its micro-batch, keys cached
under the short factors would be read under the long ones, and a text that grows across the switch would be sampled by two
models and scored by one. So every pass of a run takes the factors of the run's longest text, as vLLM takes those of its
`max_model_len`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class HeldRotation:
    """The forward pass of a rotary module that sees the last position of a text of `longest` tokens behind all others."""

    def __init__(self, forward: Callable[..., tuple[Tensor, Tensor]], longest: int):
        self.forward, self.longest = forward, longest

    def __call__(self, x: Tensor, position_ids: Tensor, *more: Any, **options: Any) -> tuple[Tensor, Tensor]:
        last = position_ids.new_full((*position_ids.shape[:-1], 1), self.longest - 1)
        cos, sin = self.forward(x, torch.cat([position_ids, last], dim=-1), *more, **options)
        return cos[..., :-1, :], sin[..., :-1, :]


def hold_rotations(model: nn.Module, longest: int) -> None:
    """Let every pass of `model` take the rotary factors of a text of `longest` tokens."""
    for module in _varying(model):
        if isinstance(module.forward, HeldRotation):
            module.forward.longest = longest
        else:
            module.forward = HeldRotation(module.forward, longest)


def holds_rotations(model: nn.Module) -> bool:
    """Whether no factor of `model` depends on a text's length any more."""
    return all(isinstance(module.forward, HeldRotation) for module in _varying(model))


def rotations_vary(model: nn.Module) -> bool:
    """Whether transformers would choose factors of `model` by length."""
    return any(True for _ in _varying(model))


def _varying(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind) for kind in kinds):
            yield module
