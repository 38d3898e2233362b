"""Sides of a comparison, run in turns, each in a fresh process; their ratios, pair by pair, with spreads; baselines.

A table is a module with `work(**given)`, which a process of its own runs (benchmarks/worker.py), and `main()`, which makes
a `Table`, asks it for measurements and prints. Every answer is written down as it comes, and stands in the file the next
time the same command runs the same code: cut off, it goes on. A ratio is another side's number over ours of the same round,
so above 1 ours is better; seconds are the processor's on one thread and wall seconds on several.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.worker import ANSWER

HERE = Path(__file__).parents[1]
BASELINE = Path(__file__).with_name("baseline.json")
OURS = "kibitz"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class Side:
    """One of what is compared: `module` is asked, by an interpreter, with the kibitz of a checkout."""

    name: str
    module: str
    given: dict[str, Any] = field(default_factory=dict)
    python: Path = Path(sys.executable)
    repo: Path = HERE
    env: dict[str, str] = field(default_factory=dict)
    processes: int = 1
    """Of torchrun; the first that answers is heard."""


@dataclass
class Table:
    """The measurements of one command, as they stand in its file."""

    name: str
    options: argparse.Namespace
    rows: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.head = about(self.options)
        self.path = (self.options.out or default_file(self.name, self.options.tiny)).resolve()
        self.rows = []
        if self.path.exists() and not self.options.fresh:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if same(found["about"], self.head):
                self.rows, self.head = found["rows"], merged(found["about"], self.head)
            else:
                say(f"{self.path} is of other code or another machine, and begins anew")

    def ask(self, case: str, side: Side, number: int, threads: int, **given: Any) -> dict[str, Any]:
        """The row of a side in a round: from the file, or measured now. A side that fails says why in `failed`."""
        for row in self.rows:
            if (row["case"], row["side"], row["round"]) == (case, side.name, number):
                return row
        answer = run(side, threads, {**side.given, **given}, self.options.minutes)
        row = {"case": case, "side": side.name, "round": number, "threads": threads, **answer}
        self.rows.append(row)
        self.write()
        if "failed" in row:
            say(f"{case}, {side.name}: {row['failed']}")
        return row

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        text = json.dumps({"table": self.name, "about": self.head, "rows": self.rows}, indent=1)
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(self.path)

    def alternate(self, case: str, sides: Sequence[Side], threads: int, **given: Any) -> Iterator[int]:
        """Every side once a round, each second round in the opposite order; the numbers of rounds as they are done."""
        for number in range(self.options.rounds):
            for side in sides if number % 2 == 0 else sides[::-1]:
                self.ask(case, side, number, threads, **given)
            yield number

    def of(self, case: str, side: str) -> list[dict[str, Any]]:
        """The rows of a side in the order of rounds, failed ones left out."""
        found = [row for row in self.rows if (row["case"], row["side"]) == (case, side) and "failed" not in row]
        return sorted(found, key=lambda row: row["round"])


# ------------------------------------------------------------------ numbers


@dataclass(frozen=True)
class Spread:
    """The median of ratios, and the smallest and largest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"

    @property
    def width(self) -> float:
        return self.high - self.low


def ratios(table: Table, case: str, other: str, number: Any, ours: str = OURS) -> Spread | None:
    """The other side's number over ours, of each round in which both ran; `number` takes it from a row."""
    mine = {row["round"]: number(row) for row in table.of(case, ours)}
    pairs = [number(row) / mine[row["round"]] for row in table.of(case, other) if mine.get(row["round"])]
    return Spread(median(pairs), min(pairs), max(pairs)) if pairs else None


def middle(rows: Sequence[dict[str, Any]], number: Any) -> float:
    """The median over rounds; NaN of none."""
    return median([number(row) for row in rows]) if rows else float("nan")


# ------------------------------------------------------------------ processes


def run(side: Side, threads: int, given: dict[str, Any], minutes: float) -> dict[str, Any]:
    """What the side's process answers, or {"failed": why}."""
    env = {**os.environ, **dict.fromkeys(THREADS, str(threads))}
    env |= {"PYTHONPATH": str(HERE), "PYTHONSAFEPATH": "1", "KIBITZ_REPO": str(side.repo), "HF_HUB_OFFLINE": "1"}
    env |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env |= side.env
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={side.processes}"]
    command = [
        str(side.python),
        *(several if side.processes > 1 else []),
        "-m",
        "benchmarks.worker",
        side.module,
        json.dumps({**given, "threads": threads}),
    ]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        return {"failed": f"it took longer than {minutes:g} minutes"}
    said = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if done.returncode or not said:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}, nothing said"]
        return {"failed": lines[-1][:300], "stderr": done.stderr[-4000:]}
    return json.loads(said[-1].removeprefix(ANSWER))


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on, so that a file of other code is not gone on with."""
    asked = {name: str(value) for name, value in sorted(vars(options).items()) if name in ASKED}
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commits": {OURS: commit(HERE), **{name: commit(path) for name, path in options.sides.items()}},
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "options": asked,
    }


ASKED = ("rows", "top_k", "vocab", "threads")
"""Options that change what is measured under one name. Others choose what is measured."""


def same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether the rows of a file go on: the same machine and options, and the same code of each side in both."""
    commits = all(before["commits"].get(name, one) == one for name, one in now["commits"].items())
    names = ("processor", "cores", "python", "options")
    return commits and all(before[name] == now[name] for name in names)


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    return {**before, "commits": {**before["commits"], **now["commits"]}}


def commit(repo: Path) -> str:
    """The last commit that changed kibitz/ in a checkout, "-dirty" where files there differ from it; "?" without git."""
    git = ["git", "-C", str(repo)]
    done = subprocess.run([*git, "log", "-1", "--format=%h", "--", "kibitz"], capture_output=True, text=True)
    if done.returncode:
        return "?"
    changed = subprocess.run([*git, "status", "--porcelain", "--", "kibitz"], capture_output=True, text=True)
    return done.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    extra = " ".join(flag for flag in ("avx512f", "avx512_bf16", "amx_tile") if flag in flags)
    return f"{names[0] if names else platform.processor()} ({extra or 'neither AVX512 nor AMX'})"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------ the command line


def parser(module: str, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that all tables have."""
    made = argparse.ArgumentParser(description=module, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tiny", action="store_true", help="one small case, one round: shows that everything runs")
    made.add_argument("--rounds", type=int, default=rounds, help=f"pairs of processes (default {rounds}; --tiny: 1)")
    made.add_argument("--out", type=Path, help="the JSON file (default build/benchmarks/NAME.json)")
    made.add_argument("--fresh", action="store_true", help="measure all of it again")
    made.add_argument("--minutes", type=float, default=20.0, help="the longest that one process may take")
    made.add_argument(
        "--side-repo", action="append", default=[], metavar="NAME=PATH", help="another checkout of kibitz, as a side"
    )
    made.add_argument(
        "--check", action="store_true", help="warn of ratios that are worse than benchmarks/baseline.json"
    )
    made.add_argument("--keep", action="store_true", help="make these ratios the baseline")
    return made


def read(made: argparse.ArgumentParser, given: Sequence[str] | None = None) -> argparse.Namespace:
    options = made.parse_args(given)
    options.sides = {}
    for text in options.side_repo:
        name, _, path = text.partition("=")
        if not path or not (Path(path) / "kibitz").is_dir():
            made.error(f"--side-repo {text}: write NAME=PATH, PATH a checkout of kibitz")
        options.sides[name] = Path(path).resolve()
    if options.tiny:
        options.rounds = 1
    return options


def default_file(name: str, tiny: bool) -> Path:
    return HERE / "build" / "benchmarks" / f"{name}{'-tiny' if tiny else ''}.json"


def heading(table: Table) -> str:
    head = table.head
    commits = ", ".join(f"{name} {one}" for name, one in head["commits"].items())
    return f"{head['processor']}, {head['cores']} cores, {head['date']}; {commits}; {table.options.rounds} rounds"


# ------------------------------------------------------------------ baselines


def settle(table: Table, found: dict[str, Spread]) -> list[str]:
    """Compare ratios with the stored ones, or store them, as the options say; return the warnings, which are printed too."""
    stored = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
    warnings = worse(found, stored.get(table.name, {})) if table.options.check else []
    for text in warnings:
        say(f"warning: {table.name}: {text}")
    if table.options.check and not warnings:
        say(f"{table.name}: no ratio is worse than its baseline by more than the spread")
    if table.options.keep:
        told = {"commit": table.head["commits"][OURS], "processor": table.head["processor"], "date": table.head["date"]}
        kept = {name: {"median": round(s.median, 3), "spread": round(s.width, 3), **told} for name, s in found.items()}
        stored[table.name] = {**stored.get(table.name, {}), **kept}
        BASELINE.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    return warnings


def worse(found: dict[str, Spread], stored: dict[str, dict[str, Any]]) -> list[str]:
    """A sentence for each ratio that fell below its baseline by more than the larger of both spreads."""
    said = []
    for name, now in found.items():
        if (before := stored.get(name)) is None:
            continue
        margin = max(before["spread"], now.width, 0.02 * before["median"])
        if now.median < before["median"] - margin:
            said.append(f"{name} was {before['median']:.2f} (spread {before['spread']:.2f}) and is {now}")
    return said


def lines(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, the first column to the left."""
    widths = [max(len(row[place]) for row in [titles, *rows]) for place in range(len(titles))]

    def line(cells: Sequence[str]) -> str:
        first, *others = [(cell.ljust if place == 0 else cell.rjust)(widths[place]) for place, cell in enumerate(cells)]
        return f"| {' | '.join([first, *others])} |"

    ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(titles), line(ruler), *map(line, rows)])
