"""What accuracy costs: distillation on the student's own text, fine-tuning on the teacher's text, and RL, each with its own
budgets, batch and rate; counted in every way that was published."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from kibitz.experiments.budgets import cheapest, ladder, points, ratio, rungs, spent, surely
from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.design import Claim, Experiment
from kibitz.experiments.evidence import Finding, Verdict, percent, times
from kibitz.experiments.records import Record, half_of_seeds
from kibitz.experiments.results import NotRun, Results, gflop, sequences, steps
from kibitz.experiments.tables import table

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


@dataclass(frozen=True)
class Way:
    """A way to count what a run cost; how many times more SFT and RL cost than OPD, where that was published."""

    name: str
    count: Callable[[Record], float]
    sft: float | None = None
    grpo: float | None = None

    def published(self, name: str) -> str:
        value = {"sft": self.sft, "grpo": self.grpo}.get(name)
        return "" if value is None else f" (published {value:g}x)"


STUDENT = Way("FLOPs of the student alone", lambda run: gflop(run, "student"), sft=18)
GIVEN = Way("FLOPs, the teacher's text given", lambda run: gflop(run, "student", "teacher_scoring"), sft=9)
ALL = Way("FLOPs, the teacher's text paid", gflop, sft=30)
SECONDS = Way("CPU seconds", lambda run: run["cpu_seconds"], grpo=10)
TOKENS = Way("tokens learnt", lambda run: run["tokens"])
ROLLOUTS = Way("rollouts", sequences)
STEPS = Way("steps", steps)
WAYS = (STUDENT, GIVEN, ALL, SECONDS, TOKENS, ROLLOUTS, STEPS)


def find(results: Results) -> Finding:
    """Ratios of cost at the highest accuracy that all reach, and at lower ones."""
    others = [name for name in LADDERS if name != "opd" and _was_run(results, name)]
    for name in ("opd", "sft", "grpo"):
        rungs(results, name)  # raises NotRun
    shown = {name: LADDERS[name] for name in ("opd", *others)}
    highest = min(surely(results, name) for name in shown)
    lowest = max(cheapest(results, name) for name in others)
    if highest <= results.level("student"):
        return _nothing(results, shown)
    targets = [highest, *((highest + lowest) / 2, lowest) * (lowest < highest)]
    found = {(way.name, name): ratio(results, name, "opd", way.count, highest) for way in WAYS for name in others}
    sft = {way.name: found[way.name, "sft"] for way in (STUDENT, GIVEN, ALL)}
    paid, seconds = found[ALL.name, "grpo"], found[SECONDS.name, "grpo"]
    return Finding(
        verdict(sft, seconds),
        f"at {percent(highest)}% SFT costs {', '.join(times(r) for r in sft.values())}, in that order; "
        f"RL {times(seconds)} in CPU seconds, {times(paid)} in FLOPs",
        _why(results, highest, found, sft),
        (_by_way(found, others), _by_target(results, others, targets), spent(results, shown)),
        tuple(_panel(results, way, others, highest) for way in (ALL, ROLLOUTS, SECONDS)),
    )


def _nothing(results: Results, shown: Mapping[str, str]) -> Finding:
    """Where some method surpasses the student with no certainty there is no accuracy to ask the price of."""
    before = results.level("student")
    best = {name: max(results.accuracy(arm) for arm in rungs(results, name)) for name in shown}
    short = [LADDERS[name] for name in shown if surely(results, name) <= before]
    reached = ", ".join(f"{LADDERS[name]} {percent(share)}%" for name, share in best.items())
    return Finding(
        "not",
        f"from {percent(before)}%: {reached}",
        f"The student begins at {percent(before)}%, and within these budgets that is not surpassed with any certainty by "
        f"{', '.join(short)}; so there is no accuracy of which all have a price. The best that each reached: {reached}.",
        (spent(results, shown),),
        tuple(_panel(results, way, list(shown)[1:], before) for way in (ALL, ROLLOUTS, SECONDS)),
    )


def verdict(sft: Mapping[str, Ratio], rl: Ratio) -> Verdict:
    """Reproduced if no published ratio is above our interval; partly if OPD is surely cheaper than SFT in one way at least."""
    claims = [(sft[way.name], way.sft or inf) for way in (STUDENT, GIVEN, ALL)] + [(rl, SECONDS.grpo or inf)]
    if all(low > 1 and high >= published for (_, low, high), published in claims):
        return "reproduced"
    return "partly" if any(low > 1 for _, low, _ in sft.values()) else "not"


def _was_run(results: Results, name: str) -> bool:
    try:
        return bool(rungs(results, name))
    except NotRun:
        return False


# ------------------------------------------------------------------ words


def _why(results: Results, highest: float, found: Mapping[tuple[str, str], Ratio], sft: Mapping[str, Ratio]) -> str:
    best = {name: max(results.accuracy(arm) for arm in rungs(results, name)) for name in ("opd", "sft", "grpo")}
    conditions = ("if the student's alone count", "if OPD's teacher counts too and SFT's text is given",
                  "if the writing of that text is paid")  # fmt: skip
    ways = zip((STUDENT, GIVEN, ALL), conditions, strict=True)
    told = ", ".join(f"{times(sft[way.name])} {when}{way.published('sft')}" for way, when in ways)
    seconds, flops = found[SECONDS.name, "grpo"], found[ALL.name, "grpo"]
    return (
        f"The student begins at {percent(results.level('student'))}% and its teacher has "
        f"{percent(results.level('teacher'))}%. To reach {percent(highest)}%, the highest accuracy that every method reaches "
        f"with some certainty, SFT on the teacher's text takes so many times OPD's FLOPs: {told}. RL takes {times(seconds)} its "
        f"CPU seconds{SECONDS.published('grpo')} and {times(flops)} its FLOPs, those of its teacher included, whom RL does "
        f"not need. The best that each reached: OPD {percent(best['opd'])}%, SFT {percent(best['sft'])}%, RL "
        f"{percent(best['grpo'])}%. Here all text was drawn and all runs were trained to the end of their own decay; the "
        "published cost of SFT is an extrapolation, and that of RL another team's run, in GPU hours. A ratio belongs to its "
        "accuracy: at lower ones it is another (second table). Batches and rates are those of the first seed that was best on "
        f"the dev split, which weighs most on {_least_steady(results)}, whose seeds differ most."
    )


def _least_steady(results: Results) -> str:
    """The method with an arm whose seeds differ most."""
    names = ("opd", "sft", "grpo")
    spread = {name: max(half_of_seeds(results.shares(arm)) for arm in rungs(results, name)) for name in names}
    return LADDERS[max(spread, key=spread.__getitem__)]


def _by_way(found: Mapping[tuple[str, str], Ratio], others: Sequence[str]) -> str:
    head = ("times the cost of OPD, full vocabulary", *(LADDERS[name] for name in others))
    rows = [(way.name, *(times(found[way.name, name]) + way.published(name) for name in others)) for way in WAYS]
    return table(head, rows, left=1)


def _by_target(results: Results, others: Sequence[str], targets: Sequence[float]) -> str:
    """FLOPs of OPD's teacher are counted in every column."""
    columns = [(name, way) for name in others for way in ((GIVEN, ALL) if name == "sft" else (ALL,))]
    names = {GIVEN.name: f"{LADDERS['sft']}, given", ALL.name: f"{LADDERS['sft']}, paid"}
    head = ("times OPD's FLOPs, at accuracy, %", *(names[w.name] if n == "sft" else LADDERS[n] for n, w in columns))
    rows = [
        (percent(target), *(times(ratio(results, name, "opd", way.count, target)) for name, way in columns))
        for target in targets
    ]
    return table(head, rows, left=1)


def _panel(results: Results, way: Way, others: Sequence[str], highest: float) -> Panel:
    before = results.level("student")
    lines = [Line(LADDERS[name], points(results, name, way.count)) for name in ("opd", *others)]
    if way is ALL:
        lines.append(Line("SFT, its text given", points(results, "sft", GIVEN.count), dashed=True))
    unit = {ALL.name: "GFLOP, teacher's included"}.get(way.name, way.name)
    levels = {"teacher": results.level("teacher"), "all reach this" if highest > before else "the student": highest}
    return Panel(f"accuracy against {way.name.partition(',')[0]}", unit, "accuracy", lines, levels, log_x=True)


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
    recipe={"rollout": {"max_tokens": 64}, "threads": 1},
    arms=tuple(arm for name, budgets in BUDGETS.items() for arm in arms_of(name, budgets)),
    rates=(5e-4, 1e-3, 2e-3),
    dev_problems=512,
    test_problems=1024,
    extensions=2,
    seeds=5,
    quick_arms=("opd-160-b8", "opd-sampled-320-b8", "sft-640-b8", "grpo-1600-b32"),
    claim=Claim(
        says="OPD reaches what SFT on the teacher's text reaches with 9x fewer FLOPs if that text is given, 18x if only the "
        "student's are counted, 30x if the teacher's writing is; and what RL reaches with a tenth of the GPU hours.",
        source="[Thinking Machines 2025](https://thinkingmachines.ai/blog/on-policy-distillation/), "
        "[Qwen3](https://arxiv.org/abs/2505.09388), table 21",
        short="SFT costs 18x, 9x, 30x (student's FLOPs, teacher's text given, paid), RL about 10x in GPU hours",
    ),
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
