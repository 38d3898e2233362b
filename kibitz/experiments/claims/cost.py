"""The cost of accuracy: distillation on the student's own text, fine-tuning on the teacher's text, and RL, each with its own
budgets, batch and rate; counted in every way that was published."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kibitz.experiments.budgets import best, cheapest, ladder, panel, points, ratio, rungs, spent, surely, was_run
from kibitz.experiments.charts import Line
from kibitz.experiments.design import TOY, Experiment
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.records import Record, half_of_seeds
from kibitz.experiments.results import Results, gflop, sequences, steps

Ratio = tuple[float, float, float]
"""How many times more, and its 95% interval."""

LADDERS = {
    "opd": "OPD, full vocabulary",
    "opd-sampled": "OPD, sampled token",
    "sft": "SFT on the teacher's text",
    "grpo": "RL (GRPO)",
}
METHODS: Mapping[str, Any] = {
    "opd": {"type": "opd"},
    "opd-sampled": {"type": "opd", "support": "sampled"},
    "sft": {"type": "sft", "source": "teacher"},
    "grpo": {"type": "grpo"},
}


NEEDED = ("opd", "sft", "grpo")


@dataclass(frozen=True, eq=False)
class Way:
    """A way to count what a run cost; how many times more another method costs than OPD, where that was published."""

    key: str
    name: str
    count: Callable[[Record], float]
    published: Mapping[str, float] = field(default_factory=dict)


STUDENT = Way("student", "FLOPs of the student alone", lambda run: gflop(run, "student"), {"sft": 18})
GIVEN = Way(
    "given", "FLOPs without the teacher's sampling", lambda run: gflop(run, "student", "teacher_scoring"), {"sft": 9}
)
ALL = Way("paid", "FLOPs with the teacher's sampling", gflop, {"sft": 30})
SECONDS = Way("seconds", "CPU seconds", lambda run: run["cpu_seconds"], {"grpo": 10})
TOKENS = Way("tokens", "tokens learnt", lambda run: run["tokens"])
ROLLOUTS = Way("rollouts", "rollouts", sequences)
STEPS = Way("steps", "steps", steps)
WAYS = (STUDENT, GIVEN, ALL, SECONDS, TOKENS, ROLLOUTS, STEPS)


def find(results: Results) -> Finding:
    """Ratios of cost at the highest accuracy that all reach, and at lower ones. Where some method surpasses the student with
    no certainty there is no such accuracy, and no ratio."""
    for name in NEEDED:
        rungs(results, name)  # raises NotRun
    shown = {name: about for name, about in LADDERS.items() if was_run(results, name)}
    others = [name for name in shown if name != "opd"]
    before, highest = results.level("student"), min(surely(results, name) for name in shown)
    lowest, priced = max(cheapest(results, name) for name in others), highest > before
    targets = [highest, *((highest + lowest) / 2, lowest) * (lowest < highest)] if priced else []

    def over_opd(name: str, way: Way, target: float = highest) -> Ratio | None:
        return ratio(results, name, "opd", way.count, target) if priced else None

    at = {way.key: {name: over_opd(name, way) for name in others} for way in WAYS}
    columns = [(name, way) for name in others for way in ((GIVEN, ALL) if name == "sft" else (ALL,))]
    numbers = {
        "student": before,
        "teacher": results.level("teacher"),
        "highest": highest,
        "at": at,
        "shown": shown,
        "others": others,
        "heads": [LADDERS[name] for name in others],
        "ways": [(way, at[way.key]) for way in WAYS],
        "columns": [
            LADDERS[name] + {GIVEN: ", without its sampling", ALL: ", with its sampling"}[way] * (name == "sft")
            for name, way in columns
        ],
        "targets": [(target, [over_opd(name, way, target) for name, way in columns]) for target in targets],
        "best": {name: best(results, name) for name in shown},
        "surely": {name: surely(results, name) for name in shown},
        "spread": {name: max(half_of_seeds(results.shares(arm)) for arm in rungs(results, name)) for name in shown},
        "spent": spent(results, shown),
    }
    levels = {
        "teacher": results.level("teacher"),
        **({"all reach this": highest} if priced else {"the student": before}),
    }
    given = Line("SFT, without the teacher's sampling", points(results, "sft", GIVEN.count), dashed=True)
    panels = [
        panel(results, shown, way.count, {ALL.key: "GFLOP, teacher's included"}.get(way.key, way.name), levels,
              *[given] * (way is ALL))
        for way in (ALL, ROLLOUTS, SECONDS)
    ]  # fmt: skip
    return Finding(verdict(at) if priced else "not", numbers, panels)


def verdict(at: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """Reproduced if no published ratio is above our interval; partly if OPD is surely cheaper than SFT in one way at least."""
    claims = [(at[way.key][name], published) for way in WAYS for name, published in way.published.items()]
    if all(low > 1 and high >= published for (_, low, high), published in claims):
        return "reproduced"
    return "partly" if any(at[way.key]["sft"][1] > 1 for way in (STUDENT, GIVEN, ALL)) else "not"


# ------------------------------------------------------------------ runs

BUDGETS: Mapping[str, Mapping[int, Sequence[int]]] = {
    "opd": {80: (4, 8), 160: (4, 8), 320: (4, 8, 16), 640: (8, 16), 1280: (8,)},
    "opd-sampled": {320: (8,), 640: (8, 16), 1280: (8, 16)},
    "sft": {160: (4, 8), 320: (4, 8), 640: (4, 8), 1280: (8,), 2560: (8, 16), 5120: (8,)},
    "grpo": {1600: (16, 32), 3200: (32, 64), 6400: (32, 64), 12800: (64,)},
}
"""Rollouts, and the batches that are tried with them; with the dearest the one that is the best of the neighbours."""
FEW: Mapping[str, Mapping[int, Sequence[int]]] = {
    "opd": {80: (8,), 320: (8,), 640: (8,)},
    "sft": {320: (8,), 640: (8,), 1920: (8,)},
    "grpo": {1600: (32,), 4800: (32,)},
}
FEW_LONGER: Mapping[str, Mapping[int, Sequence[int]]] = {
    "opd": {320: (8,), 1280: (8,)},
    "sft": {640: (8,), 2560: (8,)},
    "grpo": {1600: (32,), 6400: (32,)},
}


def arms_of(name: str, budgets: Mapping[int, Sequence[int]]):
    return ladder(name, LADDERS[name], {"method": METHODS[name]}, budgets, samples=8 if name == "grpo" else 1)


EXPERIMENT = Experiment(
    name="cost",
    question="What does an accuracy cost by OPD, by SFT on the teacher's text and by RL, each at its own best batch and rate?",
    world="arithmetic",
    recipe=TOY,
    arms=tuple(arm for name, budgets in BUDGETS.items() for arm in arms_of(name, budgets)),
    rates=(5e-4, 1e-3, 2e-3),
    dev_problems=512,
    test_problems=1024,
    extensions=2,
    seeds=5,
    quick_arms=("opd-160-b8", "opd-sampled-320-b8", "sft-640-b8", "grpo-1600-b32"),
    find=find,
)


def elsewhere(name: str, student: str, question: str, budgets: Mapping[str, Mapping[int, Sequence[int]]]) -> Experiment:
    """The same with fewer arms, for a student that is wrong for another reason."""
    arms = tuple(arm for method, rungs_of in budgets.items() for arm in arms_of(method, rungs_of))
    return replace(
        EXPERIMENT, name=name, question=question, arms=arms, seeds=3,
        models={"student": f"arithmetic/{student}", "teacher": "arithmetic/teacher"},
        quick_arms=("opd-320-b8", "sft-640-b8", "grpo-1600-b32"),
    )  # fmt: skip


SLIPS = elsewhere("cost-slips", "slips", "The same, of a student whose errors are random slips.", FEW)
UNDERTRAINED = elsewhere(
    "cost-undertrained", "undertrained", "The same, of a student that was trained too little.", FEW_LONGER
)
