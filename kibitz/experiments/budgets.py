"""The *ladder*: arms that differ in how much they may spend, and what they make, accuracy against any way to count the cost."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.design import Arm
from kibitz.experiments.records import Record
from kibitz.experiments.results import NotRun, Results, gflop, sequences, steps
from kibitz.experiments.statistics import Curve, cost_ratio

Count = Callable[[Record], float]
"""A way to count what a run cost."""
Points = tuple[tuple[float, tuple[float, ...]], ...]

WARMUP = 10  # steps, of runs that are long enough


def ladder(
    name: str,
    about: str,
    changes: Mapping[str, Any],
    budgets: Mapping[int, Sequence[int]],
    samples: int = 1,
    rates: tuple[float, ...] = (),
) -> tuple[Arm, ...]:
    """Return one arm for each budget of rollouts and each of its batch sizes; the best batch size on the dev split is taken. Each
    arm is a run of its own, with its own learning-rate decay and sweep. `samples`: responses per prompt."""
    return tuple(
        Arm(
            f"{name}-{rollouts}-b{batch}",
            f"{about}: {rollouts} rollouts, {batch} a step",
            {
                "rollout": {"prompts_per_step": batch // samples, "samples_per_prompt": samples},
                "optim": {"warmup_steps": min(WARMUP, rollouts // batch // 4)},
                "steps": rollouts // batch,
                **changes,
            },
            rates=rates,
            family=f"{name}-{rollouts}",
        )
        for rollouts, batches in budgets.items()
        for batch in batches
    )


def rungs(results: Results, name: str) -> list[str]:
    """The arm that was best on the dev split at each budget, in their order; those that were run. Raises NotRun if none
    was."""
    families = [arm.family for arm in results.experiment.arms if arm.family.rpartition("-")[0] == name]
    found = []
    for family in dict.fromkeys(families):
        try:
            found.append(results.of_family(family))
        except NotRun:
            continue
    if not found:
        raise NotRun(name)
    return found


def was_run(results: Results, name: str) -> bool:
    try:
        return bool(rungs(results, name))
    except NotRun:
        return False


def curve(results: Results, name: str, count: Count) -> Curve:
    """Accuracy of each seed at what a ladder's arms cost, counted in one way; of two that cost the same, the better."""
    found: dict[float, list[float]] = {}
    for arm in rungs(results, name):
        cost, shares = results.mean(arm, count)[0], results.shares(arm)
        if cost not in found or sum(shares) > sum(found[cost]):
            found[cost] = shares
    return found


def surely(results: Results, name: str) -> float:
    """The accuracy that a ladder reaches with some certainty: the best lower end of its intervals."""
    return max(mean - half for mean, half in (results.accuracy(arm) for arm in rungs(results, name)))


def cheapest(results: Results, name: str) -> float:
    """The accuracy at a ladder's lowest budget. Below it nothing was run, and the ladder would seem dearer than it is."""
    return results.accuracy(rungs(results, name)[0])[0]


def ratio(results: Results, dear: str, cheap: str, count: Count, target: float) -> tuple[float, float, float]:
    """Return the ratio of two ladders' costs up to an accuracy, with its 95% interval. The interval starts at 0 where the dear
    ladder's lowest budget is above that accuracy already, because it may get there for less than was tried."""
    problems = results.runs(rungs(results, dear)[0])[0]["test"]["num_prompts"]
    curves = (
        tuple((cost, tuple(shares)) for cost, shares in curve(results, name, count).items()) for name in (dear, cheap)
    )
    middle, low, high = _ratio(*curves, target, problems)
    return middle, low if target >= cheapest(results, dear) else 0.0, high


@cache
def _ratio(dear: Points, cheap: Points, target: float, problems: int) -> tuple[float, float, float]:
    """Kept, because every page that quotes a finding asks for its thousands of draws again."""
    return cost_ratio(dict(dear), dict(cheap), target, problems)


def points(results: Results, name: str, count: Count) -> list[tuple[float, float, float]]:
    """Return the points of a plot: cost, accuracy and half its interval."""
    return [(results.mean(arm, count)[0], *results.accuracy(arm)) for arm in rungs(results, name)]


def panel(
    results: Results, ladders: Mapping[str, str], count: Count, unit: str, levels: Mapping[str, float], *more: Line
) -> Panel:
    """Accuracy against one way to count the cost, a line for each ladder and for what else is given."""
    lines = [Line(about, points(results, name, count)) for name, about in ladders.items()]
    return Panel(
        f"accuracy against {unit.partition(',')[0]}", unit, "accuracy", [*lines, *more], levels=levels, log_x=True
    )


def spent(results: Results, ladders: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return a row for each budget that was run: its best batch and rate, its accuracy, and its costs."""
    return [
        {
            "about": about,
            "rollouts": sequences(results.runs(arm)[0]),
            "steps": steps(results.runs(arm)[0]),
            "rate": results.rate(arm),
            "accuracy": results.accuracy(arm),
            "greedy": results.accuracy(arm, "greedy"),
            "student": results.mean(arm, lambda run: gflop(run, "student"))[0],
            "teacher": results.mean(arm, lambda run: gflop(run, "teacher"))[0],
            "seconds": results.mean(arm, lambda run: run["cpu_seconds"])[0],
        }
        for name, about in ladders.items()
        for arm in rungs(results, name)
    ]


def best(results: Results, name: str) -> tuple[float, float]:
    """The highest accuracy of a ladder, with its interval."""
    return max(results.accuracy(arm) for arm in rungs(results, name))
