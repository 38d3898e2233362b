"""The layers of a transformer, which are recomputed and compiled one by one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")
"""What a layer is given, under these names, while an engine writes token by token."""
MOST_VARIANTS = 64
"""Compiled forms of one layer: with gradients and without, for one row and several, and for each model of a process."""


def recomputable(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers can recompute; none for an architecture that has no such layers."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_layers(model: nn.Module) -> None:
    """Compile each layer's pass over whole sequences, not the steps of an engine, which come with a cache. Layers of one shape
    share what was compiled, so that a deep model takes no longer than one of one layer. Raise ValueError where there are none."""
    layers = recomputable(model)
    if not layers:
        raise ValueError(f"compile: {type(model).__name__} has no layers that can be compiled: leave it out")
    torch._dynamo.config.recompile_limit = max(MOST_VARIANTS, torch._dynamo.config.recompile_limit)
    for layer in layers:
        plain = layer._call_impl
        layer._compiled_call_impl = _without_cache(plain, torch.compile(plain, dynamic=True))


def _without_cache(plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        writes = any(kwargs.get(name) is not None for name in CACHES)
        return (plain if writes else compiled)(*args, **kwargs)

    return call


def leave_plain(model: nn.Module) -> None:
    """Take `compile_layers` back."""
    for layer in recomputable(model):
        layer._compiled_call_impl = None
