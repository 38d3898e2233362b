"""The output head of a causal language model, called alone on the hidden states of some tokens."""

import warnings
from textwrap import shorten
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kibitz.losses.products import linear
from kibitz.types import is_gpu


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
        logits_CV = self.projection(hidden_CD)
        if logits_CV.shape[-1] > self.vocab_size:  # a slice would pad its gradient
            logits_CV = logits_CV[..., : self.vocab_size]
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        if self.softcap is not None:
            logits_CV = torch.tanh(logits_CV / self.softcap) * self.softcap
        return logits_CV


def keep_float32(projection: Any) -> None:
    """Let a plain output layer of 16-bit weights give float32 logits on a GPU, which sums in float32 in any case. Rounded to
    bfloat16 they go in steps of 0.125 between 16 and 32. Engine and loss call the same layer, and so agree."""
    if type(projection) is nn.Linear:
        projection.forward = MethodType(_logits, projection)


def _logits(projection: nn.Linear, hidden: Tensor) -> Tensor:
    weight, bias = projection.weight, projection.bias
    if weight.itemsize != 2 or not is_gpu(weight.device):
        learns = weight.requires_grad and torch.is_grad_enabled()  # losses/chunked.py looks out for that product
        return F.linear(hidden, weight, bias) if learns else linear(hidden, weight, bias)
    logits: Any = _WideProduct.apply(hidden.reshape(-1, hidden.shape[-1]), weight)
    return (logits if bias is None else logits + bias).view(*hidden.shape[:-1], -1)


class _WideProduct(torch.autograd.Function):
    """hidden W^T in float32; gradients are products in the dtype of W, as those of a plain layer are."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD)
        return torch.mm(hidden_ND, weight_VD.t(), out_dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden_ND, weight_VD = ctx.saved_tensors
        grad_NV = grad_NV.to(weight_VD.dtype)
        to_hidden, to_weight = ctx.needs_input_grad
        return grad_NV @ weight_VD if to_hidden else None, grad_NV.t() @ hidden_ND if to_weight else None


def build_head(model: Any, vocab_size: int, name: str) -> tuple[Head, bool]:
    """The head, and whether it can be called alone, which is checked on a few tokens: scale and soft-cap are read from
    the configuration by name, and an architecture may do more. On the meta device the answer is yes, unchecked; if the
    answer is no, the head passes on the logits that the whole model computes."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    head = Head(model.get_output_embeddings(), vocab_size, scale, getattr(config, "final_logit_softcapping", None))
    if model.device.type == "meta":  # `LanguageModel.materialize` checks again
        return head, True
    ids_BL = torch.arange(min(8, vocab_size), device=model.device).repeat(2, 1)
    ids_BL[1, -1] = 0
    with torch.no_grad():
        whole = _first_pass(model, ids_BL, name).logits[..., :vocab_size].float()
        hidden = getattr(body_of(model)(ids_BL, use_cache=False), "last_hidden_state", None)
        alone = None if hidden is None else head(hidden).float()
    _check_logits(whole, name, type(model).__name__)
    tolerance = 1e-3 * whole.abs().max().item() + 1e-6
    if alone is not None and torch.allclose(whole, alone, rtol=1e-3, atol=tolerance):
        return head, True
    warnings.warn(f"{name}: the output head of {type(model).__name__} cannot be called alone; logits are kept instead, "
                  f"{vocab_size} numbers a token", stacklevel=2)  # fmt: skip
    return Head(nn.Identity(), vocab_size), False


def _first_pass(model: Any, ids_BL: Tensor, name: str) -> Any:
    """The first forward pass of a model, where settings turn out that do not fit: sizes of heads, layers without a kind,
    quantized weights of another packing."""
    try:
        return model(ids_BL, use_cache=False)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        why = shorten(f"{type(error).__name__} {error}", 200, placeholder=" ...")
        raise ValueError(
            f"{name}: {type(model).__name__} cannot read {len(ids_BL[0])} tokens, so its config.json does not fit: {why}"
        ) from error


def body_of(model: Any) -> Any:
    """The model without its head. Where transformers names the whole model as its own base (Llama 4's text model), the
    submodule that holds the embedding and is the largest."""
    if model.base_model is not model:
        return model.base_model
    parts = [part for part in model.children() if hasattr(part, "get_input_embeddings")]
    return max(parts, key=lambda part: sum(p.numel() for p in part.parameters()), default=model)


def _check_logits(whole_BLV: Tensor, name: str, kind: str) -> None:
    """Raise ValueError if logits are not finite, or if those of a token depend on the tokens behind it: the two rows differ
    in their last token alone."""
    if not whole_BLV.isfinite().all():
        raise ValueError(f"{name}.model: the logits of {kind} are NaN or infinite on ordinary tokens: weights are damaged, "
                         "or too large for their dtype (write dtype=float32)")  # fmt: skip
    first, second = whole_BLV[:, :-1]
    if not torch.allclose(first, second, rtol=1e-2, atol=1e-2 * whole_BLV.abs().max().item() + 1e-6):
        raise ValueError(f"{name}.model: {kind} reads the tokens behind a token too (like BERT), so that it cannot write: "
                         "choose a causal language model")  # fmt: skip
