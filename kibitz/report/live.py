"""A run that may still go on, as the page of `kibitz watch` shows it: its pulse, its phases, and what is new of its curves."""

import json
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from kibitz.config import plain_yaml
from kibitz.report import costs, formats, summary
from kibitz.report.curves import CHARTS, Line, main_split
from kibitz.report.folder import Row, Run, dig, dig_number
from kibitz.report.tail import Rows, Tail, newest, parsed, stamp

RECENT = 20
"""Steps over which the speed of now is taken."""
SILENCE = 60.0
"""Seconds without a written file after which a run is called silent, or ten of its steps, whichever is longer."""
MOST_ALARMS = 50
MOST = 1e300
"""A sum that a broken file brings beyond what JSON can say stays here."""
KEPT = ("step", "seconds", "flops", "num_tokens")
METRICS = tuple(dict.fromkeys((*KEPT, *(line.path[0] for c in CHARTS for line in c.lines if line.source == "metrics"))))
LINES = {f"{chart.key}/{place}": line for chart in CHARTS for place, line in enumerate(chart.lines)}
WAITS = {
    "Student writes": "the teacher waits",
    "Teacher scores": "the student waits",
    "Reference scores": "the student waits",
    "Opponent learns": "the student waits",
    "Teacher writes": "the student waits",
    "Student learns": "the teacher waits",
}


def _taken(row: Row) -> Row:
    """What is shown of a row of metrics."""
    return {key: row[key] for key in METRICS if key in row}


@dataclass
class Sums:
    """The sums over the steps of a run up to each of them, which grow with it: of its FLOPs, seconds and tokens."""

    version: int = 0
    steps: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)

    def follow(self, rows: Rows) -> None:
        if rows.version != self.version:
            self.version = rows.version
            for column in (self.steps, self.flops, self.seconds, self.tokens):
                column.clear()
        for row in rows.rows[len(self.steps) :]:
            self.steps.append(row["step"])
            for column, value in (
                (self.flops, _sum(row.get("flops"))),
                (self.seconds, _sum(row.get("seconds"))),
                (self.tokens, dig_number(row, "num_tokens") or 0.0),
            ):
                column.append(min(MOST, (column[-1] if column else 0.0) + value))

    def until(self, column: list[float], step: float) -> float:
        """The sum up to a step."""
        place = bisect_right(self.steps, step)
        return column[place - 1] if place else 0.0


def _sum(parts: Any) -> float:
    return sum(dig_number(parts, name) or 0.0 for name in parts) if isinstance(parts, dict) else 0.0


@dataclass
class Followed:
    """A run folder that is read again and again; `run` is what it holds, without the rollouts."""

    folder: Path
    run: Run = field(init=False)
    metrics: Rows = field(init=False)
    evals: Rows = field(init=False)
    alarms: Tail = field(init=False)
    sums: Sums = field(default_factory=Sums)
    stamps: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run = Run(name=self.folder.resolve().name)
        self.metrics = Rows(Tail(self.folder / "metrics.jsonl"), _taken)
        self.evals = Rows(Tail(self.folder / "evals.jsonl"), lambda row: row)
        self.alarms = Tail(self.folder / "alarms.jsonl")
        self.run.metrics, self.run.evals = self.metrics.rows, self.evals.rows

    @property
    def is_there(self) -> bool:
        return bool(self.run.recipe or self.run.metrics or self.run.evals)

    @property
    def version(self) -> int:
        """Rises when something that was sent to a page is not true any more."""
        return self.metrics.version + self.evals.version

    def look(self) -> None:
        """Read what is new."""
        if self._changed("recipe.yaml"):
            self.run.recipe_text, self.run.recipe = _mapping(self.folder / "recipe.yaml", _yaml)
        if self._changed("run.json"):
            _, self.run.info = _mapping(self.folder / "run.json", lambda text: parsed(text.encode()))
        self.metrics.look()
        self.evals.look()
        self.sums.follow(self.metrics)
        found = [row for line in self.alarms.lines(self.run.alarms.clear) if (row := parsed(line)) is not None]
        self.run.alarms[:] = [*self.run.alarms, *found][-MOST_ALARMS:]

    def _changed(self, name: str) -> bool:
        found = stamp(self.folder / name)
        changed = found != self.stamps.get(name)
        self.stamps[name] = found
        return changed


def _yaml(text: str) -> Any:
    try:
        return plain_yaml.parse(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def _mapping(path: Path, parse: Callable[[str], Any]) -> tuple[str, Row]:
    """The text of a file, and what it says; nothing of one that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", {}
    found = parse(text)
    return text, found if isinstance(found, dict) else {}


# ------------------------------------------------------------------ how it goes


@dataclass
class Pulse:
    """How a run goes: `state` is waiting, running, silent, stopped or finished; `share` of its steps are done."""

    state: str
    words: str
    share: float = 0.0
    step: int = 0
    left: float | None = None


def pulse(followed: Followed, price: float | None = None, now: float | None = None) -> Pulse:
    """The state of a run, in words. `price` is that of one hour of its machine."""
    run, now = followed.run, time.time() if now is None else now
    if not followed.is_there:
        return Pulse("waiting", "There is no run in this folder yet.")
    steps, done = dig_number(run.recipe, "steps") or 0.0, run.last_step
    share = min(1.0, done / steps) if steps else 0.0
    spent, left = _wall(followed), _time_left(followed, steps - done)
    parts = [f"step {done:,} of {steps:,.0f}" if steps else f"step {done:,}"]
    status = str(run.info.get("status") or "running")
    if status != "running":
        state = "finished" if status == "finished" else "stopped"
        parts = [state, *parts, f"took {formats.seconds(spent)}" if spent else "", _money(price, spent, None)]
    else:
        quiet = now - (newest(followed.folder) or now)
        state = "silent" if quiet > max(SILENCE, 10 * (_step_seconds(run) or 0.0)) else "running"
        if state == "silent":
            minutes = round(quiet // 60)  # not the seconds: the page is told what changes
            words = f"no sign of life for {minutes} min" if minutes < 120 else f"no sign of life for {minutes // 60} h"
            parts = [words, *parts, "if it was killed, kibitz train RECIPE --resume goes on with it"]
        else:
            parts = [state, *parts, f"{formats.seconds(left)} left" if left else "", _money(price, spent, left)]
    text = " · ".join(part for part in parts if part)
    return Pulse(state, text[:1].upper() + text[1:], share, done, left)


def _money(price: float | None, spent: float | None, left: float | None) -> str:
    if price is None or spent is None:
        return ""
    so_far = f"{spent / 3600 * price:,.2f} spent"
    return so_far if left is None else f"{so_far}, about {left / 3600 * price:,.2f} to come"


def _step_seconds(run: Run) -> float | None:
    """The median time of the latest steps."""
    recent = [total for row in run.metrics[-RECENT:] if (total := _sum(row.get("seconds")))]
    return median(recent) if recent else None


def _overhead(followed: Followed) -> float:
    """By how much a run takes longer than its steps, for loading, evaluating and saving: since it was last taken up."""
    run, sums = followed.run, followed.sums
    inside = sum(sums.seconds[-1:]) - sums.until(sums.seconds, dig_number(run.info, "first_step") or 0.0)
    began, written = formats.moment(run.info.get("started")), stamp(followed.folder / "metrics.jsonl")
    if not inside or began is None or written is None:
        return 1.0
    return max(1.0, (written[0] / 1e9 - began) / inside)


def _time_left(followed: Followed, steps: float) -> float | None:
    """Seconds, at the speed of now and with as much beside the steps as until now."""
    each = _step_seconds(followed.run)
    return None if each is None or steps <= 0 else min(MOST, each * steps * _overhead(followed))


def _wall(followed: Followed) -> float | None:
    """Seconds of the machine so far: as the run says at its end; before that its steps, and what came between them."""
    told = dig_number(followed.run.info, "seconds")
    if told is not None and not dig_number(followed.run.info, "first_step"):
        return told
    inside = sum(followed.sums.seconds[-1:])
    return min(MOST, inside * _overhead(followed)) if inside else None


# ------------------------------------------------------------------ what a page is sent


def points(followed: Followed, since: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """What is new of each line of the charts, behind so many rows of metrics and of evals that a page has."""
    found, run, sums = {}, followed.run, followed.sums
    split, counted = main_split(run), sum(sums.flops[-1:]) > 0
    for key, line in LINES.items():
        rows = run.metrics[since[0] :] if line.source == "metrics" else run.evals[since[1] :]
        kept = [
            row
            for row in rows
            if dig_number(row, *line.path) is not None and (line.source == "metrics" or row.get("split") == split)
        ]
        if kept:
            steps = [row["step"] for row in kept]
            spent = [sums.until(sums.flops, step) for step in steps] if counted else None
            found[key] = {"step": steps, "flops": spent, "y": _column(kept, line.path), **_edges(kept, line)}
    return found


def _column(rows: list[Row], path: tuple[str, ...]) -> list[float | None]:
    values = (dig_number(row, *path) for row in rows)
    return [None if value is None else float(f"{value:.5g}") for value in values]


def _edges(rows: list[Row], line: Line) -> dict[str, list[float | None]]:
    return {"low": _column(rows, line.low), "high": _column(rows, line.high)} if line.low else {}


def card(followed: Followed, price: float | None = None) -> dict[str, Any]:
    """What the template of one run's card says: how it goes, what was found, which guards spoke, where the time goes."""
    run = followed.run
    return {
        "name": formats.safe_lines(run.name),
        "method": summary.title(run) if run.recipe else "",
        "pulse": pulse(followed, price),
        "sentences": summary.sentences(run)[:1] if run.recipe else [],
        "facts": _facts(followed),
        "alarms": [_alarm(alarm) for alarm in reversed(run.alarms)],
        "phases": phases(run),
    }


def _alarm(alarm: Row) -> dict[str, str]:
    said = {key: formats.safe_lines(str(alarm.get(key) or "")) for key in ("step", "name", "symptom", "remedy")}
    return said | {"remedy": said["remedy"][:1].upper() + said["remedy"][1:]}


def _facts(followed: Followed) -> list[tuple[str, str, str]]:
    run = followed.run
    found = summary.facts(Run(name="", evals=run.evals))
    if not any(label.startswith("Reverse KL") for label, *_ in found) and run.metrics:
        first, last = (dig_number(run.metrics[place], "reverse_kl") for place in (0, -1))
        if last is not None:
            found.insert(0, ("Reverse KL", formats.plain(last), f"was {formats.plain(first)}"))
    if tokens := sum(followed.sums.tokens[-1:]):
        found.append(("Tokens learnt from", formats.count(tokens), f"in {len(run.metrics):,} steps"))
    speed = [value for row in run.metrics[-RECENT:] if (value := dig_number(row, "tokens_per_second")) is not None]
    if speed:
        found.append(("Speed", formats.plain(fmean(speed)), "tokens per second"))
    return found


def phases(run: Run) -> list[dict[str, Any]]:
    """Of the latest steps: each phase, its share of the time, its seconds in words, and who waits meanwhile."""
    recent, found = Run(name="", metrics=run.metrics[-RECENT:]), {}
    for number, phase in enumerate(costs.PHASES):
        seconds = costs.spent(recent, phase)[1]
        if seconds and phase.seconds not in found:  # of several in one place the first stands for all
            found[phase.seconds] = (number, phase.label, seconds)
    whole = sum(seconds for *_, seconds in found.values())
    return [
        {
            "number": number,  # of its colour, that of the report
            "label": label,
            "share": seconds / whole,
            "words": f"{formats.seconds(seconds / len(recent.metrics))} a step",
            "waits": WAITS[label] if dig(run.recipe, "teacher") else "",
        }
        for number, label, seconds in found.values()
    ]


def as_json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
