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

from kibitz.config import plain_yaml
from kibitz.files import Row, has_step, left_behind, named, read_lines, writer_of
from kibitz.report.shown import NAME, read_shown


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
    run.recipe_text, run.recipe = _read_mapping(folder / "recipe.yaml", plain_yaml.parse, run.notices)
    _, run.info = _read_mapping(folder / "run.json", json.loads, run.notices)
    if (folder / NAME).is_file():
        run.shown = read_shown(folder, run.notices)
    unasked = not _evaluates(run.recipe) or run.shown is not None  # a run of policies has no texts to show
    run.metrics = _by_step(_read_log(folder / "metrics.jsonl", run.notices), key=lambda row: row["step"])
    evals = _read_log(folder / "evals.jsonl", run.notices, unasked)
    run.evals = _by_step(evals, key=lambda row: (row["step"], str(row.get("split"))))
    run.rollouts = _read_log(
        folder / "rollouts.jsonl", run.notices, unasked or dig(run.recipe, "eval", "heatmaps") == 0
    )
    run.alarms = _read_log(
        folder / "alarms.jsonl", run.notices, may_be_absent=True
    )  # there is none where no guard spoke
    run.notices += _how_it_ended(folder, run)
    return run


def _evaluates(recipe: Row) -> bool:
    """Whether a run looks at its student, on prompts of its own, those of a world, or some that it trains on."""
    return bool(dig(recipe, "eval", "prompts") or dig(recipe, "data", "world")) or dig(recipe, "eval", "heatmaps") != 0


def _how_it_ended(folder: Path, run: Run) -> list[str]:
    """What a reader should know of the end of a run, unless it is that all steps are done."""
    status, ended_by, at = run.info.get("status"), run.info.get("ended_by"), f"step {run.last_step}"
    if status == "running" and (who := writer_of(folder)) is not None:
        return [f"The run goes on: {who} writes it, and {at} is the last on record."]
    if status == "running" and left_behind(folder):
        run.info["status"] = "died"
        return [
            f"The run died without a word after {at}: it was killed, or its machine failed. Continue it with --resume."
        ]
    if status == "running":
        return ["The run had not finished when this report was built."]
    return [f"The run {status} after {at}: {ended_by}."] if status in ("failed", "stopped") and ended_by else []


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


def _read_log(path: Path, notices: list[str], may_be_absent: bool = False) -> list[Row]:
    if not path.is_file():
        if not may_be_absent:
            notices.append(f"{path.name} is missing.")
        return []
    found = read_lines(path, has_step)
    if found.damaged:
        notices.append(f"{path.name} cannot be read in {named(found.damaged)}; what stood there was left out.")
    if found.cut_short:
        notices.append(f"{path.name} ends in a half-written line, which was left out.")
    if found.empty and not may_be_absent:
        notices.append(f"{path.name} is empty.")
    return found.rows
