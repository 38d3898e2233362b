"""How many rows the embedded engine may write side by side in what is left of a GPU's memory."""

import logging
from typing import Any

import torch
from torch import nn

from kibitz.engines.fused import refuse_unless_covered
from kibitz.types import free_bytes

log = logging.getLogger(__name__)

SHARE = 0.8
"""Of the free memory; the rest is for activations, and for what the allocator loses between blocks."""
BYTES_PER_LOGIT = 32
"""Float32 logits, their distribution and its float64 sum, with copies, as they exist while a token is drawn."""


def cache_bytes(model: Any) -> int:
    """The bytes of keys and values per token, over all layers; 0 for a model whose configuration names no attention heads."""
    config = model.config.get_text_config()
    attention = getattr(config, "num_attention_heads", None)
    if not attention:
        return 0
    heads = getattr(config, "num_key_value_heads", None) or attention
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // attention
    return 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize


def rows_that_fit(model: Any, device: torch.device, num_slots: int, vocab_size: int) -> int | None:
    """The rows of `num_slots` tokens for which a GPU has room; None where its memory is not asked for. At least one, so that
    what does not fit is an error of the GPU, which says how much it lacks."""
    free = free_bytes(device)
    if free is None:
        return None
    return max(1, int(SHARE * free / (num_slots * cache_bytes(model) + BYTES_PER_LOGIT * vocab_size)))


def laid_out_bytes(model: Any, adapted: bool) -> int:
    """The bytes, at most, of the matrices that a CPU lays out anew while it writes: once for its kernels (`PackedDecoder`), and
    once more where some of them are joined (`FusedDecoder`), which is not done to a model with an adapter."""
    weights = [module.weight for module in model.modules() if type(module) is nn.Linear]
    once = sum(weight.nbytes for weight in weights if weight.dtype == torch.float32)
    try:
        refuse_unless_covered(model)
    except NotImplementedError:
        return once
    return once if adapted else 2 * once


def num_rows(most: int, model: Any, device: torch.device, num_slots: int, vocab_size: int) -> int:
    """`most`, or fewer where the GPU has no room for so many. A rollout is the same in any company."""
    room = rows_that_fit(model, device, num_slots, vocab_size)
    if room is None or room >= most:
        return most
    log.info(
        "%d rows are written side by side, not %d: keys and values of more do not fit beside the models", room, most
    )
    return room
