"""Reads a run folder into a `Run`, whatever state the run left it in.

Nothing here is required to exist. What is missing, unreadable or half-written is left out, and `Run.notices` says so
in sentences for the reader of the report.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kibitz.report.shown import NAME, read_shown

Row = dict[str, Any]


@dataclass
class Run:
    """The contents of one run folder. `metrics` has one row a step, `evals` one row a step and split, both in order. `shown`
    is what the run itself wants shown, None where there is no such file."""

    name: str
    recipe: Row = field(default_factory=dict)
    recipe_text: str = ""
    info: Row = field(default_factory=dict)
    metrics: list[Row] = field(default_factory=list)
    evals: list[Row] = field(default_factory=list)
    rollouts: list[Row] = field(default_factory=list)
    alarms: list[Row] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    shown: list[Row] | None = None

    @property
    def last_step(self) -> int:
        return max((int(row["step"]) for row in self.metrics + self.evals), default=0)


def read_run(folder: Path) -> Run:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no run folder at {folder}; a recipe names its run folder under `output`.")
    if not any((folder / name).is_file() for name in ("recipe.yaml", "metrics.jsonl", "evals.jsonl", "rollouts.jsonl")):
        raise FileNotFoundError(f"{folder} holds no run: it has neither recipe.yaml nor metrics.jsonl.")
    run = Run(name=folder.resolve().name)
    run.recipe_text, run.recipe = _read_mapping(folder / "recipe.yaml", yaml.safe_load, run.notices)
    _, run.info = _read_mapping(folder / "run.json", json.loads, run.notices)
    run.metrics = _by_step(_read_jsonl(folder / "metrics.jsonl", run.notices), key=lambda row: row["step"])
    run.evals = _by_step(
        _read_jsonl(folder / "evals.jsonl", run.notices), key=lambda row: (row["step"], str(row.get("split")))
    )
    if (folder / NAME).is_file():
        run.shown = read_shown(folder, run.notices)
    if run.shown is None or (folder / "rollouts.jsonl").is_file():  # a run of policies has no texts to show
        run.rollouts = _read_jsonl(folder / "rollouts.jsonl", run.notices)
    if (folder / "alarms.jsonl").is_file():  # there is none where no guard spoke
        run.alarms = _read_jsonl(folder / "alarms.jsonl", run.notices)
    if run.info.get("status") == "running":
        run.notices.append("The run had not finished when this report was built.")
    return run


def number(value: Any) -> float | None:
    """A finite number, or None for everything else that a log may hold: null, NaN, infinities, text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 and math.isfinite(value) else None


def dig(row: Any, *path: str) -> Any:
    """`row[path[0]][path[1]]...`, or None as soon as a step of the path is missing."""
    for key in path:
        row = row.get(key) if isinstance(row, dict) else None
    return row


def dig_number(row: Any, *path: str) -> float | None:
    return number(dig(row, *path))


def unique_names(runs: list[Run]) -> None:
    """Runs whose folders have the same name are told apart by a number."""
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        if seen[run.name] > 1:
            run.name = f"{run.name} ({seen[run.name]})"


def _by_step(rows: list[Row], key: Callable[[Row], Any]) -> list[Row]:
    """In order of steps. A resumed run logs some steps twice: what was logged last is what was trained on."""
    steps = [row for row in rows if number(row.get("step")) is not None]
    return sorted({key(row): row for row in steps}.values(), key=lambda row: row["step"])


def _read_mapping(path: Path, parse: Callable[[str], Any], notices: list[str]) -> tuple[str, Row]:
    if not path.is_file():
        notices.append(f"{path.name} is missing.")
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        parsed = parse(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        parsed = None
    if not isinstance(parsed, dict):
        notices.append(
            f"{path.name} is empty." if not text.strip() else f"{path.name} cannot be read and was left out."
        )
        return text, {}
    return text, parsed


def _read_jsonl(path: Path, notices: list[str]) -> list[Row]:
    if not path.is_file():
        notices.append(f"{path.name} is missing.")
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [(index, line) for index, line in enumerate(text.split("\n"), start=1) if line.strip()]
    rows, bad = [], []
    for index, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad.append(index)
    if bad and bad[-1] == lines[-1][0]:
        bad.pop()
        notices.append(f"{path.name} ends in a half-written line, which was left out.")
    if bad:
        notices.append(f"{path.name} has {len(bad)} unreadable line(s), first line {bad[0]}; they were left out.")
    if not lines:
        notices.append(f"{path.name} is empty.")
    return rows
