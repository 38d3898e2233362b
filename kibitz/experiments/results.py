"""The results of an experiment, by name. A claim's finding is computed from them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

from kibitz.experiments.design import Experiment
from kibitz.experiments.records import (
    PROBE,
    Record,
    chooser,
    finals,
    half_of_seeds,
    measure,
    probes,
    read,
    read_all,
    share_with_interval,
    sweeps,
)
from kibitz.experiments.statistics import Estimate

Point = tuple[float, float, float]
"""x, y, and half the 95% interval of y."""


class NotRun(Exception):
    """Runs that a finding needs are not there yet."""


@dataclass(frozen=True)
class Results:
    experiment: Experiment
    folder: Path

    @cached_property
    def finals(self) -> dict[str, list[Record]]:
        """arm -> its runs at the best rate that were measured on the test split, in the experiment's order."""
        return finals(self.experiment, self.folder)

    @cached_property
    def sweeps(self) -> dict[str, dict[float, Record]]:
        """arm -> rate -> its run with seed 0."""
        known = {arm.name for arm in self.experiment.arms}
        return {arm: found for arm, found in sweeps(read_all(self.folder)).items() if arm in known}

    def has(self, *arms: str) -> bool:
        return all(arm in self.finals for arm in arms)

    def runs(self, arm: str) -> list[Record]:
        """One for each seed. Raises NotRun if there is none."""
        if arm not in self.finals:
            raise NotRun(arm)
        return self.finals[arm]

    def of_family(self, family: str) -> str:
        """The arm of a family that was best on the dev split, of those with all seeds."""
        names = [arm.name for arm in self.experiment.arms if arm.family == family and arm.name in self.finals]
        if not names:
            raise NotRun(family)
        key, most = chooser(self.experiment, self.folder), max(len(self.finals[name]) for name in names)
        return max((name for name in names if len(self.finals[name]) == most), key=lambda name: key(self.finals[name]))

    def probes(self) -> list[Record]:
        """Return the probes' records, one for each seed. Raises NotRun if there is none."""
        if not (found := probes(self.experiment.probed_in(self.folder))):
            raise NotRun(PROBE)
        return found

    def made(self, maker: str) -> list[Record]:
        """The run of a maker; nothing, where a role was given another model."""
        return [record for record in read_all(self.folder) if record["arm"] == maker]

    def model(self, role: str) -> Record:
        """The evaluation on the test split of a model as it is."""
        found = read(self.folder / f"{role}.json")
        if found is None:
            raise NotRun(role)
        return found["test"]

    def level(self, role: str, how: str = "sampled", name: str = "") -> float:
        """The accuracy of a model as it is, on one measure."""
        return measure(self.model(role), name)[how]["accuracy"]

    def shares(self, arm: str, how: str = "sampled", name: str = "", split: str = "test") -> list[float]:
        """The accuracy of an arm for each seed."""
        return [measure(run[split], name)[how]["accuracy"] for run in self.runs(arm)]

    def accuracy(self, arm: str, how: str = "sampled", name: str = "") -> Estimate:
        """Its mean over seeds, with an interval of seeds and problems."""
        shares = self.shares(arm, how, name)
        return share_with_interval(shares, measure(self.runs(arm)[0]["test"], name)["num_prompts"])

    def difference(self, arm: str, other: str, name: str = "") -> Estimate:
        """Return the mean difference of two arms' accuracies, seed by seed, with the interval over seeds: both met the same
        problems."""
        pairs = zip(self.shares(arm, name=name), self.shares(other, name=name), strict=False)
        found = [above - below for above, below in pairs]
        return fmean(found), half_of_seeds(found)

    def mean(self, arm: str, value: Callable[[Record], float]) -> Estimate:
        """The mean over seeds of anything that a record knows, with the interval of seeds."""
        values = [value(run) for run in self.runs(arm)]
        return fmean(values), half_of_seeds(values)

    def rate(self, arm: str) -> float:
        return self.runs(arm)[0]["lr"]


def gflop(record: Record, *kinds: str) -> float:
    """In GFLOP, of the phases whose names begin with one of `kinds`; of all, if none is given."""
    flops = record["flops"]
    return sum(value for kind, value in flops.items() if not kinds or kind.startswith(kinds)) / 1e9


def steps(record: Record) -> int:
    """Return the number of steps of the run, or of its best checkpoint where it stopped there."""
    return record.get("step") or record["settings"]["recipe"].get("steps", 150)


def sequences(record: Record) -> int:
    """Rollouts that the student learnt from."""
    rollout = record["settings"]["recipe"].get("rollout", {})
    return steps(record) * rollout.get("prompts_per_step", 64) * rollout.get("samples_per_prompt", 4)
