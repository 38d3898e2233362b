"""Grading in a process of its own that can be stopped: some texts take a parser, or a regular expression, ages.

A text that is stopped has not answered. One such text is nothing; a step of hundreds would stand still for minutes, so each
limit falls to a share once many of the last texts had to be stopped.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

START_SECONDS = 120.0
SLACK_SECONDS = 20.0
"""What a machine under load may add to the limit before the whole process counts as hung."""

SCRIPT = Path(__file__).parent / "inside" / "bounded.py"


class Patience:
    """Limits the seconds that one text may take, by how many of the last texts were stopped."""

    LAST, MANY, SHARE = 64, 16, 8

    def __init__(self) -> None:
        self.stopped: deque[bool] = deque(maxlen=self.LAST)

    def seconds(self, most: float) -> float:
        return most if sum(self.stopped) < self.MANY else most / self.SHARE

    def remember(self, stopped: bool) -> None:
        self.stopped.append(stopped)


class Worker:
    """A process that answers one question after another, each within `seconds` of its own CPU time. `bounded.py` says which
    kinds of questions there are. It starts with the first question and ends with this process."""

    def __init__(self, kind: str, seconds: float, environment: Mapping[str, str] | None = None) -> None:
        self.kind, self.most, self.patience = kind, seconds, Patience()
        self.environment = environment  # all of it; this process's own if None
        self.process: subprocess.Popen[bytes] | None = None
        self.owner, self.lock = 0, threading.Lock()

    def ask(self, **question: Any) -> Any:
        """The answer, which is data; None if it did not come in time."""
        seconds = self.patience.seconds(self.most)
        line = json.dumps({**question, "seconds": seconds}).encode()
        with self.lock:
            if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
                self._start()
            reply = self._exchange(line, SLACK_SECONDS + 10 * seconds)
            if reply is None:
                self._stop()
        answer = {"stopped": True} if reply is None else json.loads(reply)
        if "error" in answer:
            raise RuntimeError(f"the grading process failed on {line[:200].decode()}: {answer['error']}")
        self.patience.remember("stopped" in answer)
        return answer.get("value")

    def close(self) -> None:
        """End the process; another question would start one again."""
        with self.lock:
            self._stop()

    def _start(self) -> None:
        if self.owner != os.getpid():  # the process of a parent of this one is not ours to speak to
            self.process, self.owner = None, os.getpid()
            atexit.register(self._stop)
        self._stop()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-X", "utf8", str(SCRIPT), self.kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what libraries log is the student's text, and may hold control characters
            start_new_session=True,
            env=self.environment,
        )
        if self._exchange(b"{}", START_SECONDS) is None:
            self._stop()
            raise RuntimeError(f"the process that grades ({SCRIPT.name} {self.kind}) does not start on this machine")

    def _exchange(self, line: bytes, seconds: float) -> bytes | None:
        """One line out and one line in; None if there is none in time."""
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        reply, deadline = b"", time.monotonic() + seconds
        try:
            self.process.stdin.write(line + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        while not reply.endswith(b"\n"):
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                return None
            if not (block := os.read(self.process.stdout.fileno(), 1 << 16)):
                return None
            reply += block
        return reply

    def _stop(self) -> None:
        if self.process is None or self.owner != os.getpid():
            return
        process, self.process = self.process, None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        with suppress(BrokenPipeError):
            process.communicate()
