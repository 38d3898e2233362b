"""Tables of an experiment, one row an arm, made from its files alone, and their Markdown."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from kibitz.experiments.design import Experiment
from kibitz.experiments.formats import nats, percent, table
from kibitz.experiments.records import (
    Record,
    best_rate,
    chooser,
    finals,
    half_of_seeds,
    played,
    probes,
    read,
    read_all,
    share_with_interval,
    sweeps,
)
from kibitz.experiments.results import Estimate


@dataclass(frozen=True)
class Row:
    """An arm at its best rate. Shares and nats; costs are means over the seeds, in GFLOP and seconds of one core."""

    arm: str
    about: str
    rate: float
    num_seeds: int
    sampled: Estimate | None
    greedy: Estimate | None
    reverse_kl: Estimate | None
    student_gflop: float
    teacher_gflop: float
    other_gflop: float
    cpu_seconds: float

    def against(self, other: "Row") -> Estimate | None:
        """Return the difference in accuracy at temperature 1. Both met the same problems, so the interval is conservative."""
        if self.sampled is None or other.sampled is None:
            return None
        return self.sampled[0] - other.sampled[0], (self.sampled[1] ** 2 + other.sampled[1] ** 2) ** 0.5


def rows(experiment: Experiment, folder: Path) -> list[Row]:
    """Best first, by accuracy at temperature 1, or by reverse KL where there are no answers."""
    abouts = {arm.name: arm.about for arm in experiment.arms}
    found = [_row(arm, abouts[arm], records) for arm, records in finals(experiment, folder).items()]
    return sorted(found, key=lambda row: (-row.sampled[0] if row.sampled else 0.0, row.reverse_kl or (0.0, 0.0)))


def _row(arm: str, about: str, records: list[Record]) -> Row:
    return Row(
        arm=arm,
        about=about,
        rate=records[0]["lr"],
        num_seeds=len(records),
        sampled=_accuracy(records, "sampled"),
        greedy=_accuracy(records, "greedy"),
        reverse_kl=_nats([r["test"]["reverse_kl"] for r in records]) if "reverse_kl" in records[0]["test"] else None,
        student_gflop=_gflop(records, "student"),
        teacher_gflop=_gflop(records, "teacher"),
        other_gflop=_gflop(records, "other"),
        cpu_seconds=fmean(record["cpu_seconds"] for record in records),
    )


def models(experiment: Experiment, folder: Path) -> dict[str, Record]:
    """role -> the evaluation of the untrained student, of the teacher, and of whoever else there is."""
    found = {role: read(folder / f"{role}.json") for role in experiment.roles}
    return {role: record["test"] for role, record in found.items() if record is not None}


def _accuracy(records: list[Record], how: str) -> Estimate | None:
    if how not in records[0]["test"]:
        return None
    shares = [record["test"][how]["accuracy"] for record in records]
    return share_with_interval(shares, records[0]["test"]["num_prompts"])


def _nats(values: list[float]) -> Estimate:
    return fmean(values), half_of_seeds(values)


def _gflop(records: list[Record], who: str) -> float:
    """Return the mean GFLOP over the records of the phases of the student, the teacher, or other models."""
    sums = [sum(v for kind, v in record["flops"].items() if _spender(kind) == who) for record in records]
    return fmean(sums) / 1e9


def _spender(kind: str) -> str:
    model = kind.partition("_")[0]
    return model if model in ("student", "teacher") else "other"


# ------------------------------------------------------------------ words


def markdown(experiment: Experiment, folder: Path) -> str:
    """The table, what it was made from, and which arms are told apart from the reference."""
    found = rows(experiment, folder)
    if not found:
        return "Nothing has been run yet."
    head = ("arm", "what is learnt", "rate", "T=1", "greedy", "reverse KL", "GFLOP: student, teacher, others", "CPU s")
    body = [_cells(row) for row in found] + [
        _model_cells(role, row) for role, row in models(experiment, folder).items()
    ]
    whole = table(head, body, left=2)
    parts = (whole, _separation(experiment, found), _at_the_edge(experiment, folder), made_from(experiment, folder))
    return "\n\n".join(part for part in parts if part)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"`{row.arm}`",
        row.about,
        f"{row.rate:g}",
        percent(row.sampled),
        percent(row.greedy),
        nats(row.reverse_kl),
        f"{row.student_gflop:.0f}, {row.teacher_gflop:.0f}, {row.other_gflop:.0f}",
        f"{row.cpu_seconds:.0f}",
    )


def _model_cells(role: str, test: Record) -> tuple[str, ...]:
    name = "the student before" if role == "student" else f"the {role}"
    shares = [share_with_interval([test[how]["accuracy"]], test["num_prompts"]) if how in test else None
              for how in ("sampled", "greedy")]  # fmt: skip
    return (f"*{name}*", "", "", *map(percent, shares), nats(_once(test)), "", "")


def _once(test: Record) -> Estimate | None:
    return (test["reverse_kl"], 0.0) if "reverse_kl" in test else None


def _separation(experiment: Experiment, found: list[Row]) -> str:
    """Name the arms that are above, below or not told apart from the reference, by accuracy at temperature 1."""
    reference = next((row for row in found if row.arm == experiment.reference), None)
    if reference is None or reference.sampled is None:
        return ""
    groups: dict[str, list[str]] = {"above": [], "below": [], "not told apart from": []}
    for row in found:
        if row is reference or (difference := row.against(reference)) is None:
            continue
        side = "above" if difference[0] > 0 else "below"
        groups[side if abs(difference[0]) > difference[1] else "not told apart from"].append(f"`{row.arm}`")
    lines = [f"- {side} `{reference.arm}`: {', '.join(names) or 'none'}" for side, names in groups.items()]
    return "At temperature 1, by the 95% interval of the difference:\n\n" + "\n".join(lines)


def _at_the_edge(experiment: Experiment, folder: Path) -> str:
    """Name the arms whose best rate is the lowest or highest tried, so that a better one may lie beyond."""
    key, names = chooser(experiment, folder), {arm.name for arm in experiment.arms}
    found = {arm: sweep for arm, sweep in sweeps(read_all(folder)).items() if len(sweep) > 1 and arm in names}
    edges = [arm for arm, sweep in found.items() if best_rate(sweep, key) in (min(sweep), max(sweep))]
    return f"The best rate is the lowest or highest tried: {', '.join(f'`{arm}`' for arm in edges)}." if edges else ""


def made_from(experiment: Experiment, folder: Path) -> str:
    """Runs, seeds, problems, dates, commits: what the numbers stand for."""
    names = {arm.name for arm in experiment.arms}
    records, chosen = [r for r in read_all(folder) if r["arm"] in names], finals(experiment, folder)
    if not chosen:
        return _of_played(played(folder)) or _of_probes(probes(folder))
    seeds = sorted({len(runs) for runs in chosen.values()})
    first = next(iter(chosen.values()))[0]
    problems = (
        f"{first['dev']['num_prompts']} dev problems choose the rate, {first['test']['num_prompts']} test problems"
    )
    return (
        f"{len(records)} run{'' if len(records) == 1 else 's'}, {_range(seeds)} an arm; {problems} make the table. "
        f"{_when_and_where(records)}"
    )


def _of_probes(records: list[Record]) -> str:
    """The same of an experiment without arms."""
    return f"{_range([len(records)])}. {_when_and_where(records)}" if records else ""


def _of_played(records: list[Record]) -> str:
    """The same of policies in environments."""
    seeds = {record["seed"] for record in records if not record["policy"].startswith("teacher")}
    return f"{len(records)} runs, {_range([len(seeds)])}. {_when_and_where(records)}" if records else ""


def _when_and_where(records: list[Record]) -> str:
    return (
        f"Commits {_listed(r.get('commit') for r in records)}; {_listed((r.get('date') or '')[:10] for r in records)}; "
        f"{_listed(r.get('machine') for r in records)}, {_listed(str(r.get('threads', 1)) for r in records)} thread."
    )


def _range(values: list[int]) -> str:
    text = str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
    return f"{text} seed{'' if text == '1' else 's'}"


def _listed(values: Iterable[str | None]) -> str:
    return ", ".join(sorted({value or "unknown" for value in values}))
