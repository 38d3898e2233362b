"""What a backward pass needs of the forward pass, counted by a hook on every saved tensor."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations import sdpa_attention

from kibitz.models.head import body_of

PROBED_TOKENS = 64
ROWS = 8
"""Of the texts that are counted on meta."""


def kept_bytes_per_token(model: nn.Module, read: Callable[[Tensor], object], device: torch.device | str) -> float:
    """The bytes that `read(ids_N1)`, a forward pass of `model`, keeps for each token beside the parameters. Rows have one token,
    where attention keeps nothing that grows with the square of the length, which is what fused attention does at any length."""
    ids_N1 = torch.zeros(PROBED_TOKENS, 1, dtype=torch.long, device=device)
    return _kept_bytes(model, lambda: read(ids_N1)) / PROBED_TOKENS


def kept_on_meta(model: Any, length: int | None = None) -> float:
    """The bytes per token that the body of a model on meta keeps, of texts side by side. Attention counts as the one kernel that
    it is on other devices. Recurrent layers count as transformers writes them without kernels of their own, which keep less.
    `length`: that of the texts, where it matters."""
    num = length or _tokens_on_meta(model.config.get_text_config())
    ids = torch.zeros(ROWS, num, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, num, num, dtype=torch.bool, device="meta")

    def of(**options: Any) -> float:
        with fused_attention():
            return _kept_bytes(model, lambda: body_of(model)(ids, use_cache=False, **options)) / (ROWS * num)

    try:
        return of(attention_mask=mask)
    except (RuntimeError, ValueError, TypeError):  # models without attention take masks of another form
        return of()


def squares_on_meta(model: Any) -> float:
    """The bytes per token, and per token of the text that it stands in, that `eager` attention keeps: scores of each pair, as in
    models with soft caps, for which transformers has no fused kernel. 0 of other implementations."""
    if model.config.get_text_config()._attn_implementation != "eager":
        return 0.0
    short, long = (kept_on_meta(model, num) for num in (PROBED_TOKENS, 2 * PROBED_TOKENS))
    return max(0.0, (long - short) / PROBED_TOKENS)


def _kept_bytes(model: nn.Module, read: Callable[[], object]) -> int:
    kept: dict[int, Tensor] = {}
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)  # kept alive, so that no address comes twice
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        read()
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in parameters)


def _tokens_on_meta(config: Any) -> int:
    """How many tokens to count on: a whole chunk where a model fills texts up to one, few where it reads one token after
    another, and otherwise as many as make what a row has once small."""
    chunk = getattr(config, "mamba_chunk_size", None) or getattr(config, "chunk_size", None)
    one_by_one = not getattr(config, "num_attention_heads", None) or hasattr(config, "mamba_d_state")
    return chunk or (8 if one_by_one else PROBED_TOKENS)


class _Fused(torch.autograd.Function):
    """What an attention kernel keeps: queries, keys, values, its result, and one number for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, length, _ = query.shape
        result = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("shapes have no gradients")


@contextmanager
def fused_attention() -> Iterator[None]:
    """A context inside which attention is one kernel, as on every device but meta, where torch takes it apart; heads share keys,
    as they do where no mask is written out."""
    apart, shares = F.scaled_dot_product_attention, sdpa_attention.use_gqa_in_sdpa
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: _Fused.apply(query, key, value)
    sdpa_attention.use_gqa_in_sdpa = lambda *_, **__: True
    try:
        yield
    finally:
        F.scaled_dot_product_attention, sdpa_attention.use_gqa_in_sdpa = apart, shares
