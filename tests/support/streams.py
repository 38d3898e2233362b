"""Streams of the pretended device: their work is done at once, and what would be a race on a GPU is an error.

Each stream counts its operations, and knows up to which operation of another one it has waited. Memory remembers who wrote it
last and who has read it since.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Race(RuntimeError):
    """A stream touched memory that another one may still be using."""


class Event:
    """A point in the work of a stream."""

    def __init__(self, stream: "Stream"):
        self.seen = {**stream.knows, stream: stream.time}


class Stream:
    def __init__(self, device: Any = None):
        self.time = 0
        self.knows: dict[Stream, int] = {}

    def wait_event(self, event: Event) -> None:
        for stream, time in event.seen.items():
            self.knows[stream] = max(time, self.knows.get(stream, 0))

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(Event(other))

    def record_event(self) -> Event:
        return Event(self)


class Streams:
    """All streams of the device. `log` is what they did, in order: the stream, and what."""

    def __init__(self) -> None:
        self.current = self.main = Stream()
        self.log: list[tuple[Stream, str]] = []
        self.written: dict[int, tuple[Stream, int]] = {}
        self.read: dict[int, dict[Stream, int]] = {}

    @contextmanager
    def stream(self, one: Stream) -> Iterator[None]:
        before, self.current = self.current, one
        try:
            yield
        finally:
            self.current = before

    def touch(self, reads: list[int], writes: list[int], what: str) -> None:
        """An operation of the current stream on memory by its addresses."""
        own = self.current
        own.time += 1
        self.log.append((own, what))
        for place in (*reads, *writes):
            if place in self.written:
                self._check(own, *self.written[place], "wrote")
        for place in writes:
            for other, time in self.read.get(place, {}).items():
                self._check(own, other, time, "reads")
            self.written[place], self.read[place] = (own, own.time), {}
        for place in reads:
            self.read.setdefault(place, {})[own] = own.time

    def _check(self, own: Stream, other: Stream, time: int, verb: str) -> None:
        if other is not own and own.knows.get(other, 0) < time:
            raise Race(f"the {'computing' if own is self.main else 'copying'} stream did not wait for who {verb} this")
