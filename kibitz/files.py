"""Files of a run: JSON lines that survive a crash, writing that leaves the old file or the new one, one writer a folder, and what
the folder says of its run: checkpoints, and how each part of it ended."""

import fcntl
import json
import math
import os
import re
import socket
import subprocess
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass
class Lines:
    """The rows of a file of JSON lines, and what of it is none: `damaged` are the numbers of its other lines; `cut_short`
    says whether its last line is one that a crash ended."""

    rows: list[Row] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    cut_short: bool = False
    empty: bool = True


def any_object(row: Row) -> bool:
    return True


def has_step(row: Row) -> bool:
    """Whether a row says of which step it is, as every row of a run's logs does."""
    step = row.get("step")
    return isinstance(step, int | float) and not isinstance(step, bool) and -(2**53) < step < 2**53


def read_lines(path: Path, is_row: Callable[[Row], bool] = any_object) -> Lines:
    """Read a file of JSON objects, one a line, whatever happened to it. A file that is not there has no rows."""
    found = Lines()
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found.empty = False
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and is_row(row):
            found.rows.append(row)
        elif number == len(lines):
            found.cut_short = True
        else:
            found.damaged.append(number)
    return found


def named(numbers: list[int], most: int = 5) -> str:
    """`line 3`, `lines 3 and 5`, `lines 1, 2, 3, 4, 5 and 10 more`."""
    words = [str(number) for number in numbers[:most]]
    words += [f"{len(numbers) - most} more"] if len(numbers) > most else []
    return f"line {words[0]}" if len(words) == 1 else f"lines {', '.join(words[:-1])} and {words[-1]}"


class JSONL:
    """A file of one JSON object a line, flushed after each, that a reader can follow."""

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes

    def append(self, row: Row) -> None:
        if not self.writes:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def read(self) -> list[Row]:
        """All rows with a step. A line that a crash cut short, and one that is damaged, is left out; `damage` names it."""
        return read_lines(self.path, has_step).rows

    def damage(self) -> str | None:
        """What of the file cannot be read, as a sentence; None if all can, or all but a last line that a crash cut short."""
        found = read_lines(self.path, has_step).damaged
        return f"{self.path.name} is damaged in {named(found)}, which cannot be read" if found else None

    def sync(self) -> None:
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def keep(self, last_step: int) -> None:
        """Drop what was written after a step, when a run goes on from there, and what cannot be read."""
        rows = [row for row in self.read() if row["step"] <= last_step]
        if self.path.exists():
            write_atomically(self.path, "".join(map(_line, rows)))


def _line(row: Row) -> str:
    text = json.dumps(_plain(row), ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        text = json.dumps(_plain(row))
    return text + "\n"


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


def commit() -> str | None:
    """The commit of the code that ran, where it is a git checkout."""
    answer = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return answer.stdout.strip() or None


def _plain(value: Any) -> Any:
    """JSON has no NaN: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ------------------------------------------------------------------ one writer a folder

LOCK, RETRIES, PAUSE = "run.lock", 600, 0.05
"""How often, and how many seconds apart, a writer tries whom only those keep off that look: one may have been put to sleep."""


class Lock:
    """The right to write a folder, which one process has at a time (flock). The system takes it back from a process that
    dies, however it does; its file, which stays behind then, holds nobody off."""

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self._close: weakref.finalize | None = None

    def take(self) -> None:
        """Raise BlockingIOError, which says who it is, if somebody else writes the folder. A file system without locks
        keeps nobody off."""
        for left in reversed(range(RETRIES)):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who, looked_at = _who(descriptor), _nobody_writes(descriptor)
                os.close(descriptor)
                if not (looked_at and left):
                    raise BlockingIOError(who) from None
                time.sleep(PAUSE)
                continue
            except OSError:
                pass
            if _is_file(descriptor, self.path):
                break
            os.close(descriptor)  # another one let go of it and took it away meanwhile
        else:
            raise BlockingIOError("another process, which has just let go of it")
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(about).encode())
        self._close = weakref.finalize(self, os.close, descriptor)

    def release(self) -> None:
        if self._close is not None:
            self.path.unlink(missing_ok=True)
            self._close()
            self._close = None


def writer_of(folder: Path) -> str | None:
    """Who writes a folder now: `process 71 on host, since 2026-11-26 02:13:54`. None if nobody does."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        return None if _nobody_writes(descriptor) else _who(descriptor)
    finally:
        os.close(descriptor)


def left_behind(folder: Path) -> bool:
    """Whether a process of this machine wrote the folder and died before it could say so."""
    try:
        about = json.loads((folder / LOCK).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    here = isinstance(about, dict) and about.get("host") == socket.gethostname()
    return here and writer_of(folder) is None


def _nobody_writes(descriptor: int) -> bool:
    """Whether a lock is free, or held by such as only look, which share it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _who(descriptor: int) -> str:
    try:
        about = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {about['pid']:d} on {about['host']:.60}, since {about['since']:.30}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


# ------------------------------------------------------------------ what a run's folder says

CHECKPOINT = re.compile(r"step-\d{6,}")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first; a copy that a person made, such as step-000050.bak, is none. Whether
    their files are sound, `damage` says."""
    named = [
        path for path in (folder / "checkpoints").glob("step-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir()
    ]
    return sorted(named, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step-"))


def written_by(path: Path, other: str) -> str:
    """The refusal of a folder that another process writes."""
    return f"output: {other}, is writing {path}: wait for its end, stop it, or write output=ANOTHER"


def in_words(error: BaseException) -> str:
    """What ended a run, for `run.json`."""
    said = " ".join(str(error).split())[:500]
    if isinstance(error, KeyboardInterrupt):
        return "Ctrl-C, before the step was over"
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def earlier_parts(path: Path, metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ended each earlier part of the run in this folder, and how many seconds it took; of one that died without a
    word, what its last checkpoint or evaluation, or its steps, took up to then."""
    try:
        info = json.loads((path / "run.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        info = {}
    if not isinstance(info, dict) or not info:
        return []
    listed = info.get("parts")
    parts = [
        part
        for part in (listed if isinstance(listed, list) else [])
        if isinstance(part, dict) and _seconds(part.get("seconds")) is not None
    ]
    before = sum(part["seconds"] for part in parts)
    first = info.get("first_step") if isinstance(info.get("first_step"), int) else 0
    steps = [row["seconds"] for row in metrics if row["step"] > first and isinstance(row.get("seconds"), dict)]
    in_steps = sum(_seconds(value) or 0.0 for phases in steps for value in phases.values())
    total, died = _seconds(info.get("seconds")) or 0.0, info.get("status") == "running"
    last = {
        "first_step": first,
        "started": info.get("started"),
        "status": "died" if died else info.get("status"),
        "ended_by": "nobody knows: it died without a word" if died else info.get("ended_by"),
        "seconds": max(total - before, in_steps),
    }
    return [*parts, last]


def _seconds(value: Any) -> float | None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12
    return float(value) if fits else None
