"""RL makes a teacher out of the base, and distillation brings the same base there: in how many steps, at what cost?"""

from collections.abc import Mapping
from dataclasses import replace

from kibitz.experiments.budgets import cheapest, ladder, points, ratio, rungs, spent, surely
from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.claims import cost
from kibitz.experiments.claims.cost import ALL, ROLLOUTS, SECONDS, STEPS, TOKENS, Way
from kibitz.experiments.design import Claim
from kibitz.experiments.evidence import Finding, Verdict, percent, times
from kibitz.experiments.results import Results
from kibitz.experiments.tables import table

Ratio = tuple[float, float, float]
"""How many times more, and its 95% interval."""

STEPS_BATCH = 64
BACK_STEPS = (2, 5, 10, 20, 40)
RL, BACK, SHORT = "grpo", "back", "short"
LADDERS = {
    RL: "RL (GRPO), which makes the teacher",
    BACK: f"OPD from it, {STEPS_BATCH} rollouts a step",
    SHORT: "OPD from it, small batches, short contexts",
}
NAMES = {ALL.name: "GFLOP, its teacher's reading included"}
WAYS = (STEPS, ROLLOUTS, TOKENS, ALL, SECONDS)
PUBLISHED = {(BACK, STEPS.name): (7, 10), (SHORT, ALL.name): (50, 100)}
PARTS = (0.95, 0.9, 0.8, 0.7, 0.6)
"""Of the RL teacher's gain over the base; those that RL's lowest budget has already are left out."""


def find(results: Results) -> Finding:
    """Ratios of RL's cost to OPD's, up to the highest accuracy that all reach and to parts of the RL teacher's gain."""
    highest = min(surely(results, name) for name in LADDERS)
    before, teacher = results.level("student"), results.accuracy(rungs(results, RL)[-1])
    gains = {part: before + part * (teacher[0] - before) for part in PARTS}
    gains = {part: target for part, target in gains.items() if target >= cheapest(results, RL)}
    found = {(name, way.name): ratio(results, RL, name, way.count, highest) for name in (BACK, SHORT) for way in WAYS}
    fewer, cheaper = found[BACK, STEPS.name], found[SHORT, ALL.name]
    recovered = max(results.accuracy(arm) for name in (BACK, SHORT) for arm in rungs(results, name))
    return Finding(
        verdict(fewer, cheaper),
        f"at {percent(highest)}% {times(fewer)} fewer steps, {times(cheaper)} fewer FLOPs",
        _why(results, highest, teacher, recovered, found),
        (_by_way(found), _by_part(results, gains), spent(results, LADDERS)),
        tuple(_panel(results, way, teacher[0]) for way in (STEPS, ALL)),
    )


def verdict(fewer: Ratio, cheaper: Ratio) -> Verdict:
    """Reproduced if neither published range lies above our interval; partly if OPD surely takes fewer steps."""
    if fewer[1] <= 1:
        return "not"
    asked = ((fewer, PUBLISHED[BACK, STEPS.name]), (cheaper, PUBLISHED[SHORT, ALL.name]))
    return "reproduced" if all(found[2] >= low for found, (low, _) in asked) else "partly"


# ------------------------------------------------------------------ words


def _why(
    results: Results,
    highest: float,
    teacher: tuple[float, float],
    recovered: tuple[float, float],
    found: Mapping[tuple[str, str], Ratio],
) -> str:
    last, first = rungs(results, BACK)[-1], results.runs(rungs(results, BACK)[0])[0]
    kl = results.mean(last, lambda run: run["series"]["loss"][-1])[0]
    start = first["series"]["loss"][0]
    return (
        f"RL brings the base from {percent(results.level('student'))}% to {percent(teacher)}%, and OPD from that teacher brings "
        f"the same base to {percent(recovered)}% at best; the reverse KL to it falls from {start:.3f} to {kl:.3f} nats a "
        f"token. To {percent(highest)}%, the highest accuracy that all reach with some certainty, RL takes "
        f"{times(found[BACK, STEPS.name])} the steps of OPD at {STEPS_BATCH} rollouts a step (published 7-10x), and "
        f"{times(found[SHORT, ALL.name])} the FLOPs of OPD with small batches and responses that are cut short at first, the "
        "reading of its teacher included (published 50-100x). RL is given several budgets, each with its own decay, batch and "
        "rate, and the first that suffices counts; the published RL is one run. Each seed has its own teacher. What "
        "the search of rates and batches cost is not counted on either side."
    )


def _by_way(found: Mapping[tuple[str, str], Ratio]) -> str:
    head = ("times the cost of", LADDERS[BACK], LADDERS[SHORT])

    def cell(name: str, way: Way) -> str:
        low_high = PUBLISHED.get((name, way.name))
        return times(found[name, way.name]) + (f" (published {low_high[0]}-{low_high[1]}x)" if low_high else "")

    return table(
        head, [(f"RL, in {NAMES.get(way.name, way.name)}", cell(BACK, way), cell(SHORT, way)) for way in WAYS], left=1
    )


def _by_part(results: Results, gains: Mapping[float, float]) -> str:
    head = ("of RL's gain", "accuracy, %", "steps", "FLOPs, small batches and short contexts")
    rows = [
        (f"{100 * part:.0f}%", percent(target), times(ratio(results, RL, BACK, STEPS.count, target)),
         times(ratio(results, RL, SHORT, ALL.count, target)))
        for part, target in gains.items()
    ]  # fmt: skip
    return table(head, rows, left=1)


def _panel(results: Results, way: Way, teacher: float) -> Panel:
    lines = [Line(about, points(results, name, way.count)) for name, about in LADDERS.items()]
    levels = {"the RL teacher": teacher, "the base": results.level("student")}
    name = NAMES.get(way.name, way.name)
    return Panel(f"accuracy against {name.partition(',')[0]}", name, "accuracy", lines, levels, log_x=True)


# ------------------------------------------------------------------ runs

TEACHER = {"teacher": {"model": f"arm:{RL}-{max(cost.BUDGETS[RL])}"}}
RL_ARMS = cost.arms_of(RL, cost.BUDGETS[RL])
BACK_ARMS = ladder(
    BACK, LADDERS[BACK], TEACHER | {"method": {"type": "opd"}}, {s * STEPS_BATCH: (STEPS_BATCH,) for s in BACK_STEPS}
)
SHORT_ARMS = ladder(
    SHORT,
    LADDERS[SHORT],
    TEACHER | {"method": {"type": "opd", "prefix_tokens": 8}},
    {160: (8, 16), 320: (8, 16), 640: (8, 16)},
)

EXPERIMENT = replace(
    cost.EXPERIMENT,
    name="distil-back",
    question="RL makes a teacher out of the base: how much sooner does distillation bring the same base there?",
    arms=(*RL_ARMS, *BACK_ARMS, *SHORT_ARMS),
    quick_arms=(RL_ARMS[-1].name, BACK_ARMS[0].name, SHORT_ARMS[0].name),
    series=("loss",),
    runs_in=cost.EXPERIMENT.name,
    claim=Claim(
        says="RL made a teacher in 70 steps; OPD from it brought the same base there in under 10, 7 to 10 times fewer, with 50 "
        "to 100 times less compute, by shorter contexts and smaller batches.",
        source="[Thinking Machines 2025](https://thinkingmachines.ai/blog/on-policy-distillation/)",
        short="distilling an RL model back into its base: 7-10x fewer steps, 50-100x less compute",
    ),
    find=find,
)
