"""The ledger of a run: seconds, FLOPs, tokens and largest memory by phase, of each step and in total.

FLOPs are counted where a model is read, by whoever reads it: a scorer or an engine calls the `Count` that came with its
task. Each process counts its own passes; `Ledger.close_step` is the one place where they are added. A text is counted by
its length: padding, also the batches that only keep one process in step with the others, is not.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from kibitz.types import Rollout

Book = dict[str, dict[str, float]]

Count = Callable[[Any, Sequence[Rollout]], object]
"""Called for each forward pass with the model (anything with `pass_flops`) and the rollouts that it reads."""


def uncounted(model: Any, rollouts: Sequence[Rollout]) -> None:
    """Count nothing: the passes of an evaluation or a check are no part of a method's cost."""


UNITS = ("seconds", "flops", "tokens")

PEAKS = ("peak_bytes", "host_peak_bytes")
"""The largest of these counts, not their sum. The second is the process's own memory beside a GPU."""


class Watch(Protocol):
    """Measures memory; `kibitz.training.memory.Gauge` is one."""

    def reset(self) -> None: ...
    def peaks(self) -> dict[str, float]: ...


class Clock(Protocol):
    """Tells the time; `kibitz.training.memory.DeviceClock` that of a GPU, whose work is still under way when a phase ends."""

    def now(self) -> Any: ...
    def seconds(self, start: Any, end: Any) -> float: ...


class HostClock:
    """The clock of this process."""

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class Ledger:
    """Seconds, FLOPs and largest memory of one step by phase, and of the whole run. Evaluation is not part of a method's
    cost; its memory counts for the run. `metrics` are numbers that a method wants in the step's row."""

    def __init__(self, total: Book | None = None, watch: Watch | None = None, clock: Clock | None = None):
        self.total, self.watch, self.clock = _empty() | (total or {}), watch, clock or HostClock()
        self._phases: list[tuple[str, Any, Any]] = []  # of this step: when each began and ended
        self._under_way: tuple[str, Any, float] | None = None  # the phase, and when it began or went on, by both clocks
        self.step = _empty()
        self.metrics: dict[str, float] = {}
        self.spans: list[tuple[str, float, float]] = []
        """The phases of the step that was closed last: when each began and ended by the machine's clock."""
        self._clocked: list[tuple[str, float, float]] = []
        self._spent: Counter[str] = Counter()  # FLOPs of this process in this step

    def resume(self, total: Book) -> None:
        """Go on from the totals of a checkpoint."""
        self.total = _empty() | total

    def spend(self, phase: str, flops: float) -> None:
        """Enter FLOPs of this process."""
        self._spent[phase] += flops  # pyright: ignore[reportArgumentType]  # a Counter of floats

    def reading(self, phase: str) -> Count:
        """A `Count` that enters passes under this name."""
        return lambda model, rollouts: self.spend(phase, model.pass_flops(rollouts))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """A phase of a step, or one that interrupts it. Its seconds are entered when the step is closed, so that nobody waits for
        a GPU before that."""
        outer = self._go_on(phase)
        if outer is not None:
            self.note_peaks(outer, self.step, self.total)
        with self.watched(phase, self.step, self.total):
            yield
        self._go_on(outer)
        if outer is not None and self.watch is not None:
            self.watch.reset()

    def _go_on(self, phase: str | None) -> str | None:
        """Begin a phase at the end of the one that is under way, whose name is returned."""
        now, clocked, before = self.clock.now(), time.time(), self._under_way
        self._under_way = None if phase is None else (phase, now, clocked)
        if before is None:
            return None
        name, began, clocked_began = before
        self._phases.append((name, began, now))
        self._clocked.append((name, clocked_began, clocked))
        return name

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

    def close_step(self, over_ranks: Callable[[Counter[str]], Mapping[str, float]] = dict) -> Book:
        """The finished step's entries; the next step starts from nothing. `over_ranks` adds the FLOPs of all processes."""
        for phase, start, end in self._phases:
            self.add("seconds", phase, self.clock.seconds(start, end))
        self._phases.clear()
        self.spans, self._clocked = self._clocked, []
        for phase, flops in over_ranks(self._spent).items():
            self.add("flops", phase, flops)
        self._spent.clear()
        self.metrics.clear()
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
