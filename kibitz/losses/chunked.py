"""A loss over many tokens that never holds more than one chunk of logits.

The logits of a micro-batch, [T, V], are usually the largest tensor of a training step: 16,384 tokens of a vocabulary of
152,000 take 10 GB in float32, and the softmax, the teacher and the gradient take as much again each. Here the head
runs on `chunk_size` tokens at a time, and the gradient with respect to the hidden states and the head is taken there
and then, inside the forward pass, so that each chunk's logits are freed before the next are made. What remains for the
backward pass is one gradient as large as the hidden states, and one in float32 as large as the head's parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from kibitz.losses.checks import together
from kibitz.losses.products import add_product, product
from kibitz.signals import Dense, Spans, Tokens

Criterion = Callable[[Tensor, Tokens], dict[str, Tensor]]
"""logits_CV (float32, cut to the vocabulary) and the chunk's tokens -> {"loss": [C], and any metrics [C]}.

Each token must be scored by itself, or with the other tokens of its span: no chunk ends inside one. What a criterion
computed across other tokens would depend on the size of the chunks.
"""

BLOCK_NUMBERS = 2**18
"""Numbers of a block's logits on a CPU: the dozen tensors of a loss stay in its caches."""


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
    finite all the same. The gradients are handed over by the first backward pass; a second raises RuntimeError.

    Memory, whatever T is, if no span is longer than a chunk: on a GPU about ten float32 tensors [chunk_size, V] for an exact
    divergence with its metrics and its gradient, fewer for cross-entropy; so 6 GB at 1,024 tokens of a vocabulary of 152,000. On
    a CPU two of them, and of the others a block.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    with_grad = torch.is_grad_enabled() and (hidden_TD.requires_grad or bool(parameters))
    hidden_grad_TD = torch.zeros_like(hidden_TD) if with_grad and hidden_TD.requires_grad else None
    sums = _Sums(parameters if with_grad else [])
    chunks: list[dict[str, Tensor]] = []
    with together():
        for chunk in _chunks(tokens, chunk_size):
            hidden_CD = hidden_TD[chunk].detach().requires_grad_(hidden_grad_TD is not None)
            with torch.set_grad_enabled(with_grad), sums:
                logits_CV = head(hidden_CD)
                logits_CV = logits_CV.to(_at_least_float32(logits_CV))
            place_CV, own = logits_CV.detach(), _shares_nothing(logits_CV, hidden_CD)
            values, grad_CV = _by_blocks(criterion, place_CV, tokens[chunk], with_grad, own)
            chunks.append(values)
            if grad_CV is not None:
                wanted = [] if hidden_grad_TD is None else [hidden_CD]
                made, grad = _uncut(logits_CV) if grad_CV is place_CV else (logits_CV, grad_CV)
                grads = sums.add(made, grad, wanted)
                if hidden_grad_TD is not None:
                    hidden_grad_TD[chunk] = grads[0]
                del made, grad
            del logits_CV, place_CV, grad_CV  # before the next chunk's logits are made
    values_T = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    loss = (tokens.weight_T.to(values_T["loss"].dtype) * values_T["loss"]).sum()
    if not with_grad:
        return loss, values_T
    if hidden_grad_TD is None:
        return _WithGradients.apply(loss, sums.totals, *parameters), values_T
    return _WithGradients.apply(loss, [hidden_grad_TD, *sums.totals], hidden_TD, *parameters), values_T


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


def _shares_nothing(logits_CV: Tensor, hidden_CD: Tensor) -> bool:
    """Whether the logits lie in a memory of their own: a head may hand on what it was given."""
    return logits_CV.untyped_storage().data_ptr() != hidden_CD.untyped_storage().data_ptr()


def _uncut(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """The logits, and their gradient, which lies in their place. Where a head has cut off the columns of a padded vocabulary they
    are those of all columns: a slice would pad its gradient in one more tensor as large."""
    whole = logits_CV._base
    if whole is None or whole.stride() != logits_CV.stride() or whole.shape[:-1] != logits_CV.shape[:-1]:
        return logits_CV, logits_CV.detach()
    grad = whole.detach()
    grad[..., logits_CV.shape[-1] :] = 0.0
    return whole, grad


def _by_blocks(
    criterion: Criterion, logits_CV: Tensor, tokens: Tokens, with_grad: bool, in_place: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The criterion's values of a chunk, and the gradient of its weighted loss with respect to the logits. A CPU computes
    them for a few rows at a time, whose tensors stay in its cache; a teacher's logits are made for the whole chunk before.
    `in_place`: the gradient of a block is written where its logits were."""
    blocks = _blocks(tokens, logits_CV)
    if len(blocks) == 1:
        return _of_block(criterion, logits_CV, tokens, with_grad)
    tokens, found = _with_logits(tokens), _Values(len(logits_CV))
    grad_CV = logits_CV if in_place else torch.empty_like(logits_CV)
    for block in blocks:
        values, grad_BV = _of_block(criterion, logits_CV[block], tokens[block], with_grad)
        found.add(values)
        if grad_BV is not None:
            grad_CV[block] = grad_BV
    return found.whole(), grad_CV if with_grad else None


def _of_block(
    criterion: Criterion, logits_BV: Tensor, tokens: Tokens, with_grad: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    grad_BV = None
    with torch.set_grad_enabled(with_grad):
        values = criterion(logits_BV.requires_grad_(with_grad), tokens)
        if with_grad:
            loss_B = values["loss"]
            assert loss_B.requires_grad, "the criterion's loss does not depend on the logits, or was detached from them"
            total = (tokens.weight_T.detach().to(loss_B.dtype) * loss_B).sum()
            (grad_BV,) = torch.autograd.grad(total, logits_BV)
    return {name: value.detach() for name, value in values.items()}, grad_BV


class _Values:
    """Values of blocks, in tensors that are there from the first block on: small ones that each block left behind would stand
    between the large ones, and no large one would find room where another was."""

    def __init__(self, num: int):
        self.num, self.columns, self.filled = num, dict[str, Tensor](), dict[str, int]()

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            if name not in self.columns:
                self.columns[name], self.filled[name] = value.new_empty(self.num), 0
            start = self.filled[name]
            self.filled[name] = start + len(value)
            self.columns[name][start : start + len(value)] = value

    def whole(self) -> dict[str, Tensor]:
        """Each value of all blocks; of those that were taken of a sample, the sample's."""
        return {name: column[: self.filled[name]] for name, column in self.columns.items()}


def _blocks(tokens: Tokens, logits_CV: Tensor) -> list[slice]:
    """All rows at once on a GPU, and where spans must not be cut."""
    num, vocab_size = logits_CV.shape
    if logits_CV.device.type != "cpu" or isinstance(tokens.signal, Spans):
        return [slice(0, num)]
    rows = max(1, BLOCK_NUMBERS // vocab_size)
    return [slice(start, start + rows) for start in range(0, max(num, 1), rows)]


def _with_logits(tokens: Tokens) -> Tokens:
    """The same tokens, whose dense signals hold logits for hidden states."""
    anchor = tokens.anchor
    if anchor is not None:
        anchor = replace(anchor, signal=_multiplied(anchor.signal))
    return replace(tokens, signal=_multiplied(tokens.signal), anchor=anchor)


@torch.no_grad()
def _multiplied(signal: Any) -> Any:
    return Dense(signal.head(signal.hidden_TD), _as_it_is) if isinstance(signal, Dense) else signal


def _as_it_is(logits_CV: Tensor) -> Tensor:
    return logits_CV


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _Sums(TorchFunctionMode):
    """Gradients of the head's parameters, summed over chunks. As a context it lets a product with one of its matrices add its
    gradient to the sum itself: one tensor as large as the head, where a gradient for each chunk would be a second."""

    def __init__(self, parameters: Sequence[Tensor]):
        super().__init__()
        self.parameters = parameters
        self.totals = [torch.zeros_like(p, dtype=_at_least_float32(p)) for p in parameters]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and len(args) > 1:
            for weight, total in zip(self.parameters, self.totals, strict=True):
                if weight is args[1] and type(weight) is torch.nn.Parameter and weight.dtype == total.dtype:
                    logits: Any = _Product.apply(args[0], weight, total)
                    return logits if len(args) < 3 or args[2] is None else logits + args[2]
        return func(*args, **(kwargs or {}))

    def add(self, logits_CV: Tensor, grad_CV: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
        """Add the gradients that a chunk's logits have, and return those with respect to `wanted`."""
        found = torch.autograd.grad(logits_CV, [*wanted, *self.parameters], grad_CV, allow_unused=True)
        for total, grad in zip(self.totals, found[len(wanted) :], strict=True):
            if grad is not None:
                total += grad
        asked = zip(wanted, found, strict=False)
        return [torch.zeros_like(one) if grad is None else grad for one, grad in asked]


class _Product(torch.autograd.Function):
    """x W^T, whose backward pass adds the gradient of W to a sum and gives none."""

    @staticmethod
    def forward(ctx: Any, x_CD: Tensor, weight_VD: Tensor, total_VD: Tensor) -> Tensor:
        ctx.save_for_backward(x_CD, weight_VD)
        ctx.total_VD = total_VD
        return product(x_CD, weight_VD.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_CV: Tensor) -> tuple[Tensor | None, None, None]:
        x_CD, weight_VD = ctx.saved_tensors
        add_product(ctx.total_VD, grad_CV.flatten(0, -2).t(), x_CD.flatten(0, -2))
        return product(grad_CV, weight_VD) if ctx.needs_input_grad[0] else None, None, None


class _WithGradients(torch.autograd.Function):
    """A value whose gradients with respect to `inputs` are known already. They are handed over, and so once only."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        ctx.spent = False
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("the loss has been differentiated already: its gradients were handed over then")
        ctx.spent = True
        return (
            None,
            None,
            *(grad.mul_(grad_output) for grad in ctx.saved_tensors),
        )  # autograd casts to the inputs' dtypes
