"""What is written down while a run goes: one dict a step into JSONL files, and the ledger of its cost."""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

Book = dict[str, dict[str, float]]
UNITS = ("seconds", "flops", "tokens")
PEAKS = ("peak_bytes", "host_peak_bytes")
"""Of these the largest counts, not the sum. The second is the process's own beside a GPU."""


class Watch(Protocol):
    """What measures memory: see `kibitz.memory`."""

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


class JSONL:
    """A file of one JSON object a line, flushed after each, that a reader can follow."""

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes

    def append(self, row: dict[str, Any]) -> None:
        if not self.writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(row), ensure_ascii=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a line that a crash cut short is left out."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").split("\n"):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def sync(self) -> None:
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def keep(self, last_step: int) -> None:
        """Drop what was written after a step, when a run goes on from there."""
        rows = [row for row in self.read() if row["step"] <= last_step]
        if self.path.exists():
            write_atomically(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_atomically(path: Path, text: str) -> None:
    """The old file or the new one, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def wilson(successes: float, num: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927): it stays inside [0, 1] and is honest near the ends."""
    if num == 0:
        return 0.0, 1.0
    share, spread = successes / num, z * z / num
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(num: int, correct: int, k: int) -> float:
    """Unbiased estimate from `num` samples of which `correct` are right (Chen et al. 2021, 2107.03374, eq. 1)."""
    if num - correct < k:
        return 1.0
    return 1.0 - math.comb(num - correct, k) / math.comb(num, k)
