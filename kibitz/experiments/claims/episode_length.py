"""Does a reward teach one bit an episode and a teacher one number a token: do longer episodes widen the gap between the two?"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.design import Arm, Claim, Experiment
from kibitz.experiments.evidence import Finding, Verdict, percent, times
from kibitz.experiments.records import Record, best_rate, chooser
from kibitz.experiments.results import NotRun, Results
from kibitz.experiments.statistics import Curve, cost_at, cost_ratio, line, part_way
from kibitz.experiments.tables import table

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
    verdict, told = _judged(ratios)
    why = (
        f"Both are to go {100 * GAP:.0f}% of the way from the student's to the teacher's share of right expressions; the reward "
        f"counts only if all expressions of a prompt are right. {told} {_at_equal(results)} {_in_the_end(results, lengths[-1])} "
        "A method's best batch and rate are those with the fewest FLOPs to that target, on the dev split: the two cheapest with "
        "seed 0 are run with all seeds, and the cheaper of these counts. "
        "Costs are read from the curves of runs with one schedule each, on the dev split, linear in the logarithm between two "
        "points; the interval is of seeds and problems."
    )
    ours = ", ".join(f"{times(ratio['episodes'])} the episodes at k = {length}" for length, ratio in ratios.items())
    tables = (_best(results, found), _equal(results))
    return Finding(verdict, f"RL needs {ours}" if ours else "neither learnt", why, tables, _panels(results, found))


def _judged(ratios: Mapping[int, Ratios]) -> tuple[Verdict, str]:
    """Whether what RL costs more grows from the shortest to the longest that was learnt, beyond the intervals."""
    if len(ratios) < 2:
        return "not", "At fewer than two lengths did either method get there: no growth can be seen."
    shortest, longest = min(ratios), max(ratios)
    apart = all(ratios[longest][unit][1] > ratios[shortest][unit][2] for unit in ("episodes", "FLOPs"))
    rises = ratios[longest]["episodes"][0] > ratios[shortest]["episodes"][0]
    ends = ((length, ratios[length]) for length in (shortest, longest))
    told = " and ".join(
        f"{times(of['episodes'])} the episodes and {times(of['FLOPs'])} the FLOPs, the teacher's included, at k = {length}"
        for length, of in ends
    )
    told = f"RL needs {told}, each method at its own best batch and learning rate. {_exponent(ratios)}"
    return "reproduced" if apart else "partly" if rises else "not", told


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
    """How much more RL needs than OPD, each at its best batch; None where neither gets there."""
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


def _exponent(ratios: Mapping[int, Ratios]) -> str:
    """The power of the length that the ratio of episodes grows with."""
    found = {length: of["episodes"][0] for length, of in ratios.items() if 0 < of["episodes"][0] < math.inf}
    if len(found) < 2:
        return "Too few lengths were learnt to say by which power the ratio grows."
    _, slope = line([math.log(length) for length in found], [math.log(ratio) for ratio in found.values()])
    return (
        f"The ratio of episodes grows with the length to the power of {slope:.2f}; one bit an episode against one number a "
        "token would be 1."
    )


# ------------------------------------------------------------------ at equal episodes and tokens


def _seed_0(results: Results, method: str, length: int, batch: int) -> Record | None:
    """Its run at its own best rate; only the best batch of each has more seeds."""
    sweep = results.sweeps.get(_name(method, length, batch))
    return None if sweep is None else sweep[best_rate(sweep, chooser(results.experiment, results.folder))]


def _pair(results: Results, length: int, batch: int) -> tuple[dict[str, float], dict[str, float]] | None:
    """What RL and OPD cost, at the same number of episodes a step."""
    runs = [_seed_0(results, method, length, batch) for method in ("grpo", "opd")]
    if runs[0] is None or runs[1] is None:
        return None
    first, second = (_until([run], results, length) for run in runs if run is not None)
    return first, second


def _equal(results: Results) -> str:
    head = ("k", "same in a step", "episodes a step", "steps: RL, OPD", "steps", "FLOPs")
    rows = []
    for length in LENGTHS:
        for what, batch in (("episodes", EQUAL), ("tokens", EQUAL // length)):
            if (found := _pair(results, length, batch)) is None or (what == "tokens" and length == 1):
                continue
            rl, opd = found
            rows.append((
                str(length), what, str(batch), f"{_number(rl['steps'])}, {_number(opd['steps'])}",
                *(_over(rl[unit], opd[unit]) for unit in ("steps", "FLOPs")),
            ))  # fmt: skip
    return table(head, rows) if rows else ""


def _at_equal(results: Results) -> str:
    pairs = {length: found for length in LENGTHS if (found := _pair(results, length, EQUAL)) is not None}
    if not pairs:
        return ""
    told = ", ".join(f"{_over(rl['FLOPs'], opd['FLOPs'])} at {length}" for length, (rl, opd) in pairs.items())
    return f"At {EQUAL} episodes a step for both, seed 0 only, the ratio of FLOPs is {told}."


def _over(dear: float, cheap: float) -> str:
    if math.isinf(cheap):
        return "neither there" if math.isinf(dear) else "OPD not there"
    return "RL not there" if math.isinf(dear) else f"{dear / cheap:.1f}x"


def _number(value: float) -> str:
    return "–" if math.isinf(value) else f"{value:,.0f}"


# ------------------------------------------------------------------ at the best batch of each


def _best(results: Results, ratios: Mapping[int, Ratios | None]) -> str:
    head = ("k", "target, %", "method", "batch, rate", "steps", "episodes", "1000 tokens", "GFLOP", "in the end, %",
            "RL/OPD: episodes", "FLOPs")  # fmt: skip
    rows = []
    for length, ratio in ratios.items():
        for method, says in METHODS.items():
            name = results.of_family(f"{method}-k{length}")
            runs = results.runs(name)
            cost = _until(runs, results, length)
            last = [times(ratio[unit]) if ratio else "neither there" for unit in ("episodes", "FLOPs")]
            rows.append((
                str(length), percent(target(results, length)), says, f"{_batch(runs[0])}, {results.rate(name):g}",
                _number(cost["steps"]), _number(cost["episodes"]), _number(cost["tokens"] / 1e3), _number(cost["FLOPs"] / 1e9),
                percent(results.accuracy(name)), *(last if method == "grpo" else ("", "")),
            ))  # fmt: skip
    return table(head, rows)


def _in_the_end(results: Results, length: int) -> str:
    ends = {method: results.accuracy(results.of_family(f"{method}-k{length}")) for method in METHODS}
    teacher = results.level("teacher", name=f"k{length}")
    return (
        f"At the end of its budget, at k = {length}, RL has {percent(ends['grpo'])}% of the expressions right and OPD "
        f"{percent(ends['opd'])}%; the teacher has {percent(teacher)}%."
    )


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
    recipe={"optim": {"warmup_steps": 5}, "threads": 1},
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
    claim=Claim(
        says="Reinforcement learning teaches O(1) bits per episode, on-policy distillation O(N), N being the number of tokens.",
        source="[Thinking Machines 2025](https://thinkingmachines.ai/blog/on-policy-distillation/)",
        short="RL teaches O(1) bits an episode, OPD O(N)",
    ),
    find=find,
)  # fmt: skip
