"""Threads for requests. They are daemons: a server that does not answer must not keep a stopped program alive."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any


class Workers:
    """Up to `num` calls at one time, the others in their order; threads are started as they are needed."""

    def __init__(self, num: int, name: str):
        self.num, self.name = num, name
        self._waiting: SimpleQueue[tuple[Future, Callable[[], Any]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock, self._closed = threading.Lock(), False

    def submit(self, work: Callable[[], Any]) -> Future:
        future: Future = Future()
        with self._lock:
            if self._closed:
                _cancel(future)
                return future
            self._waiting.put((future, work))
            if len(self._threads) < self.num:
                thread = threading.Thread(target=self._run, name=f"{self.name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def close(self) -> None:
        """Nothing that waits is begun any more, nor what comes later: whoever waits for it gets a CancelledError."""
        with self._lock, suppress(Empty):
            self._closed = True
            while True:
                job = self._waiting.get_nowait()
                if job is not None:
                    _cancel(job[0])
        for _ in self._threads:
            self._waiting.put(None)

    def _run(self) -> None:
        while (job := self._waiting.get()) is not None:
            future, work = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  # whoever waits for the result gets it
                future.set_exception(error)
            del future, work, job


def _cancel(future: Future) -> None:
    """Cancel it, and tell those who wait for one of several, who would else wait for ever."""
    future.cancel()
    future.set_running_or_notify_cancel()
