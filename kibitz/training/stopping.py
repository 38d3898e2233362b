"""Signals that ask a run to stop: the step ends, the run saves, and only then does it."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any


class BetweenSteps:
    """Ctrl-C, SIGTERM or SIGHUP lets the step end and saves; a second Ctrl-C stops at once. A second one of the others
    changes nothing: schedulers send several, and kill by other means. Under nohup SIGHUP is nothing to stop for.

    `number` is that of the signal that came, 0 before; `note` tells the person."""

    def __init__(self, note: Callable[[str], None]):
        self.number, self.note = 0, note
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            numbers += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
            self.previous = {number: signal.signal(number, self._stop) for number in numbers}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            _leave_the_terminal()
        if self.number:
            if number == signal.SIGINT:
                raise KeyboardInterrupt(number)
            return
        self.number = number
        self.note("stopping after this step; press Ctrl-C again to stop at once")


def _leave_the_terminal() -> None:
    """Print into nothing from now on, if the terminal is gone: a write to it would end the run before it is saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(nowhere, descriptor)
    os.close(nowhere)
