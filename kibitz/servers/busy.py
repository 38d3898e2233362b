"""When servers were at work, and how many bytes their answers took."""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class Busy:
    """Times at which at least one piece of work was under way. Threads may enter it side by side."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        self._lock = threading.Lock()

    @contextmanager
    def working(self) -> Iterator[None]:
        start = time.time()
        try:
            yield
        finally:
            with self._lock:
                self._spans.append((start, time.time()))

    def add(self, spans: Iterable[Sequence[float]]) -> None:
        """Enter times of another process: `[start, end]` of each, as its `take` gave them."""
        with self._lock:
            self._spans += [(start, end) for start, end in spans]

    def take(self) -> list[list[float]]:
        """The times since the last call, `[start, end]` in seconds since 1970; those that touch are one."""
        with self._lock:
            spans, self._spans = self._spans, []
        return merged(spans)


def merged(spans: Iterable[Sequence[float]]) -> list[list[float]]:
    """The times in order; those that touch are one."""
    found: list[list[float]] = []
    for start, end in sorted(map(tuple, spans)):
        if found and start <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([start, end])
    return [[round(start, 3), round(end, 3)] for start, end in found]
