"""The cost of a low rank: LoRA's gap to full fine-tuning after supervised fine-tuning, and after on-policy distillation."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.design import TOY, Arm, Experiment, merged
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.results import NotRun, Results
from kibitz.experiments.statistics import Estimate

RANKS = (1, 2, 4, 8, 16)
STARTS = {"undertrained": RANKS, "student": (1,)}
"""The model that learns, and the ranks it is tried with: one that lacks abilities, and one with a wrong rule to unlearn."""
STAGES = {"sft": "after SFT", "opd": "after OPD on top"}
PUBLISHED = {"sft": 0.13, "opd": 0.06}
FULL_RATES, LORA_RATES = (5e-4, 1e-3, 2e-3), (5e-3, 1e-2, 2e-2)


Place = tuple[str, int]
"""A start and a rank."""


def name(stage: str, start: str, rank: int | None) -> str:
    stem = stage if start == "student" else f"{stage}-{start}"
    return stem if rank is None else f"{stem}-r{rank}"


def _arm(stage: str, start: str, rank: int | None) -> Arm:
    student: dict[str, Any] = {} if rank is None else {"lora": {"rank": rank}}
    who = f"{start}, " + ("all weights" if rank is None else f"adapters of rank {rank}")
    rates = FULL_RATES if rank is None else LORA_RATES
    if stage == "sft":
        changes = {"method": {"type": "sft"}, "steps": 80, "student": student | {"model": start}}
        return Arm(name(stage, start, rank), f"{who}: right solutions from the data", changes, rates)
    origin = f"arm:{name('sft', start, rank)}"
    changes = {"method": {"type": "opd"}, "steps": 24, "student": student | {"model": origin}}
    return Arm(name(stage, start, rank), f"{who}: reverse KL, from where its SFT ended", changes, rates)


ARMS = tuple(_arm(stage, start, rank) for start, ranks in STARTS.items() for rank in (None, *ranks) for stage in STAGES)


def gap(results: Results, stage: str, place: Place) -> Estimate:
    """Return the accuracy of full fine-tuning minus LoRA's."""
    start, rank = place
    return results.difference(name(stage, start, None), name(stage, start, rank))


def narrows(gaps: dict[str, Estimate]) -> bool | None:
    """Return True if the gap after OPD is smaller, False if it is larger; None if the difference is within its interval."""
    (before, half), (after, other) = gaps["sft"], gaps["opd"]
    if abs(before - after) <= math.hypot(half, other):
        return None
    return after < before


def verdict(gaps: dict[Place, dict[str, Estimate]]) -> Verdict:
    """Reproduced: at some rank there is a gap after SFT and a smaller one after OPD, told apart, and at no rank the opposite.
    Partly: the gap becomes smaller at most of the ranks that have one after SFT, not told apart."""
    told = {rank: narrows(found) for rank, found in gaps.items()}
    lagging = [rank for rank, found in gaps.items() if found["sft"][0] > found["sft"][1]]
    smaller = [rank for rank in lagging if gaps[rank]["opd"][0] < gaps[rank]["sft"][0]]
    if any(told[rank] for rank in lagging) and False not in told.values():
        return "reproduced"
    return "partly" if 2 * len(smaller) > len(lagging) > 0 else "not"


def find(results: Results) -> Finding:
    """The gap at each rank, after each stage, of each start."""
    starts = {
        start: [rank for rank in ranks if results.has(*(name(stage, start, rank) for stage in STAGES))]
        for start, ranks in STARTS.items()
        if results.has(*(name(stage, start, None) for stage in STAGES))
    }
    places = [(start, rank) for start, ranks in starts.items() for rank in ranks]
    if not places:
        raise NotRun(name("sft", next(iter(STARTS)), RANKS[0]))
    gaps = {place: {stage: gap(results, stage, place) for stage in STAGES} for place in places}
    factors = [results.rate(name("sft", *place)) / results.rate(name("sft", place[0], None)) for place in gaps]
    numbers = {
        "gaps": gaps,
        "behind": {stage: [place for place, found in gaps.items() if found[stage][0] > found[stage][1]] for stage in STAGES},
        "smaller": [place for place, found in gaps.items() if narrows(found) is True],
        "larger": [place for place, found in gaps.items() if narrows(found) is False],
        "factors": (min(factors), max(factors)),
        "rows": [(start, rank, _cells(results, start, rank, gaps.get((start, rank), {})))
                 for start, ranks in starts.items() for rank in (*ranks, None)],
    }  # fmt: skip
    return Finding(verdict(gaps), numbers, [_panel(start, gaps, ranks) for start, ranks in starts.items() if ranks])


def _cells(results: Results, start: str, rank: int | None, gaps: Mapping[str, Estimate]) -> list[tuple[Any, ...]]:
    """Return accuracy, gap and learning rate of each stage."""
    arms = {stage: name(stage, start, rank) for stage in STAGES}
    return [(results.accuracy(arm), gaps.get(stage), results.rate(arm)) for stage, arm in arms.items()]


def _panel(start: str, gaps: dict[Place, dict[str, Estimate]], ranks: Sequence[int]) -> Panel:
    lines = [
        Line(words, [(r, 100 * gaps[start, r][stage][0], 100 * gaps[start, r][stage][1]) for r in ranks])
        for stage, words in STAGES.items()
    ]
    published = [
        Line(f"published, {words}", [(32, 100 * PUBLISHED[stage], 0.0)], joined=False)
        for stage, words in STAGES.items()
    ]
    return Panel(
        f"LoRA's gap to full fine-tuning: {start}", "rank", "points behind", [*lines, *published],
        log_x=True, percent=False, ticks={float(rank): str(rank) for rank in (*ranks, 32)},
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="lora",
    question="How far does LoRA stay behind full fine-tuning, after SFT and after OPD, at each rank?",
    world="arithmetic",
    recipe=merged(TOY, {"optim": {"warmup_steps": 6}}),
    arms=ARMS,
    rates=FULL_RATES,
    reference="opd",
    dev_problems=512,
    extensions=1,
    seeds=5,
    models={
        "student": "arithmetic/student",
        "teacher": "arithmetic/teacher",
        "undertrained": "arithmetic/undertrained",
    },
    quick_arms=("sft-undertrained", "opd-undertrained", "sft-undertrained-r4", "opd-undertrained-r4"),
    find=find,
)
