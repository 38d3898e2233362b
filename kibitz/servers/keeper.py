"""A program that keeps one server: `keeper.py PARENT SOCKET COMMAND...`. It ends the server with all its children when its
standard input is closed, when the process PARENT is no longer its parent, or on SIGTERM.

The trainer may die of SIGKILL, of the kernel's want of memory or with its terminal, and then cannot end anything. The kernel
closes its pipes all the same. The keeper has a session of its own, so that Ctrl-C in a terminal does not reach it, and adopts
every process that the server leaves behind, so that an engine that outlives its front end is found and ended, too. If the
keeper itself is killed, the kernel kills the server (Linux). It imports nothing of kibitz, because it starts beside each server.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

SUBREAPER, DEATH_SIGNAL = 36, 1  # of prctl(2)
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
AFTER = 1.0  # seconds that its children have when the server itself has ended
LOOK = 0.25  # seconds between two looks at the parent and the server


def prctl(option: int, value: int) -> None:
    """Ask the kernel; other systems than Linux have no such call, and do without."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def children() -> list[int]:
    """The processes whose parent is this one, those that it has adopted among them."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc") if os.path.isdir("/proc") else []):
        with (
            suppress(OSError, ValueError, IndexError),
            open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file,
        ):
            if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(name))
    return found


def reap(server: int) -> tuple[bool, int | None]:
    """Take the status of all children that have ended: whether any are left, and the server's code if it was among them."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False, code
        if pid == 0:
            return True, code
        if pid == server:
            code = os.waitstatus_to_exitcode(status)


def end(server: int, ended: bool) -> None:
    """End the server's group, and then whatever else has this process as its parent; by force what takes too long. `ended`:
    the server itself has."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(server, signal.SIGTERM)
    left, until = True, time.monotonic() + (AFTER if ended else GRACE)
    while left and time.monotonic() < until:
        left, code = reap(server)
        if code is not None:
            until = min(until, time.monotonic() + AFTER)
        time.sleep(0.05)
    while left:
        for kill, pid in [(os.killpg, server), *((os.kill, pid) for pid in children())]:
            with suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)
        left, _ = reap(server)
        time.sleep(0.05)


def main() -> int:
    parent, path, *command = int(sys.argv[1]), *sys.argv[2:]
    told_to_end = []
    signal.signal(signal.SIGTERM, lambda *_: told_to_end.append(True))
    prctl(SUBREAPER, 1)
    with suppress(FileNotFoundError):
        os.unlink(path)  # of the server before this one; nothing, where it listens at a port
    try:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: prctl(DEATH_SIGNAL, signal.SIGKILL),
        ).pid
    except OSError as error:
        sys.stderr.write(f"{command[0]} cannot be started: {error.strerror}\n")
        return 127
    code = None
    while code is None and not told_to_end and os.getppid() == parent:
        readable, _, _ = select.select([0], [], [], LOOK)
        if readable and not os.read(0, 1):
            break
        _, code = reap(server)
    end(server, ended=code is not None)
    with suppress(FileNotFoundError):
        os.unlink(path)
    if os.getppid() != parent:
        with suppress(OSError):  # the last of them finds the folder empty
            os.rmdir(os.path.dirname(path))
    return code if code is not None and code >= 0 else 1


if __name__ == "__main__":
    sys.exit(main())
