"""Models without weights: their sizes, and the memory that training them takes.

A model is built on torch's `meta` device from its config.json alone, so that a plan for 32 billion parameters takes seconds
and no memory. What the backward pass keeps is counted, not guessed, by `kibitz.models.kept`.
"""

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from kibitz.config import FrozenConfig, ModelConfig
from kibitz.engines.room import cache_bytes
from kibitz.models.flops import num_experts
from kibitz.models.head import body_of
from kibitz.models.kept import PROBED_TOKENS, kept_on_meta, squares_on_meta
from kibitz.models.load import without_weights
from kibitz.models.quantized import BYTES
from kibitz.parallel.fsdp import layers_of


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. `model` has no weights; `section` has the quantization and offloading of a frozen model."""

    model: Any
    section: ModelConfig | None = None

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config()

    @cached_property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def num_body(self) -> int:
        """The number of parameters without the output head; a tied head counts as the embedding."""
        return sum(parameter.numel() for parameter in body_of(self.model).parameters())

    @cached_property
    def num_in_layer(self) -> int:
        """The number of parameters in the largest transformer layer. Layers are the units of sharding."""
        layers = layers_of(self.model)
        return max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0)

    @cached_property
    def num_around(self) -> int:
        """The number of parameters outside the layers: embedding, output head, norms."""
        return self.num_parameters - sum(p.numel() for layer in layers_of(self.model) for p in layer.parameters())

    @cached_property
    def num_quantized(self) -> int:
        """The number of parameters that the section keeps in 8 or 4 bits: those of the matrices in the layers."""
        if getattr(self.section, "quantize", None) is None:
            return 0
        modules = [module for layer in layers_of(self.model) for module in layer.modules()]
        return sum(module.weight.numel() for module in modules if isinstance(module, nn.Linear | Conv1D))

    @property
    def bytes_in_layers(self) -> float:
        """The bytes of the layers' weights."""
        rest = self.num_parameters - self.num_around - self.num_quantized
        small = BYTES[self.section.quantize] if self.num_quantized else 0.0  # pyright: ignore
        return float(self.itemsize * rest) + small * self.num_quantized

    @property
    def bytes(self) -> float:
        """The bytes of all weights."""
        return self.bytes_in_layers + self.itemsize * self.num_around

    @property
    def visits(self) -> float:
        """The bytes of offloaded weights that are on the device only during a forward pass."""
        how = self.section.offload if isinstance(self.section, FrozenConfig) else None
        if how == "layers":
            return self.bytes_in_layers * self.num_in_layer / max(1, self.num_parameters - self.num_around)
        return self.bytes_in_layers if how == "body" else 0.0

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def max_positions(self) -> int | None:
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def rows(self) -> int:
        """The rows of the output layer: the size of the vocabulary, padded."""
        return self.model.get_output_embeddings().weight.shape[0]

    @property
    def itemsize(self) -> int:
        return next(self.model.parameters()).element_size()

    def lora_parameters(self, rank: int, targets: str | list[str]) -> int:
        """Return the number of parameters of LoRA adapters on the named linear layers, or on all but the output head."""
        head = self.model.get_output_embeddings()
        linear = [(name, m) for name, m in self.model.named_modules() if isinstance(m, nn.Linear) and m is not head]
        chosen = [m for name, m in linear if targets == "all-linear" or name.rpartition(".")[2] in targets]
        return sum(rank * (m.in_features + m.out_features) for m in chosen)

    @property
    def cache_bytes_per_token(self) -> int:
        """The bytes of keys and values per token, over all layers."""
        return cache_bytes(self.model)

    @cached_property
    def activation_bytes_per_token(self) -> float:
        """The bytes of activations per token that the body keeps for the backward pass, without gradient checkpointing. On meta
        torch multiplies by the matrices of experts in bfloat16 only: a float32 mixture keeps twice what its bfloat16 twin does,
        or less, where some of that is float32 in both."""
        if self.itemsize == 2 or not num_experts(self.config)[0]:
            return kept_on_meta(self.model) - PROBED_TOKENS * self.squares
        twin = copy.deepcopy(self.model).to(torch.bfloat16)
        return self.itemsize / 2 * kept_on_meta(twin)

    @cached_property
    def squares(self) -> float:
        """The bytes per token, and per token of the text around it, that attention without a fused kernel keeps."""
        return 0.0 if num_experts(self.config)[0] else squares_on_meta(self.model)

    def kept_per_token(self, length: int) -> float:
        """The bytes of activations per token in texts of this length."""
        return self.activation_bytes_per_token + self.squares * length


def shape_of(config: ModelConfig, dtype: torch.dtype) -> Shape:
    """Build the model of a recipe's section without its weights. Raise ValueError for an architecture that cannot be built so."""
    try:
        shape = Shape(without_weights(config.model, dtype, config.trust_remote_code).train(False), config)
        _ = shape.activation_bytes_per_token
    except Exception as error:  # whatever an architecture makes of a device without numbers
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{config.model} cannot be built without its weights: {reason}") from error
    return shape
