"""Follows the files of a run while they grow: reads what is new, nothing twice, and never a whole file into memory."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kibitz.report import heatmap
from kibitz.report.folder import Row, dig_number, number
from kibitz.report.formats import safe_lines

LONGEST_LINE = 2**25
"""Bytes. A longer line is no row of a run, and is left out."""
SEAM = 256
STEP = re.compile(rb'\{"step": (\d+)[,}]')


def parsed(line: bytes) -> Row | None:
    """A line as a row; None if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


@dataclass
class Tail:
    """The end of one file of JSON lines. That it is still the same file is told by the bytes before the place where reading
    stopped, so that a copy of a folder can be followed as well as the folder."""

    path: Path
    offset: int = 0
    seam: bytes = b""

    def lines(self, forget: Callable[[], object]) -> Iterator[bytes]:
        """The whole lines that are new. If the file is another one than before, `forget` is called first, and they are all
        that it has. A half-written line waits for its end."""
        try:
            file = self.path.open("rb")
        except OSError:
            if self.offset:
                self._restart(forget)
            return
        with file:
            file.seek(self.offset - len(self.seam))
            if file.read(len(self.seam)) != self.seam:
                self._restart(forget)
            file.seek(self.offset)
            while line := file.readline(LONGEST_LINE):
                if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                    return
                self.offset, self.seam = self.offset + len(line), line[-SEAM:]
                yield line

    def _restart(self, forget: Callable[[], object]) -> None:
        self.offset, self.seam = 0, b""
        forget()


@dataclass
class Rows:
    """The rows of a growing file, in the order of their steps. `version` rises when rows that were there are gone; where it
    stays, there are only more. `take` shortens a row to what is looked at."""

    tail: Tail
    take: Callable[[Row], Row]
    rows: list[Row] = field(default_factory=list)
    version: int = 0

    def look(self) -> None:
        for line in self.tail.lines(self._forget):
            row = parsed(line)
            if row is not None and number(row.get("step")) is not None:
                self._add(self.take(row))

    def _forget(self) -> None:
        self.rows.clear()
        self.version += 1

    def _add(self, row: Row) -> None:
        """A resumed run logs some steps twice: what is logged last is what was trained on."""

        def behind(old: Row) -> bool:
            return old["step"] > row["step"] or (old["step"] == row["step"] and old.get("split") == row.get("split"))

        if self.rows and behind(self.rows[-1]):
            self.rows[:] = [old for old in self.rows if not behind(old)]
            self.version += 1
        self.rows.append(row)


# ------------------------------------------------------------------ rollouts


@dataclass
class Island:
    """What the heat-map's script reads of several runs, as JSON that is written pair by pair: only one pair's rollouts are in
    memory at a time, and no more than `max_tokens` tokens go to the page."""

    max_tokens: int
    strings: dict[str, int] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    left_out: int = 0
    graded: bool = False
    judged: bool = False
    paired: bool = False

    def add(self, name: str, path: Path) -> None:
        """The rollouts of the first and of the latest step of a file, prompt by prompt."""
        found, room = heatmap.pairs(list(_outlines(path))), self.max_tokens
        texts: list[str] = []
        for place, outline in enumerate(found):
            room -= sum(side["num_tokens"] for side in outline.sides)
            if texts and room < 0:
                self.left_out += len(found) - place
                break
            sides = [row for side in outline.sides if (row := _row_at(path, side["at"])) is not None]
            if sides:
                texts.append(self._write(heatmap.Pair(outline.prompt, outline.answer, sides)))
        self.runs.append(f'{{"name":{json.dumps(safe_lines(name))},"pairs":[{",".join(texts)}]}}')

    def _write(self, pair: heatmap.Pair) -> str:
        self.paired |= len(pair.sides) > 1
        self.graded |= any(heatmap.is_right(side) is not None for side in pair.sides)
        self.judged |= any(heatmap.penalty(token) is not None for side in pair.sides for token in heatmap.tokens(side))
        return _json(heatmap.for_page(pair, lambda text: heatmap.interned(self.strings, text)))

    def as_json(self) -> str:
        flags = {"leftOut": self.left_out, "graded": self.graded, "judged": self.judged, "paired": self.paired}
        parts = {"levels": _json(heatmap.levels()), "strings": _json(list(self.strings)), "flags": _json(flags)}
        inner = ",".join(f'"{name}":{text}' for name, text in parts.items())
        return f'{{{inner},"runs":[{",".join(self.runs)}]}}'


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _outlines(path: Path) -> Iterator[Row]:
    """Of each rollout of the first and of the latest step what groups it with others, its place in the file, its length."""
    places = list(_places(path))
    ends = {min((step for step, _ in places), default=0.0), max((step for step, _ in places), default=0.0)}
    for step, at in places:
        row = _row_at(path, at) if step in ends else None
        if row is not None:
            kept = {key: row.get(key) for key in ("prompt", "prompt_key", "answer", "reward")}
            yield {**kept, "step": step, "at": at, "num_tokens": len(heatmap.tokens(row))}


def _places(path: Path) -> Iterator[tuple[float, int]]:
    """The step of each whole line, and where it begins. Most lines say it first, and are not parsed for it."""
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        at = 0
        while line := file.readline(LONGEST_LINE):
            step = float(found[1]) if (found := STEP.match(line)) else dig_number(parsed(line), "step")
            if line.endswith(b"\n") and step is not None:
                yield step, at
            at += len(line)


def _row_at(path: Path, at: int) -> Row | None:
    """The row that begins there; None if the file was replaced meanwhile and none does."""
    try:
        with path.open("rb") as file:
            file.seek(at)
            return parsed(file.readline(LONGEST_LINE))
    except OSError:
        return None


# ------------------------------------------------------------------ a whole run


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes when a file does: of a file that is replaced whole, whether there is something to read."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def newest(folder: Path) -> float | None:
    """The last sign of life of a run: when any of its files was written, in seconds since 1970."""
    names = ("run.json", "recipe.yaml", "metrics.jsonl", "evals.jsonl", "rollouts.jsonl", "alarms.jsonl", "checkpoints")
    return max((found[0] / 1e9 for name in names if (found := stamp(folder / name))), default=None)
