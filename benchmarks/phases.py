"""The phases of a step, each as the code that trains asks for it on tensors without numbers, and what it must at the least.

Models have two and three layers, whose difference is a layer. Switches bring back what a repair took away.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.counting import META, Counting, Fused, Scale, Work, kernels_of_attention, model_of, of_all_layers
from kibitz.engines.cache import CachedDecoder
from kibitz.engines.room import cache_bytes
from kibitz.engines.sampling import sample
from kibitz.logprobs import log_probs
from kibitz.losses import chunked, criteria, divergences, supports
from kibitz.losses.criteria import Divergence
from kibitz.losses.divergences import reverse_kl
from kibitz.models import head as heads
from kibitz.models.flops import forward_flops
from kibitz.models.head import Head, keep_float32
from kibitz.signals import Dense, Tokens
from kibitz.training.means import num_measured
from kibitz.types import Sampling


@contextmanager
def on_a_gpu() -> Iterator[None]:
    """A context inside which output layers on meta are those of a GPU, and give float32 logits."""
    with patch.object(heads, "is_gpu", lambda device: True):
        yield


# ------------------------------------------------------------------ rollouts


def decoding(scale: Scale, rounded: bool = False) -> Work:
    """The kernels of one token of all rows, the draw among them; what is read is in `rollouts`. `rounded`: logits are bfloat16
    first, and then copied."""

    def token(layers: int) -> Work:
        model = model_of(scale.student, scale.vocab, layers)
        keep_float32(model.lm_head)
        decoder = CachedDecoder(model)
        with torch.no_grad(), META, kernels_of_attention(), nullcontext() if rounded else on_a_gpu():
            decoder.start(scale.rollouts, 512)
            token_N, position_N = torch.zeros(2, scale.rollouts, dtype=torch.long).unbind()
            decoder.step(token_N, position_N, 300)  # allocates keys and values
            with Counting() as counting:
                logits_NV = decoder.step(token_N, position_N, 300)
                sample(logits_NV, torch.zeros(scale.rollouts, dtype=torch.float64), Sampling())
        return Work(counting.work.kernels)

    return of_all_layers(token(2), token(3), scale.student["num_hidden_layers"])


def rollouts(scale: Scale, rounded: bool = False) -> tuple[Work, Work]:
    """All tokens as they are written; and the least: every weight once a token, and the keys and values of what there is. The
    host waits once a token, for whether rows are done."""
    model = model_of(scale.student, scale.vocab)
    weights = 2.0 * sum(parameter.numel() for parameter in model.parameters())
    held = cache_bytes(model) * scale.rollouts * (scale.prompt + scale.response / 2)
    least = Work(bytes=weights + held).times(scale.response)
    host = Work(decoding(scale, rounded).kernels, waits=1.0).times(scale.response)
    return host + least, least


# ------------------------------------------------------------------ bodies


def reading(scale: Scale, sizes: dict, learns: bool, compiled: bool = False) -> tuple[Work, Work]:
    """A pass of a body over all rollouts, and its gradients if it `learns`; and its products alone."""

    def body(layers: int) -> Work:
        model = model_of(sizes, scale.vocab, layers).model
        ids = torch.zeros(scale.rows, scale.length, dtype=torch.long, device=META)
        mask = torch.ones(1, 1, scale.length, scale.length, dtype=torch.bool, device=META)
        counting = Fused() if compiled else Counting()
        with torch.set_grad_enabled(learns), kernels_of_attention(), counting:
            hidden = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
            if learns:
                hidden.backward(torch.empty_like(hidden))
        return counting.work

    one = of_all_layers(body(2), body(3), sizes["num_hidden_layers"])
    full = model_of(sizes, scale.vocab)
    flops = scale.rollouts * forward_flops(full, scale.length, scale.length**2, 0) * (3 if learns else 1)
    return one.times(scale.micro_batches) + Work(flops=flops), Work(flops=flops)


# ------------------------------------------------------------------ the loss


def loss(
    scale: Scale, chunk: int, *, rounded: bool = False, all_measured: bool = False, by_autograd: bool = False
) -> tuple[Work, Work]:
    """Exact reverse KL with its gradients and metrics, chunk after chunk, and its products alone. `rounded`: logits are bfloat16
    first, and then copied; `all_measured`: metrics are of each token, and the reverse KL is computed anew for them;
    `by_autograd`: the gradients of the KL are autograd's."""
    size = scale.rows * scale.response
    every = 1 if all_measured else max(1, -(-size // num_measured(scale.scored)))
    criterion = Divergence((lambda student, teacher: reverse_kl(student, teacher)) if all_measured else reverse_kl)
    with META:
        hidden = torch.empty(size, scale.student["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
        own, other = _head(scale, scale.student), _head(scale, scale.teacher).requires_grad_(False)
        signal = Dense(torch.empty(size, scale.teacher["hidden_size"], dtype=torch.bfloat16), other)
        columns = torch.zeros(size, dtype=torch.long), torch.ones(size), torch.zeros(size)
    tokens = Tokens(*columns, signal, every=every)
    unchecked = patch.object(supports, "refuse_if", lambda *_: None)
    with nullcontext() if rounded else on_a_gpu(), unchecked, _formula(by_autograd), Counting() as counting:
        value, _ = chunked.over_chunks(criterion, hidden, own, tokens, chunk)
        value.backward()
    flops = 2.0 * scale.rollouts * scale.response * scale.vocab
    flops *= 3 * scale.student["hidden_size"] + scale.teacher["hidden_size"]
    return counting.work.times(scale.micro_batches) + Work(flops=flops), Work(flops=flops)


@contextmanager
def _formula(by_autograd: bool) -> Iterator[None]:
    """A context inside which autograd finds the gradients of the KL, if it is to."""

    def of_logits(logits_CV: Tensor, teacher_CV: Tensor) -> tuple[Tensor, Tensor]:
        student_CV = log_probs(logits_CV)
        return _kl(student_CV, teacher_CV), student_CV.detach()

    plain = patch.object(divergences, "kl", _kl), patch.object(criteria, "reverse_kl_of_logits", of_logits)
    with plain[0] if by_autograd else nullcontext(), plain[1] if by_autograd else nullcontext():
        yield


def _kl(left_CS: Tensor, right_CS: Tensor) -> Tensor:
    """The value of `kibitz.logprobs.kl`, whose gradient autograd finds."""
    left_prob_CS = left_CS.exp()
    return (left_prob_CS * (left_CS - right_CS) - left_prob_CS + right_CS.exp()).sum(-1)


def _head(scale: Scale, sizes: dict) -> Head:
    projection = torch.nn.Linear(sizes["hidden_size"], scale.vocab, bias=False, dtype=torch.bfloat16)
    keep_float32(projection)
    return Head(projection, scale.scored)
