"""RL makes a teacher out of the base, and distillation brings the same base there: in how many steps, at what cost?"""

from dataclasses import replace

from kibitz.experiments.budgets import best, cheapest, ladder, panel, ratio, rungs, spent, surely
from kibitz.experiments.claims import cost
from kibitz.experiments.claims.cost import ALL, ROLLOUTS, SECONDS, STEPS, TOKENS, Way
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.results import Results

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
NAMES = {ALL.key: "GFLOP, its teacher's reading included"}
WAYS = (STEPS, ROLLOUTS, TOKENS, ALL, SECONDS)
PUBLISHED = {BACK: {STEPS.key: (7, 10)}, SHORT: {ALL.key: (50, 100)}}
PARTS = (0.95, 0.9, 0.8, 0.7, 0.6)
"""Of the RL teacher's gain over the base; those that RL's lowest budget has already are left out."""


def find(results: Results) -> Finding:
    """Ratios of RL's cost to OPD's, up to the highest accuracy that all reach and to parts of the RL teacher's gain."""
    highest = min(surely(results, name) for name in LADDERS)
    before, teacher = results.level("student"), results.accuracy(rungs(results, RL)[-1])
    gains = {part: before + part * (teacher[0] - before) for part in PARTS}
    gains = {part: target for part, target in gains.items() if target >= cheapest(results, RL)}

    def over(name: str, way: Way, target: float) -> Ratio:
        return ratio(results, RL, name, way.count, target)

    at = {name: {way.key: over(name, way, highest) for way in WAYS} for name in (BACK, SHORT)}
    last, first = rungs(results, BACK)[-1], results.runs(rungs(results, BACK)[0])[0]
    numbers = {
        "base": before,
        "teacher": teacher,
        "recovered": max(best(results, name) for name in (BACK, SHORT)),
        "kl_before": first["series"]["loss"][0],
        "kl_after": results.mean(last, lambda run: run["series"]["loss"][-1])[0],
        "highest": highest,
        "at": at,
        "batch": STEPS_BATCH,
        "ladders": LADDERS,
        "ways": [(NAMES.get(way.key, way.name), way.key) for way in WAYS],
        "published": PUBLISHED,
        "gains": [
            (part, target, over(BACK, STEPS, target), over(SHORT, ALL, target)) for part, target in gains.items()
        ],
        "spent": spent(results, LADDERS),
    }
    levels = {"the RL teacher": teacher[0], "the base": before}
    panels = [panel(results, LADDERS, way.count, NAMES.get(way.key, way.name), levels) for way in (STEPS, ALL)]
    return Finding(verdict(at[BACK][STEPS.key], at[SHORT][ALL.key]), numbers, panels)


def verdict(fewer: Ratio, cheaper: Ratio) -> Verdict:
    """Reproduced if neither published range lies above our interval; partly if OPD surely takes fewer steps."""
    if fewer[1] <= 1:
        return "not"
    asked = ((fewer, PUBLISHED[BACK][STEPS.key]), (cheaper, PUBLISHED[SHORT][ALL.key]))
    return "reproduced" if all(found[2] >= low for found, (low, _) in asked) else "partly"


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
    find=find,
)
