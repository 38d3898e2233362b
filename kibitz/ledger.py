"""The ledger of a run: seconds, FLOPs, tokens and largest memory by phase, of each step and in total."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

Book = dict[str, dict[str, float]]


UNITS = ("seconds", "flops", "tokens")


PEAKS = ("peak_bytes", "host_peak_bytes")

"""Of these the largest counts, not the sum. The second is the process's own beside a GPU."""


class Watch(Protocol):
    """Measures memory; `kibitz.training.memory.Gauge` is one."""

    def reset(self) -> None: ...
    def peaks(self) -> dict[str, float]: ...


class Ledger:
    """Seconds, FLOPs and largest memory of one step by phase, and of the whole run. Evaluation is not part of a method's
    cost; its memory counts for the run."""

    def __init__(self, total: Book | None = None, watch: Watch | None = None):
        self.total, self.watch = _empty() | (total or {}), watch
        self.step = _empty()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        with self.watched(phase, self.step, self.total):
            yield
        self.add("seconds", phase, time.perf_counter() - start)

    @contextmanager
    def watched(self, phase: str, *books: Book) -> Iterator[None]:
        """Memory alone; of the whole run, if no books are named."""
        if self.watch is not None:
            self.watch.reset()
        yield
        self.note_peaks(phase, *books)

    def note_peaks(self, phase: str, *books: Book) -> None:
        found = {} if self.watch is None else self.watch.peaks()
        for book in books or (self.total,):
            for unit, size in found.items():
                book[unit][phase] = max(size, book[unit].get(phase, 0.0))

    def add(self, unit: str, phase: str, amount: float) -> None:
        for book in (self.step, self.total):
            book[unit][phase] = book[unit].get(phase, 0.0) + amount

    def close_step(self) -> Book:
        """The finished step's entries; the next step starts from nothing."""
        closed, self.step = self.step, _empty()
        return closed


def _empty() -> Book:
    return {unit: {} for unit in (*UNITS, *PEAKS)}


def highest(books: Sequence[Book]) -> Book:
    """The largest memory by phase that any process had; units of which nothing is known are left out."""
    found: Book = {}
    for unit in PEAKS:
        for phase, size in (entry for book in books for entry in book[unit].items()):
            found.setdefault(unit, {})[phase] = max(size, found.get(unit, {}).get(phase, 0.0))
    return found
