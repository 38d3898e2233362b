"""Files of a run: JSON lines that survive a crash, writing that leaves the old file or the new one, and whose code ran."""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any


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
