"""The roof of a machine: what its matrix products and its memory reach, at the shapes that a table uses, in the same run.

On one thread a call is timed by the processor's clock, which other work on the machine does not stop. Products are tried as
torch does them by default and through oneDNN; the faster counts, for a roof does not ask how.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

Clock = Callable[[], float]


def work(
    shapes: Sequence[Sequence[int]], seconds: float = 0.3, threads: int = 1, copies: Sequence[int] = ()
) -> dict[str, Any]:
    """FLOP/s of float32 products (rows, inner, columns) by "MxKxN", and bytes a second of a copy that fits no cache (read and
    written bytes both count); `copies` are the bytes that are read a second where so many are, which a cache may hold."""
    import torch

    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    flops = {
        _name(shape): max(_product(shape, seconds, route, clock) for route in ("ieee", "bf16")) for shape in shapes
    }
    read = {str(size): _reading(size, seconds, clock) for size in copies}
    source = torch.ones(2**26, dtype=torch.uint8)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _best(lambda: target.copy_(source), seconds, clock)
    return {"flops": flops, "bytes": copied, "copies": read, "torch": torch.__version__}


def _reading(size: int, seconds: float, clock: Clock) -> float:
    """Bytes a second of a matrix that is multiplied with one vector: nothing reads weights faster that also uses them."""
    import torch

    rows = max(1, size // 4 // 1024)
    matrix, vector = torch.ones(rows, 1024), torch.ones(1024)
    return matrix.nbytes / _best(lambda: matrix @ vector, seconds, clock)


def _name(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)


def _product(shape: Sequence[int], seconds: float, route: str, clock: Clock) -> float:
    """FLOP/s of a linear layer's product. The route "bf16" lets torch take oneDNN for float32; where that rounds, it does not
    count."""
    import torch

    rows, inner, columns = shape
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with torch.no_grad():
        exact = torch.nn.functional.linear(x, weight)
        torch.backends.mkldnn.matmul.fp32_precision = route
        try:
            if (torch.nn.functional.linear(x, weight) - exact).abs().max() > 1e-4 * inner**0.5:
                return 0.0
            taken = _best(lambda: torch.nn.functional.linear(x, weight), seconds, clock)
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = before
    return 2.0 * rows * inner * columns / taken


LEAST = 1e-3
"""Seconds that are timed at one time: a processor's clock may tick a few times in one of them, and not in a shorter call."""


def _best(run: Callable[[], object], seconds: float, clock: Clock) -> float:
    """The seconds of the shortest call in about so many seconds, the first not counted; short ones are timed together."""
    run()
    taken, calls, end = [], 1, time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        start = clock()
        for _ in range(calls):
            run()
        spent = clock() - start
        if spent < LEAST:
            calls *= 2
        else:
            taken.append(spent / calls)
    return min(taken)
