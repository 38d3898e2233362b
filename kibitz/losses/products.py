"""Matrix products in float32 on a CPU, by the faster of the two libraries that torch has.

torch multiplies by MKL, which has AVX-512 kernels for Intel's processors only. On the AVX-512 processors of others it computes
half as fast as oneDNN, whose kernels torch takes when a product may be rounded to bfloat16: without AMX they round nothing,
which is looked at on some numbers before it counts. `python -m benchmarks.step --mkl` says how much it brings.

The library follows from the processor and the shape, never from a stopwatch: a run that is continued has the same bits. The
environment variable KIBITZ_CPU_MATMUL (mkl or onednn) overrules the processor. Attention, and products too small to be worth
oneDNN's start, stay as they are.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VARIABLE = "KIBITZ_CPU_MATMUL"
LEAST_ROWS = 4
"""Fewer are read from memory as fast by either library."""
LEAST_SIZE = 2**21
"""Multiplications of a product: oneDNN takes some ten microseconds to begin."""
MOST_ERROR = 3e-6
"""Of the largest sum of a product's sizes: float32 in any order stays below it, bfloat16 does not."""
CHECKED = ((16, 256, 640), (100, 96, 288), (512, 192, 64), (7, 1024, 1024))
"""Rows, inner size and columns of the products that are compared."""


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies in float32 here, and faster than MKL: for AVX-512 processors that are not Intel's.

    Raise ValueError where KIBITZ_CPU_MATMUL is something else than mkl or onednn."""
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "mkl", "onednn"):
        raise ValueError(f"{VARIABLE} is {asked!r}: write mkl or onednn, or leave it out")
    if asked == "mkl" or not torch.backends.mkldnn.is_available():
        return False
    return (asked == "onednn" or _mkl_is_slow()) and _is_exact()


def _mkl_is_slow() -> bool:
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "vendor_id" in about and "GenuineIntel" not in about and "amx_tile" not in about


def _is_exact() -> bool:
    """Whether what oneDNN makes of some products is float32, forwards and for both gradients."""
    try:
        for rows, inner, columns in CHECKED:
            x = torch.linspace(-3, 2, rows * inner).sin().view(rows, inner)
            w = torch.linspace(-1, 5, inner * columns).cos().view(columns, inner)
            g = torch.linspace(-2, 7, rows * columns).sin().view(rows, columns)
            for one, other in ((x, w.t()), (g, w), (g.t(), x)):
                with onednn():
                    found = one @ other
                most = (one.double().abs() @ other.double().abs()).max()
                if not (found - one.double() @ other.double()).abs().max() <= MOST_ERROR * most:
                    return False
    except (RuntimeError, AttributeError):  # a torch without these settings
        return False
    return True


@contextmanager
def onednn() -> Iterator[None]:
    """A context whose products in float32 are oneDNN's."""
    settings: Any = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def worth(one: Tensor, other: Tensor) -> bool:
    """Whether oneDNN should multiply `one` `[..., K]` by `other` `[K, N]`."""
    if not one.dtype == other.dtype == torch.float32 or one.device.type != "cpu" or other.device.type != "cpu":
        return False
    inner, columns = other.shape
    rows = one.numel() // max(1, inner)
    return rows >= LEAST_ROWS and rows * inner * columns >= LEAST_SIZE and onednn_is_faster()


def product(one: Tensor, other: Tensor) -> Tensor:
    """`one @ other`, `[..., K]` by `[K, N]`."""
    with onednn() if worth(one, other) else nullcontext():
        return one @ other


def add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Add `one @ other` to `total` `[M, N]`, in place."""
    with onednn() if worth(one, other) else nullcontext():
        total.addmm_(one, other)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`, `[..., K]` by `[N, K]`, as `torch.nn.functional.linear`."""
    if x.numel() * weight.shape[0] < LEAST_SIZE:
        return F.linear(x, weight, bias)
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter) and weight.dim() == 2
    if not plain or torch.is_autocast_enabled("cpu") or not worth(x, weight.t()):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        found: Any = _Linear.apply(x, weight)
        return found if bias is None else found + bias
    with onednn():
        found = F.linear(x, weight)
    return found if bias is None else found + bias


class _Linear(torch.autograd.Function):
    """x W^T, whose gradients are such products again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        with onednn():
            return F.linear(x, weight_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,), (x, weight_NK) = grads, ctx.saved_tensors
        to_x, to_weight = ctx.needs_input_grad
        to_weight_NK = product(grad.flatten(0, -2).t(), x.flatten(0, -2)) if to_weight else None
        return product(grad, weight_NK) if to_x else None, to_weight_NK


class _Forward:
    """The forward pass of a linear layer, which a copy of the layer has of its own."""

    def __init__(self, module: nn.Linear):
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:
        return linear(input, self.module.weight, self.module.bias)


def speed_up(model: nn.Module) -> None:
    """Let every plain linear layer of `model` multiply by the faster library, where that is not the one it takes by itself.
    Layers whose forward pass somebody has replaced stay as they are."""
    if not onednn_is_faster():
        return
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in vars(module):
            vars(module)["forward"] = _Forward(module)
