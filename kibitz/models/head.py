"""The output head of a causal language model, called alone on the hidden states of some tokens."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """The output layer and the architecture's scale and soft-cap: it maps hidden states `[C, D]` to logits `[C, V]`."""

    def __init__(self, projection: nn.Module, vocab_size: int, scale: float = 1.0, softcap: float | None = None):
        super().__init__()
        self.projection, self.vocab_size, self.scale, self.softcap = projection, vocab_size, scale, softcap

    def without_adapter(self) -> "Head":
        """The head of the base model: this one, or one on the base matrix if LoRA adapts the output layer."""
        base = getattr(self.projection, "base_layer", None)
        return self if base is None else Head(base, self.vocab_size, self.scale, self.softcap)

    def forward(self, hidden_CD: Tensor) -> Tensor:
        weight = getattr(self.projection, "weight", None)
        if weight is not None:
            hidden_CD = hidden_CD.to(weight.device, non_blocking=True)  # a teacher's may have been kept in host memory
        logits_CV = self.projection(hidden_CD)[..., : self.vocab_size]
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        if self.softcap is not None:
            logits_CV = torch.tanh(logits_CV / self.softcap) * self.softcap
        return logits_CV


def build_head(model: Any, vocab_size: int, name: str) -> tuple[Head, bool]:
    """The head, and whether it can be called alone, which is checked on a few tokens: scale and soft-cap are read from
    the configuration by name, and an architecture may do more. On the meta device the answer is yes, unchecked; if the
    answer is no, the head passes on the logits that the whole model computes."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    head = Head(model.get_output_embeddings(), vocab_size, scale, getattr(config, "final_logit_softcapping", None))
    if model.device.type == "meta":  # `LanguageModel.materialize` checks again
        return head, True
    ids_BL = torch.arange(min(8, vocab_size), device=model.device)[None]
    with torch.no_grad():
        whole = model(ids_BL, use_cache=False).logits[..., :vocab_size].float()
        alone = head(model.base_model(ids_BL, use_cache=False).last_hidden_state).float()
    if torch.allclose(whole, alone, rtol=1e-3, atol=1e-3 * whole.abs().max().item() + 1e-6):
        return head, True
    warnings.warn(f"{name}: the output head of {type(model).__name__} cannot be called alone; logits are kept instead, "
                  f"{vocab_size} numbers a token", stacklevel=2)  # fmt: skip
    return Head(nn.Identity(), vocab_size), False
