"""Matrix products in bfloat16, for a decoder on a CPU whose processor multiplies faster in it (AVX512-BF16, AMX).

The layers' matrices and what they are multiplied with are rounded, and so is each product; sums inside a product are in float32,
as are norms, attention, the softmax and the log-probabilities. So the rollouts are those of a student that is rounded, with
log-probabilities of its own: `kibitz check` says how far they are from the trainer's. Processors without such instructions
are up to ten times slower in bfloat16 than in float32: it is measured when an engine is made.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kibitz.engines.cache import Decoder, decoder_error
from kibitz.engines.packed import ROWS, Replaced
from kibitz.losses import products

MOST_ERROR = 0.25
"""Of the spread of the logits: rounding moves those of deep models by a few hundredths, a kernel that is broken by 1."""
SIZE = 1024


class _Rounded(Replaced):
    """The forward pass of a linear layer by a copy of its matrix in bfloat16, laid out for its kernel."""

    def __init__(self, module: nn.Linear):
        super().__init__(module)
        self.bias = module.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach().bfloat16(), ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.plain(x)
        found = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.packed, None, "none", [], "").float()
        return found if self.bias is None else found.add_(self.bias)


class RoundedDecoder:
    """A decoder whose products are in bfloat16 from its first step to its end. `linears()` are the layers that it multiplies
    by."""

    def __init__(self, decoder: Decoder, linears: Callable[[], Iterator[nn.Linear]]):
        self.decoder, self.linears = decoder, linears
        self.rounded: list[_Rounded] = []

    def start(self, num_rows: int, num_slots: int) -> None:
        self.decoder.start(num_rows, num_slots)
        with torch.inference_mode(False), torch.no_grad():
            self.rounded = [_Rounded(linear) for linear in self.linears()]

    def prefill(self, ids_GP: Tensor, prompt_R: Tensor, row_R: Tensor) -> None:
        self.decoder.prefill(ids_GP, prompt_R, row_R)

    def step(self, token_N: Tensor, position_N: Tensor, num_slots: int) -> Tensor:
        return self.decoder.step(token_N, position_N, num_slots)

    def move(self, source_M: Tensor, target_M: Tensor) -> None:
        self.decoder.move(source_M, target_M)

    def stop(self) -> None:
        for linear in self.rounded:
            linear.restore()
        self.rounded = []
        self.decoder.stop()


def require(model: PreTrainedModel, decoder: RoundedDecoder, vocab_size: int, longest: int) -> None:
    """Raise ValueError if the decoder's logits are not those of the model but for rounding."""
    error = decoder_error(decoder, model, vocab_size, longest)
    if not error < MOST_ERROR:
        raise ValueError(
            f"rollout.dtype: in bfloat16 the student's logits are off by {error:.0%} of their spread: write rollout.dtype=same"
        )


def require_kernel(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError where there is no such product, and warn where it is slower than a product in float32."""
    if device.type != "cpu" or dtype != torch.float32:
        raise ValueError(
            f"rollout.dtype: bfloat16 is for a float32 student on a CPU, and this one is {dtype} on {device.type}: write "
            "rollout.dtype=same"
            + (
                ""
                if dtype == torch.bfloat16
                else ", and student.dtype=bfloat16 for a student that is bfloat16 altogether"
            )
        )
    try:
        gain = bfloat16_gain()
    except (RuntimeError, AttributeError, NotImplementedError):
        raise ValueError(
            "rollout.dtype: this build of torch has no bfloat16 for a CPU: write rollout.dtype=same"
        ) from None
    if gain < 1:
        warnings.warn(
            f"this processor multiplies in bfloat16 {gain:.1f} times as fast as in float32: write rollout.dtype=same",
            stacklevel=2,
        )


@cache
def bfloat16_gain() -> float:
    """How many times as fast this processor multiplies a few rows by a matrix in bfloat16 as in float32, on the threads that
    torch has: measured in some milliseconds, once in a process."""
    x_ND, weight = torch.ones(ROWS, SIZE), torch.ones(SIZE, SIZE)
    packed, rounded = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), ROWS), x_ND.bfloat16()
    plain = _seconds(lambda: products.linear(x_ND, weight))
    return plain / _seconds(lambda: torch.ops.mkldnn._linear_pointwise(rounded, packed, None, "none", [], ""))


def _seconds(product: Callable[[], Tensor]) -> float:
    taken = []
    for _ in range(6):
        start = time.perf_counter()
        product()
        taken.append(time.perf_counter() - start)
    return min(taken)
