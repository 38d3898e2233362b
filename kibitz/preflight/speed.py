"""How fast a device multiplies and reads: what a plan of hours stands on."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from kibitz.config import Recipe
from kibitz.engines.rounded import bfloat16_gain
from kibitz.models.load import pick_dtype
from kibitz.preflight.finding import Finding
from kibitz.preflight.shapes import Shape
from kibitz.types import is_gpu

FLOPS_PER_BYTE = 200.0
"""FLOP/s in 16-bit matrix products for each byte/s of memory: 156 for an A100, 206 for an H200, 295 for an H100."""
WORTH = 1.5
"""From so many times as fast in bfloat16 as in float32, a processor is said to be faster in it."""
LARGE = 10_000_000
"""Parameters from which on matrix products are most of what a model's forward pass takes."""


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


def rounding(recipe: Recipe, shapes: Sequence[Shape]) -> Iterator[Finding]:
    """Say what bfloat16 would save on this processor, for models that are large enough, the student first among `shapes`; or
    what it costs."""
    try:
        gain = bfloat16_gain()
    except (RuntimeError, AttributeError, NotImplementedError):  # this build of torch has none for a CPU
        return
    student, *teachers = shapes
    large = [shape.section.dtype == "bfloat16" for shape in teachers if _counts(shape)]
    rounded = {"teacher.dtype": all(large)} if large else {}
    if student.section.dtype == "bfloat16":
        rounded["student.dtype"] = True
    elif (is_rounded := recipe.rollout.dtype == "bfloat16") or (_counts(student) and _can_round(recipe)):
        rounded["rollout.dtype"] = is_rounded
    text = f"products in bfloat16 are {gain:.1f} times as fast as in float32 here"
    if gain < 1 and any(rounded.values()):
        names = " and ".join(key for key, is_rounded in rounded.items() if is_rounded)
        yield Finding("bfloat16", "amber", f"{text}: drop {names}", {"gain": gain})
    elif gain >= WORTH and not all(rounded.values()):
        names = " and ".join(f"{key}=bfloat16" for key, is_rounded in rounded.items() if not is_rounded)
        yield Finding("bfloat16", "green", f"{text}: {names} would save time, and round", {"gain": gain})


def _counts(shape: Shape) -> bool:
    return shape.section.dtype == "bfloat16" or shape.num_parameters >= LARGE


def _can_round(recipe: Recipe) -> bool:
    """Return True if the embedded engine writes and the method lets it round."""
    try:
        recipe.method.check(recipe.rollout.model_copy(update={"dtype": "bfloat16"}))
    except ValueError:
        return False
    return recipe.rollout.engine == "torch"


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
