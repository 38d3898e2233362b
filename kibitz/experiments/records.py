"""The results as files: one JSON for each run. Tables and plots are made from these alone."""

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isinf
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch

from kibitz import __version__, config
from kibitz.evaluate.statistics import t_quantile
from kibitz.experiments.design import Experiment
from kibitz.experiments.statistics import cost_at, part_way
from kibitz.files import JSONL, commit, write_atomically

if TYPE_CHECKING:
    from kibitz.training.trainer import Run

Record = dict[str, Any]
PROBE = "probe"
"""The name of the files, `probe-SEED.json`, of what is no run."""


def name_of(arm: str, rate: float, seed: int) -> str:
    return f"{arm}-{rate:g}-{seed}"


def read(path: Path) -> Record | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """JSON lines, as prompts are read from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def made_with(record: Record) -> Record:
    """The settings of a run, with its recipe as the same one is written down today."""
    settings = record["settings"]
    try:
        recipe = config.load(settings["recipe"])
    except config.RecipeError:  # of an older version, that is no recipe any more
        return settings
    return settings | {"recipe": recipe.model_dump(mode="json", exclude_unset=True)}


def read_all(folder: Path) -> list[Record]:
    """Return the records of an experiment's runs, in the order of their names. Models that were only measured are left out."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [record for record in found if "arm" in record]


def probes(folder: Path) -> list[Record]:
    """Return the probes' records, one for each seed, from `probe-SEED.json` or, in older folders, `seed-SEED.json`."""
    paths = sorted(folder.glob(f"{PROBE}-*.json")) or sorted(folder.glob("seed-*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def score(record: Record, judge: Sequence[str] = ()) -> float:
    """Return the score by which a rate is chosen: accuracy at temperature 1 on the dev split or, without answers, the negative
    reverse KL to the teacher in nats. It is the mean over the measures in `judge`; the main measure if empty."""
    found = [measure(record["dev"], name) for name in judge or ("",)]
    return fmean(row["sampled"]["accuracy"] if "sampled" in row else -row["reverse_kl"] for row in found)


def measure(row: Record, name: str = "") -> Record:
    """One measure of an evaluation, the main one if none of the others has the name."""
    return row.get("measures", {}).get(name, row)


def played(folder: Path) -> list[Record]:
    """Return the records of policies that played in environments, in the order of their names."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [record for record in found if "policy" in record]


def told(row: Record) -> str:
    """An evaluation in a few words."""
    return ", ".join([_figure(row), *(f"{name} {_figure(other)}" for name, other in row.get("measures", {}).items())])


def _figure(row: Record) -> str:
    return f"{100 * row['sampled']['accuracy']:.1f}%" if "sampled" in row else f"reverse KL {row['reverse_kl']:.4f}"


Key = Callable[[Sequence[Record]], tuple[float, ...]]


def chooser(experiment: Experiment, folder: Path) -> Key:
    """Return the key by which a rate or batch is chosen, the larger the better; it takes the runs of all seeds. The key is their
    mean score on the dev split. With a target (`until`), runs whose mean reaches it come first, those with fewest FLOPs ahead."""
    judges = {arm.name: arm.judge for arm in experiment.arms}
    levels = [read(folder / f"{role}.json") for role in ("student", "teacher")]

    def key(runs: Sequence[Record]) -> tuple[float, ...]:
        found = fmean(score(run, judges.get(run["arm"], ())) for run in runs)
        if experiment.until is None or None in levels or any("curve" not in run for run in runs):
            return (found,)
        cost = cost_at(flops_curve(runs), target(runs[0]))
        return (0.0, found) if isinf(cost) else (1.0, -cost)

    def target(record: Record) -> float:
        name = record["settings"].get("measured", [""])[0]
        student, teacher = (measure(level["test"], name)["sampled"]["accuracy"] for level in levels if level)
        return part_way(student, teacher, experiment.until or 0.0)

    return key


def flops_curve(runs: Sequence[Record]) -> list[tuple[float, float]]:
    """FLOPs and accuracy on the dev split at each point of the curves, means of the runs."""
    return [
        (
            fmean(sum(point["flops"].values()) for point in points),
            fmean(point["dev"]["sampled"]["accuracy"] for point in points),
        )
        for points in zip(*(run["curve"] for run in runs), strict=True)
    ]


def best_rate(sweep: Mapping[float, Record], key: Key | None = None) -> float:
    """The rate of the best run, by its score if nothing else is said; of equal ones the lowest."""
    return max(sorted(sweep), key=lambda rate: (key or (lambda runs: (score(runs[0]),)))([sweep[rate]]))


def sweeps(records: Iterable[Record]) -> dict[str, dict[float, Record]]:
    """arm -> rate -> its run with seed 0."""
    found: dict[str, dict[float, Record]] = {}
    for record in records:
        if record["seed"] == 0:
            found.setdefault(record["arm"], {})[record["lr"]] = record
    return found


def finals(experiment: Experiment, folder: Path) -> dict[str, list[Record]]:
    """arm -> its runs at the best rate that were measured on the test split, in the experiment's order."""
    records = read_all(folder)
    found = {}
    key = chooser(experiment, folder)
    for arm, sweep in sweeps(records).items():
        rate = best_rate(sweep, key)
        found[arm] = [r for r in records if r["arm"] == arm and r["lr"] == rate and "test" in r]
    return {arm.name: found[arm.name] for arm in experiment.arms if found.get(arm.name)}


def share_with_interval(shares: list[float], num_problems: int) -> tuple[float, float]:
    """Mean over seeds of a share of problems, and half its 95% interval: Student's t over seeds and the normal one over
    problems, added in quadrature. All seeds meet the same problems, so each counts once, not once a seed."""
    mean = fmean(shares)
    return mean, (half_of_seeds(shares) ** 2 + 1.96**2 * mean * (1 - mean) / num_problems) ** 0.5


def half_of_seeds(values: list[float]) -> float:
    """Half the 95% interval of a mean over seeds; 0 if there is one only, which says nothing."""
    if len(values) < 2:
        return 0.0
    return t_quantile(len(values) - 1) * stdev(values) / len(values) ** 0.5


def about_the_run(run: "Run", cpu_seconds: float, series: Sequence[str] = ()) -> Record:
    """Return the provenance of a run (code, versions, machine, date) and its costs."""
    info = read(run.folder / "run.json") or {}
    found = {
        "commit": info.get("commit"),
        "version": info.get("version"),
        "torch": info.get("torch"),
        "machine": _machine(str(info.get("machine")), str(info.get("device"))),
        "threads": info.get("threads"),
        "student_params": info.get("student_params"),
        "teacher_params": info.get("teacher_params"),
        "date": info.get("finished"),
        "cpu_seconds": round(cpu_seconds, 2),
        **costs_until(run.metrics, run.metrics[-1]["step"]),
        "teacher_written": fmean(row["teacher_written"] for row in run.metrics),
        "alarms": sorted({row["name"] for row in JSONL(run.folder / "alarms.jsonl").read()}),
    }
    kept = {name: [row[name] for row in run.metrics] for name in series if all(name in row for row in run.metrics)}
    return found | ({"series": kept} if kept else {})


def about_here(cpu_seconds: float, device: str = "cpu") -> Record:
    """The same of what was no run."""
    return {
        "commit": commit(),
        "version": __version__,
        "torch": torch.__version__,
        "machine": _machine(platform.machine(), device),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cpu_seconds": round(cpu_seconds, 2),
    }


def _machine(processor: str, device: str) -> str:
    return f"{processor}, {os.cpu_count()} cores, {device}, {platform.system()}"


def costs_until(metrics: Sequence[Record], step: int) -> Record:
    """Seconds and FLOPs by kind, and tokens that were learnt, of all steps up to one."""
    rows = [row for row in metrics if row["step"] <= step]
    found: Record = {"tokens": sum(row["num_tokens"] for row in rows)}
    for unit in ("seconds", "flops"):
        kinds = sorted({kind for row in rows for kind in row[unit]})
        found[unit] = {kind: round(sum(row[unit].get(kind, 0.0) for row in rows), 3) for kind in kinds}
    return found
