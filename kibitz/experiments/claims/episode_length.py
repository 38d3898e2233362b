"""Does a reward teach one bit an episode and a teacher one number a token: do longer episodes widen the gap between the two?"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.design import TOY, Arm, Experiment, merged
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.records import Record, best_rate, chooser
from kibitz.experiments.results import NotRun, Results
from kibitz.experiments.statistics import Curve, cost_at, cost_ratio, line, part_way

LENGTHS = (1, 2, 4, 8)  # expressions in a prompt
EQUAL = 64  # episodes of a step, or expressions of a step, where either is the same for both methods
GROUP = 8  # samples of a prompt under GRPO
PROBLEMS = 256  # expressions that one measurement counts, whatever the length
GAP = 2 / 3  # the target: so much of the way from the student to the teacher
POINTS = 5  # of a curve

METHODS = {"opd": "OPD", "grpo": "RL"}
STEPS = {
    "opd": {1: {8: 40, 64: 20}, 2: {8: 40, 64: 20}, 4: {4: 50, 16: 30, 64: 20}, 8: {4: 50, 8: 40, 64: 20}},
    "grpo": {1: {16: 100, 64: 50}, 2: {16: 100, 64: 50}, 4: {16: 100, 64: 60}, 8: {8: 100, 16: 150, 64: 90}},
}
"""method -> length -> episodes of a step -> steps. By a probe on the dev split so many that the larger part of a run lies
before the target, where it is reached at all."""
RATES = {"opd": (5e-4, 1e-3, 2e-3), "grpo": (2.5e-4, 5e-4, 1e-3)}
FEWER_RATES = {"grpo-k8-b64": (2.5e-4, 5e-4)}
"""The dearest arm by far. The longer the episode, the lower the rate that RL wants; a third above was not tried."""

Ratios = Mapping[str, tuple[float, float, float]]
"""unit -> how much more RL needs than OPD, and the 95% interval."""
Cost = Callable[[Record, Record], float]
"""Of a run and a point of its curve."""
COSTS: dict[str, Cost] = {
    "steps": lambda run, point: point["step"],
    "episodes": lambda run, point: point["step"] * _batch(run),
    "tokens": lambda run, point: point["tokens"],
    "FLOPs": lambda run, point: sum(point["flops"].values()),
}


def _arms() -> Iterator[Arm]:
    for method, by_length in STEPS.items():
        for length, batches in by_length.items():
            for batch in batches:
                yield _arm(method, length, batch)


def _arm(method: str, length: int, batch: int) -> Arm:
    group, steps = (GROUP if method == "grpo" else 1), STEPS[method][length][batch]
    rollout = {"prompts_per_step": batch // group, "samples_per_prompt": group, "max_tokens": 32 * length}
    return Arm(
        _name(method, length, batch),
        f"{METHODS[method]}, k = {length}, {batch} episodes a step",
        {"method": {"type": method}, "rollout": rollout, "steps": steps},
        rates=FEWER_RATES.get(_name(method, length, batch), RATES[method]),
        family=f"{method}-k{length}",
        data=f"k{length}",
        every=steps // POINTS,
        measures=(f"k{length}",),
    )


def _name(method: str, length: int, batch: int) -> str:
    return f"{method}-k{length}-b{batch}"


def _batch(run: Record) -> int:
    rollout = run["settings"]["recipe"]["rollout"]
    return rollout["prompts_per_step"] * rollout["samples_per_prompt"]


# ------------------------------------------------------------------ what came out


def find(results: Results) -> Finding:
    """Cost to equal accuracy of both methods at every length: at the best batch of each, at equal episodes, at equal tokens."""
    lengths = [length for length in LENGTHS if _both(results, length)]
    if not lengths:
        raise NotRun("opd-k1")
    found = {length: _ratios(results, length) for length in lengths}
    ratios = {length: ratio for length, ratio in found.items() if ratio is not None}
    last = lengths[-1]
    numbers = {
        "gap": GAP,
        "ratios": ratios,
        "ends": [(length, ratios[length]) for length in sorted({min(ratios), max(ratios)})] if ratios else [],
        "exponent": exponent(ratios),
        "equal": EQUAL,
        "longest": last,
        "end": {method: results.accuracy(results.of_family(f"{method}-k{last}")) for method in METHODS},
        "teacher": results.level("teacher", name=f"k{last}"),
        "best": [row for length in lengths for row in _best(results, length, found[length])],
        "equals": _equals(results),
    }
    return Finding(verdict(ratios), numbers, _panels(results, found))


def verdict(ratios: Mapping[int, Ratios]) -> Verdict:
    """Reproduced if the ratio of RL's cost to OPD's grows from the shortest to the longest episodes that were learnt, beyond the
    intervals, in episodes and in FLOPs; partly if the ratio in episodes rises."""
    if len(ratios) < 2:
        return "not"
    shortest, longest = ratios[min(ratios)], ratios[max(ratios)]
    if all(longest[unit][1] > shortest[unit][2] for unit in ("episodes", "FLOPs")):
        return "reproduced"
    return "partly" if longest["episodes"][0] > shortest["episodes"][0] else "not"


def _both(results: Results, length: int) -> bool:
    names = {arm.family for arm in results.experiment.arms if arm.name in results.finals}
    return all(f"{method}-k{length}" in names for method in METHODS)


def target(results: Results, length: int) -> float:
    """The share of right expressions that counts as learnt."""
    student, teacher = (results.level(role, name=f"k{length}") for role in ("student", "teacher"))
    return part_way(student, teacher, GAP)


def curve(runs: Sequence[Record], cost: Cost) -> Curve:
    """Mean cost of each point over the runs, and the accuracies there."""
    points = zip(*(run["curve"] for run in runs), strict=True)
    return {
        fmean(cost(run, point) for run, point in zip(runs, column, strict=True)): [
            point["dev"]["sampled"]["accuracy"] for point in column
        ]
        for column in points
    }


def _problems(length: int) -> int:
    return PROBLEMS // length * length


def _ratios(results: Results, length: int) -> Ratios | None:
    """Return the ratios of RL's cost to OPD's, each at its best batch; None where neither reaches the target."""
    runs = {method: results.runs(results.of_family(f"{method}-k{length}")) for method in METHODS}
    if all(math.isinf(_until(of_method, results, length)["steps"]) for of_method in runs.values()):
        return None
    return {
        unit: cost_ratio(
            curve(runs["grpo"], cost), curve(runs["opd"], cost), target(results, length), _problems(length)
        )
        for unit, cost in COSTS.items()
    }


def _until(runs: Sequence[Record], results: Results, length: int) -> dict[str, float]:
    return {
        unit: cost_at([(x, fmean(ys)) for x, ys in curve(runs, cost).items()], target(results, length))
        for unit, cost in COSTS.items()
    }


def exponent(ratios: Mapping[int, Ratios]) -> float:
    """The power of the length that the ratio of episodes grows with; not a number from fewer than two lengths."""
    found = {length: of["episodes"][0] for length, of in ratios.items() if 0 < of["episodes"][0] < math.inf}
    if len(found) < 2:
        return math.nan
    return line([math.log(length) for length in found], [math.log(ratio) for ratio in found.values()])[1]


# ------------------------------------------------------------------ at equal episodes and tokens


def _seed_0(results: Results, method: str, length: int, batch: int) -> Record | None:
    """Its run at its own best rate; only the best batch of each has more seeds."""
    sweep = results.sweeps.get(_name(method, length, batch))
    return None if sweep is None else sweep[best_rate(sweep, chooser(results.experiment, results.folder))]


def _pair(results: Results, length: int, batch: int) -> tuple[dict[str, float], dict[str, float]] | None:
    """Return the costs of RL and OPD up to the target, at the same number of episodes a step; None if one was not run."""
    runs = [_seed_0(results, method, length, batch) for method in ("grpo", "opd")]
    if runs[0] is None or runs[1] is None:
        return None
    first, second = (_until([run], results, length) for run in runs if run is not None)
    return first, second


def _equals(results: Results) -> list[dict[str, Any]]:
    """Return the costs of RL and OPD at the same number of episodes a step, and at the same number of tokens."""
    rows = []
    for length in LENGTHS:
        for what, batch in (("episodes", EQUAL), ("tokens", EQUAL // length)):
            if (found := _pair(results, length, batch)) is None or (what == "tokens" and length == 1):
                continue
            rl, opd = found
            over = {unit: _over(rl[unit], opd[unit]) for unit in ("steps", "FLOPs")}
            rows.append({"k": length, "what": what, "batch": batch, "rl": rl, "opd": opd, "over": over})
    return rows


def _over(dear: float, cheap: float) -> str:
    if math.isinf(cheap):
        return "neither there" if math.isinf(dear) else "OPD not there"
    return "RL not there" if math.isinf(dear) else f"{dear / cheap:.1f}x"


# ------------------------------------------------------------------ at the best batch of each


def _best(results: Results, length: int, ratio: Ratios | None) -> Iterator[dict[str, Any]]:
    """A row for each method: its best batch and rate, what it cost to the target, and where it ends."""
    for method, says in METHODS.items():
        name = results.of_family(f"{method}-k{length}")
        runs = results.runs(name)
        yield {
            "k": length, "target": target(results, length), "method": says, "batch": _batch(runs[0]),
            "rate": results.rate(name), "cost": _until(runs, results, length), "end": results.accuracy(name),
            "ratio": ratio if method == "grpo" else None,
        }  # fmt: skip


def _panels(results: Results, ratios: Mapping[int, Ratios | None]) -> tuple[Panel, ...]:
    lengths = [
        Line(unit, [(length, of[unit][0], 0.0) for length, of in ratios.items() if of and of[unit][0] < math.inf])
        for unit in ("episodes", "FLOPs", "steps")
    ]
    longest = max(ratios)
    curves = []
    for method, says in METHODS.items():
        runs = results.runs(results.of_family(f"{method}-k{longest}"))
        found = curve(runs, COSTS["FLOPs"])
        curves.append(Line(says, [(cost / 1e9, fmean(ys), 0.0) for cost, ys in found.items()]))
    return (
        Panel("what RL costs more than OPD", "k, expressions in a prompt", "RL / OPD", lengths, log_x=True, log_y=True,
              percent=False, ticks={length: str(length) for length in ratios}),
        Panel(f"{longest} expressions, best batch of each", "GFLOP, the teacher's included", "right expressions", curves,
              levels={"target": target(results, longest)}, log_x=True),
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="episode-length",
    question="k expressions a prompt, rewarded only if all are right: how does what RL costs more than OPD grow with k?",
    world="arithmetic-long-1",
    recipe=merged(TOY, {"optim": {"warmup_steps": 5}}),
    arms=tuple(_arms()),
    rates=RATES["opd"],
    dev_problems=PROBLEMS,
    test_problems=PROBLEMS,
    extensions=0,
    until=GAP,
    seeds=5,
    quick_arms=("opd-k1-b8", "grpo-k1-b16", "opd-k4-b4", "grpo-k4-b16"),
    data={f"k{k}": {"world": f"arithmetic-long-{k}", "options": {"reward": "all"}} for k in LENGTHS}
    | {f"k{k}-each": {"world": f"arithmetic-long-{k}", "options": {"reward": "share"}, "limit": PROBLEMS // k}
       for k in LENGTHS},
    measures={f"k{k}": f"k{k}-each" for k in LENGTHS},
    find=find,
)  # fmt: skip
