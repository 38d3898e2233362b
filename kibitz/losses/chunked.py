"""A loss over many tokens that never holds more than one chunk of logits.

The logits of a micro-batch, [T, V], are usually the largest tensor of a training step: 16,384 tokens of a vocabulary of
152,000 take 10 GB in float32, and the softmax, the teacher and the gradient take as much again each. Here the head
runs on `chunk_size` tokens at a time, and the gradient with respect to the hidden states and the head is taken there
and then, inside the forward pass, so that each chunk's logits are freed before the next are made. What remains for the
backward pass is one gradient as large as the hidden states, and one in float32 as large as the head's parameters.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kibitz.losses.checks import together
from kibitz.signals import Spans, Tokens

Criterion = Callable[[Tensor, Tokens], dict[str, Tensor]]
"""logits_CV (float32, cut to the vocabulary) and the chunk's tokens -> {"loss": [C], and any metrics [C]}.

Each token must be scored by itself, or with the other tokens of its span: no chunk ends inside one. What a criterion
computed across other tokens would depend on the size of the chunks.
"""


def over_chunks(
    criterion: Criterion,
    hidden_TD: Tensor,
    head: torch.nn.Module,
    tokens: Tokens,
    chunk_size: int = 1024,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum_t weight_t * loss_t, and every value that the criterion gives, detached, [T].

    The sum is not divided: the caller divides by the global number of tokens. Its gradient reaches `hidden_TD` and the
    parameters of `head` that require one (a module, so that they are known), and is the same, up to rounding, for every
    chunk size. Under `torch.no_grad` only the values are computed. No tokens give a zero that is still connected to the
    graph, so that a rank with nothing to learn takes part in the backward pass. Losses of tokens of weight 0 must be
    finite all the same.

    Memory, whatever T is, if no span is longer than a chunk: about ten float32 tensors [chunk_size, V] for an exact
    divergence with its metrics and its gradient, fewer for cross-entropy; so 6 GB at 1,024 tokens of a vocabulary of 152,000.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    with_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or bool(parameters))
    hidden_grad_TD = torch.zeros_like(hidden_TD) if with_grad and hidden_TD.requires_grad else None
    parameter_grads = [torch.zeros_like(p, dtype=_at_least_float32(p)) for p in parameters] if with_grad else []
    chunks: list[dict[str, Tensor]] = []
    with together():
        for chunk in _chunks(tokens, chunk_size):
            hidden_CD = hidden_TD[chunk].detach().requires_grad_(hidden_grad_TD is not None)
            with torch.set_grad_enabled(with_grad):
                logits_CV = head(hidden_CD)
                values = criterion(logits_CV.to(_at_least_float32(logits_CV)), tokens[chunk])
                if with_grad:
                    wanted = parameters if hidden_grad_TD is None else [*parameters, hidden_CD]
                    grads = _gradients(tokens.weight_T[chunk], values["loss"], wanted)
                    if hidden_grad_TD is not None:
                        hidden_grad_TD[chunk] = grads.pop()
                    for total, grad in zip(parameter_grads, grads, strict=True):
                        total += grad
            chunks.append({name: value.detach() for name, value in values.items()})
            del logits_CV, values  # before the next chunk's logits are made
    values_T = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    loss = (tokens.weight_T.to(values_T["loss"].dtype) * values_T["loss"]).sum()
    if not with_grad:
        return loss, values_T
    if hidden_grad_TD is None:
        return _WithGradients.apply(loss, parameter_grads, *parameters), values_T
    return _WithGradients.apply(loss, [hidden_grad_TD, *parameter_grads], hidden_TD, *parameters), values_T


def _chunks(tokens: Tokens, size: int) -> list[slice]:
    """At most `size` tokens each, or one span that is longer; one empty chunk for no tokens: the names of the values are
    known then too."""
    num = len(tokens.token_T)
    if not isinstance(tokens.signal, Spans):
        return [slice(start, start + size) for start in range(0, max(num, 1), size)]
    span_T = tokens.signal.span_T
    ends = [*((span_T[1:] != span_T[:-1]).nonzero()[:, 0] + 1).tolist(), num]
    chunks, start = [], 0
    for end, following in zip(ends, [*ends[1:], num + size + 1], strict=True):
        if following - start > size:
            chunks.append(slice(start, end))
            start = end
    return chunks


def _gradients(weight_C: Tensor, loss_C: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    assert loss_C.requires_grad, "the criterion's loss does not depend on the logits, or was detached from them"
    total = (weight_C.detach().to(loss_C.dtype) * loss_C).sum()
    return list(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _WithGradients(torch.autograd.Function):
    """A value whose gradients with respect to `inputs` are known already."""

    @staticmethod
    def forward(ctx, value: Tensor, grads: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        return None, None, *(grad * grad_output for grad in ctx.saved_tensors)  # autograd casts to the inputs' dtypes
