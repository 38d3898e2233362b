"""Regular expressions with a limit of time, in a process of their own: some patterns take ages on some texts."""

import atexit
import json
import select
import subprocess
import sys
import threading
from typing import IO

SECONDS = 1.0
START_SECONDS = 30.0
MAX_CHARACTERS = 100_000

_PROGRAM = """
import json, re, sys
for line in sys.stdin:
    pattern, text, whole = json.loads(line)
    find = re.fullmatch if whole else re.search
    print(int(bool(find(pattern, text))), flush=True)
"""


class _Worker:
    """One process that answers one search after another; it is killed over a search that takes too long."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lock = threading.Lock()
        atexit.register(self.stop)

    def ask(self, question: str, seconds: float) -> bool:
        with self.lock:
            if self.process is None:
                self.process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _PROGRAM],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                self._exchange('["", "", false]', START_SECONDS)
            return self._exchange(question, seconds)

    def _exchange(self, question: str, seconds: float) -> bool:
        stdin, stdout = self._pipes()
        stdin.write(question + "\n")
        stdin.flush()
        if not select.select([stdout], [], [], seconds)[0]:
            self.stop()
            return False
        reply = stdout.readline()
        if not reply:
            self.stop()
            raise RuntimeError(f"the process that searches for patterns died over {question[:200]}")
        return reply.strip() == "1"

    def stop(self) -> None:
        if self.process is not None:
            process, self.process = self.process, None
            process.kill()
            process.communicate()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        return self.process.stdin, self.process.stdout


_worker = _Worker()


def matches(pattern: str, text: str, whole: bool = False, seconds: float = SECONDS) -> bool:
    """Whether the pattern is found in the text, or describes the whole of it.

    A text over MAX_CHARACTERS and a search over its time count as no match."""
    if len(text) > MAX_CHARACTERS:
        return False
    return _worker.ask(json.dumps([pattern, text, whole]), seconds)
