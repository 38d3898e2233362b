"""One Python program in a process that can do nothing but compute.

Guaranteed on Linux (x86_64, aarch64) with Landlock (kernel 5.13, and allowed by the container) and seccomp, for root
and for others, with no right that an ordinary user lacks:

- one process of one thread: no fork, no other program, no thread; so nothing is left when it is killed, which it is
  at its end, at its limit of time, and when its parent dies
- no sockets, hence no network; no signals to other processes, neither sent nor ordered from the kernel (`fcntl` and
  `ioctl` with F_SETOWN, O_ASYNC and their kin, timers, message queues); no shared memory
- files: reads of Python's standard library and the system's libraries; reads and writes in an empty working
  directory without subdirectories, which is deleted. Nothing can be removed or renamed there, so that all that lies on the
  disk has a name to be counted by. Nothing else can be opened, /proc and /dev/shm included
- wall time, CPU time, address space, bytes a file, output; the directory's bytes and number of files, looked at
  fifty times a second, so that what is written between two looks comes on top
- an environment of four harmless variables; one seed for hashes; no packages but the standard library

Not guaranteed: against defects of the kernel in the system calls that are left, or of CPU caches. What exists can be
asked (names, sizes, dates of files), though not read. The host's name and its load can be read. A correct program that needs
threads or subprocesses, or removes files, fails. Each limit is per process: a program and its tests are two.

Where a layer is missing, programs are refused. KIBITZ_UNSAFE_CODE=1 runs them with the layers there are, under a
warning that names the others: for a machine that holds nothing of worth.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

START_SECONDS = 60.0
"""For the interpreter to start and confine itself; the program's own time begins after that."""

MAX_FILES = 256
SCRIPT = Path(__file__).parent / "inside" / "confined.py"
TICK_MILLISECONDS = 20
UNSAFE = "KIBITZ_UNSAFE_CODE"
FULL = "it filled its working directory"

# -I but for -E, which would ignore the seed for hashes; the environment holds nothing but what `run` puts there.
OPTIONS = ("-P", "-s", "-S", "-B", "-X", "utf8")


@dataclass(frozen=True)
class Limits:
    """The limits of one program. `memory_bytes` is address space, of which Python itself takes about 30 MB."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    folder_bytes: int = 16 << 20
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """The output of a program, and how it was stopped. `stopped` is empty if it left by itself with status 0; `late` means that
    it was stopped at its time limit."""

    output: bytes
    stopped: str = ""
    late: bool = False


def run(job: dict, stdin: bytes, limits: Limits) -> Outcome:
    """Run what `confined.py` understands. RuntimeError where programs cannot be confined."""
    with _started(job, stdin, limits) as (process, folder):
        _wait_until_confined(process)
        return _watch(process, [folder], limits)


def run_tests(program: str, tests: dict, limits: Limits) -> Outcome:
    """Run the job `tests` against a program in a confined process of its own, and return what the tests wrote."""
    ends: list[int] = []
    try:
        ends += os.pipe()
        ends += os.pipe()
        theirs, ours = (ends[0], ends[3]), (ends[2], ends[1])
        with (
            _started({"role": "tests", **tests}, b"", limits, ours) as (process, folder),
            _started({"role": "program", "source": program}, b"", limits, theirs) as (other, other_folder),
        ):
            while ends:
                os.close(ends.pop())  # each process sees the end of the other
            _wait_until_confined(other)
            full = _wait_until_confined(
                process, lambda: _folder_is_full(other_folder, limits)
            )  # the program runs by now
            if full:
                return Outcome(b"", FULL)
            return _watch(process, [folder, other_folder], limits)
    finally:
        while ends:
            os.close(ends.pop())


@contextmanager
def _started(
    job: dict, stdin: bytes, limits: Limits, channel: tuple[int, ...] = ()
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A process that confines itself and does the job, and its working directory; both end with the block."""
    header = json.dumps({**job, "channel": channel, "limits": asdict(limits), "unsafe": _unsafe()}).encode()
    # A file, not a pipe: it needs nobody to fill it, and a program that does not read blocks nobody.
    with tempfile.TemporaryDirectory(prefix="kibitz-") as folder, tempfile.TemporaryFile() as standard_input:
        standard_input.write(b"%010d" % len(header) + header + stdin)
        standard_input.seek(0)
        process = subprocess.Popen(
            [os.path.realpath(sys.executable), *OPTIONS, str(SCRIPT)],
            stdin=standard_input,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
            start_new_session=True,
            pass_fds=channel,
        )
        with process:
            try:
                yield process, folder
            finally:
                _kill(process)


@cache
def check() -> None:
    """RuntimeError where programs cannot be confined."""
    if os.name != "posix":
        raise RuntimeError(
            "the grader `code` runs programs on Linux only: run kibitz there, or take another data.grader"
        )
    run({"source": ""}, b"", Limits())


def _wait_until_confined(process: subprocess.Popen[bytes], enough: Callable[[], bool] = lambda: False) -> bool:
    """Read what the interpreter says before the program begins; it closes its standard error then. Return True, and early, once
    `enough` is true, which is asked fifty times a second."""
    assert process.stderr is not None
    said, deadline = b"", time.monotonic() + START_SECONDS
    while (now := time.monotonic()) < deadline:
        if enough():
            return True
        if _readable(process.stderr.fileno(), min(deadline, now + TICK_MILLISECONDS / 1000)):
            if not (chunk := os.read(process.stderr.fileno(), 4096)):
                break
            said += chunk
    first, _, rest = said.decode(errors="replace").partition(" ")
    if first != "ready":
        raise RuntimeError(
            f"programs cannot be confined on this machine: {said.decode(errors='replace').strip() or 'no answer'}. The grader "
            f"`code` needs Linux 5.13 with Landlock and seccomp, which a container may forbid. Allow them, or write {UNSAFE}=1 "
            "into the environment to run programs without these walls where there is nothing to steal or break"
        )
    if rest:
        warnings.warn(f"{UNSAFE}=1: programs of the student run without {rest}", RuntimeWarning, stacklevel=3)
    return False


def _watch(process: subprocess.Popen[bytes], folders: list[str], limits: Limits) -> Outcome:
    """Collect the output until the program ends or goes over a limit."""
    assert process.stdout is not None
    output, deadline, ended = bytearray(), time.monotonic() + limits.wall_seconds, False
    while time.monotonic() < deadline:
        if any(_folder_is_full(folder, limits) for folder in folders):
            return Outcome(bytes(output), FULL)
        if ended:
            if process.poll() is None:
                time.sleep(0.005)
                continue
            return Outcome(
                bytes(output), "" if process.returncode == 0 else f"it left with status {process.returncode}"
            )
        if _readable(process.stdout.fileno(), min(deadline, time.monotonic() + TICK_MILLISECONDS / 1000)):
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            output += chunk
            ended = not chunk
        if len(output) > limits.output_bytes:
            return Outcome(bytes(output[: limits.output_bytes]), f"it wrote more than {limits.output_bytes} bytes")
    return Outcome(bytes(output), f"it took longer than {limits.wall_seconds} seconds", late=True)


def _readable(file: int, deadline: float) -> bool:
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def _folder_is_full(folder: str, limits: Limits) -> bool:
    num_files = num_bytes = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # deleted since it was listed
                num_bytes += entry.stat(follow_symlinks=False).st_size
            num_files += 1
            if num_files > MAX_FILES or num_bytes > limits.folder_bytes:
                return True
    return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The whole session, since an unconfined program may have children. A confined one has none, so its number is left
    alone once it has been waited for: it may belong to somebody else by then."""
    if process.poll() is None or _unsafe():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _unsafe() -> bool:
    return os.environ.get(UNSAFE) == "1"
