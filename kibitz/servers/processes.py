"""The processes of servers: started beside a keeper each, waited for, replaced when they die, ended together.

A keeper (`keeper.py`) ends its server whatever becomes of this program. A server that dies is started again at the same
address, so that requests that wait for it find the new one; it holds what it was started with, and a student's server gets the
newest weights before the next request, as after any loss of contact.
"""

import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from kibitz.servers import ServerError, keeper, own
from kibitz.servers.commands import Command
from kibitz.servers.connection import is_loopback
from kibitz.servers.http import Passing, Refused, Server
from kibitz.servers.keys import shown

log = logging.getLogger(__name__)

LOOK = 0.25  # seconds between two looks at a process
LAST_WORDS = 600  # characters of a log that an error repeats
MEMORY = (
    "out of memory",
    "OutOfMemoryError",
    "No available memory for the cache blocks",
    "less than desired GPU memory utilization",
)

Told = Callable[[str], object]


def said_nothing(text: str) -> None:
    """Tell nobody."""


class Hosted:
    """Servers of this program. `start` returns when all of them answer; `close` ends them, and so does the end of the program."""

    def __init__(self, program: Sequence[str], logs: Path, told: Told = said_nothing):
        self.program, self.logs, self.told = tuple(program), logs, told
        self.folder = Path(
            tempfile.mkdtemp(prefix="kibitz-")
        )  # for this user only; a path of a socket may have 108 characters
        self.processes: list[_Process] = []
        self._closing = threading.Event()
        self._watch: threading.Thread | None = None

    def address(self, name: str) -> str:
        """Return the address that a server will have."""
        return f"{own.SCHEME}{self.folder / name}.sock"

    def start(self, commands: Sequence[Command], timeout: float, restarts: int) -> None:
        """Start all at once, and wait until each is ready."""
        try:
            _refuse_other_machines(commands)
            self.logs.mkdir(parents=True, exist_ok=True)
            for command in commands:
                self.processes.append(_Process(command, self.program, self.logs, restarts))
            began = time.monotonic()
            for process in self.processes:
                process.wait(began, timeout, self.told)
        except BaseException:
            self.close()
            raise
        self._watch = threading.Thread(target=self._keep, name="kibitz-servers", daemon=True)
        self._watch.start()

    def close(self) -> None:
        self._closing.set()
        if self._watch is not None:
            self._watch.join()
        for process in self.processes:
            process.hang_up()
        for process in self.processes:
            process.end()
        self.processes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _keep(self) -> None:
        while not self._closing.wait(LOOK):
            for process in self.processes:
                process.look()


def _refuse_other_machines(commands: Sequence[Command]) -> None:
    for url in (command.url for command in commands):
        if own.socket_of(url) is None and not is_loopback(urlsplit(url).hostname or ""):
            raise ValueError(
                f"{url} is not this machine: start its server there, with the command that `kibitz serve` prints"
            )


class _Process:
    """One server and its keeper."""

    def __init__(self, command: Command, program: Sequence[str], logs: Path, restarts: int):
        self.command, self.program, self.left, self.restarts = command, program, restarts, restarts
        self.socket = own.socket_of(command.url)
        self.name = f"the {command.role} that kibitz started ({command.name})"
        self.path = logs / f"{command.name}.log"
        self.key = os.environ.get("KIBITZ_API_KEY", "").strip() if self.socket is None else secrets.token_urlsafe(32)
        self.own = own.Own(self.name, self.key, replace=self.replace)
        self._why: str | None = None
        self._lock = threading.Lock()
        if self.socket is not None:
            own.know(command.url, self.own)
        self.path.write_bytes(b"")
        self.keeper = self._start()

    def _start(self) -> subprocess.Popen:
        kept = [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid()), self.socket or ""]
        environment = {**os.environ, **self.command.environment, **({"VLLM_API_KEY": self.key} if self.key else {})}
        with self.path.open("ab") as log_file:
            return subprocess.Popen(
                [*kept, *self.program, *self.command.arguments],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, began: float, timeout: float, told: Told) -> None:
        server, said = Server(self.command.url, self.command.role, timeout=5.0), 0.0
        try:
            while (seconds := time.monotonic() - began) < timeout:
                if self.keeper.poll() is not None:
                    raise ServerError(f"{self.name} ended before it was ready. {self.last_words()}")
                with suppress(Passing, Refused):
                    server.order("/health")
                    told(f"{self.name} is ready after {seconds:.0f} s")
                    return
                if seconds - said >= 1:
                    said = seconds
                    told(f"starting {self.name}: {seconds:.0f} s, its log is {self.path}")
                time.sleep(LOOK)
        finally:
            server.close()
        raise ServerError(f"{self.name} was not ready after {timeout:g} seconds. {self.last_words()}")

    def look(self) -> None:
        """Start it again if it has ended; after so many times, say so to whoever asks."""
        if self.own.ended is not None or self.keeper.poll() is None:
            return
        self.hang_up()
        with self._lock:
            why, self._why = self._why, None
            self.own.number += 1
        why = why or f"{self.name} ended while it was needed"
        if self.left == 0:
            self.own.ended = f"{why}, {self.restarts + 1} times in this run. {self.last_words()}"
            return
        self.left -= 1
        log.warning("%s; another is started in its place (%d more after that)", why, self.left)
        self.keeper = self._start()

    def replace(self, why: str, number: int) -> None:
        """End a server that does not answer: `look` starts another. Of several requests that it kept some may hear that later,
        when the next server is there."""
        with self._lock:
            if number == self.own.number and self._why is None and self.keeper.poll() is None:
                self._why = why
                self.hang_up()

    def last_words(self) -> str:
        """The end of its log, with what a person can do where that is known."""
        said = self.path.read_bytes()[-16384:].decode(errors="replace")
        lines = [line for line in said.splitlines() if line.strip()]
        advice = (
            " It had too little memory: lower rollout.server.memory or teacher.memory, give it more gpus, or lower "
            "rollout.max_tokens and in_flight."
            if any(sign in said for sign in MEMORY)
            else ""
        )
        errors = [line for line in lines if "Error" in line or "error:" in line]
        quoted = shown(" / ".join(errors[-2:] or lines[-2:]), LAST_WORDS) or "nothing"
        return f"Its log, {self.path}, says: {quoted}.{advice}"

    def hang_up(self) -> None:
        """Close the keeper's input, which it takes as the order to end its server."""
        assert self.keeper.stdin is not None
        with suppress(OSError):
            self.keeper.stdin.close()

    def end(self) -> None:
        try:
            self.keeper.wait(2 * keeper.GRACE)
        except subprocess.TimeoutExpired:
            self.keeper.kill()  # the kernel kills the server with it
            self.keeper.wait()
        own.forget(self.command.url)
