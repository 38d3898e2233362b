"""When servers were at work, and how many bytes their answers took."""

import threading
import time
from collections.abc import Iterator
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

    def take(self) -> list[list[float]]:
        """The times since the last call, `[start, end]` in seconds since 1970; those that touch are one."""
        with self._lock:
            spans, self._spans = sorted(self._spans), []
        merged: list[list[float]] = []
        for start, end in spans:
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        return [[round(start, 3), round(end, 3)] for start, end in merged]
