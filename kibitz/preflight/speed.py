"""How fast a device multiplies and reads: what a plan of hours stands on."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kibitz.models.load import pick_dtype
from kibitz.types import is_gpu

FLOPS_PER_BYTE = 200.0
"""FLOP/s in 16-bit matrix products for each byte/s of memory: 156 for an A100, 206 for an H200, 295 for an H100."""


@dataclass(frozen=True)
class Speed:
    """`flops` are the FLOP/s of matrix products in the dtype that models have, `bytes` those of memory per second."""

    flops: float
    bytes: float


def speed_of(device: torch.device, flops: float | None = None) -> Speed:
    """Measure a device, or take `flops` for one that is not here, with memory to match."""
    if flops is not None:
        return Speed(flops, flops / FLOPS_PER_BYTE)
    return Speed(matrix_speed(device), memory_speed(device))


def matrix_speed(device: torch.device) -> float:
    """Measure the FLOP/s of a square matrix product; on a GPU a large one, beside which its launch is nothing."""
    size = 8192 if is_gpu(device) else 1024
    one = torch.ones(size, size, dtype=pick_dtype("auto", device), device=device)
    return 2.0 * size**3 / _seconds(device, lambda: one @ one)


def memory_speed(device: torch.device) -> float:
    """Measure the bytes per second of a copy, which reads and writes each byte; too large for any cache."""
    one = torch.ones(2**30 if is_gpu(device) else 2**26, dtype=torch.uint8, device=device)
    other = torch.empty_like(one)
    return 2.0 * one.nbytes / _seconds(device, lambda: other.copy_(one))


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """The shortest of four runs; the first may load a kernel."""
    wait = torch.get_device_module(device).synchronize if is_gpu(device) else lambda: None
    taken = []
    for _ in range(4):
        wait()
        start = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - start)
    return min(taken)
