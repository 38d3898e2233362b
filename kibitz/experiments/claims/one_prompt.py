"""Is one prompt enough, if the student answers it often? From how many on does it learn what the prompts have in common?"""

import math
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

from kibitz.experiments.charts import Panel
from kibitz.experiments.design import TOY, Arm, Experiment, merged
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.records import half_of_seeds, measure, share_with_interval
from kibitz.experiments.results import NotRun, Results
from kibitz.experiments.shapes import lines
from kibitz.experiments.statistics import Estimate, share_of_way

COUNTS = (1, 4, 16, 64, 0)  # of distinct prompts; 0: a new one each time
SAMPLES = 128  # expressions that a step answers: as many short responses, or an eighth as many of eight each
STEPS = 20
LENGTHS = {"short": 1, "long": 8}  # expressions in a prompt
INVITING = "inviting"
ENOUGH = 0.75  # of the way from the student to the teacher


def _arms() -> Iterator[Arm]:
    for kind, length in LENGTHS.items():
        samples = SAMPLES // length
        for count in COUNTS:
            yield _arm(kind, count, min(count or samples, samples), samples)
        yield _arm(kind, 1, 1, samples, INVITING)


def _arm(kind: str, count: int, at_once: int, samples: int, which: str = "") -> Arm:
    rollout = {"prompts_per_step": at_once, "samples_per_prompt": samples // at_once}
    told = f"{count or 'ever new'} {kind} prompt{'' if count == 1 else 's'}"
    return Arm(
        _name(kind, count, which),
        told + (", in which the student errs often" if which else ""),
        {"rollout": rollout} | ({"data": {"limit": count}} if count else {}),
        data=f"{kind}-{which}" if which else kind,
        measures=(kind,),
    )


def _name(kind: str, count: int, which: str = "") -> str:
    return "-".join(part for part in (kind, str(count or "all"), which) if part)


# ------------------------------------------------------------------ what came out


def find(results: Results) -> Finding:
    """Measure the student's gain on held-out problems for each number of training prompts."""
    kinds = [kind for kind in LENGTHS if results.has(_name(kind, 1), _name(kind, 0))]
    if not kinds:
        raise NotRun(_name("short", 1))
    ways = {
        kind: {count: way(results, _name(kind, count), kind) for count in COUNTS if results.has(_name(kind, count))}
        for kind in kinds
    }
    run, student = results.runs(_name(kinds[0], 1))[0]["settings"]["recipe"], results.model("student")
    last = _name(kinds[-1], 1)
    numbers = {
        "steps": run["steps"],
        "expressions": run["rollout"]["prompts_per_step"] * run["rollout"]["samples_per_prompt"] * LENGTHS[kinds[0]],
        "lengths": LENGTHS,
        "share": ENOUGH,
        "ways": ways,
        "inviting": {kind: way(results, _name(kind, 1, INVITING), kind) for kind in kinds
                     if results.has(_name(kind, 1, INVITING))},
        "helps": {kind: [count for count, (mean, half) in ways[kind].items() if count and mean > half] for kind in kinds},
        "enough": {kind: [count for count, (mean, _) in ways[kind].items() if count and mean >= ENOUGH * ways[kind][0][0] > 0]
                   for kind in kinds},
        "last": kinds[-1],
        "greedy": {"before": results.level("student", "greedy", kinds[-1]), "one": fmean(results.shares(last, "greedy")),
                   "teacher": results.level("teacher", "greedy", kinds[-1])},
        "tokens": {kind: measure(student, kind)["response_tokens"] for kind in kinds},
        "levels": {kind: {role: measure(results.model(role), kind) for role in ("student", "teacher")} for kind in kinds},
        "rows": {kind: _rows(results, kind) for kind in kinds},
    }  # fmt: skip
    return Finding(verdict(ways), numbers, _panels(ways))


def verdict(ways: Mapping[str, Mapping[int, Estimate]]) -> Verdict:
    """`ways`: kind of prompts -> number of prompts -> share of the gap closed. Reproduced if one prompt of some kind helps, by
    more than its interval, and gives most of the gain of always new prompts; partly if it helps."""
    gains = [by for by in ways.values() if by[1][0] > by[1][1]]
    if any(by[1][0] >= ENOUGH * by[0][0] for by in gains):
        return "reproduced"
    return "partly" if gains else "not"


def way(results: Results, arm: str, kind: str) -> Estimate:
    """The share of the way from the student's accuracy to the teacher's, below zero if it got worse. Before and after meet
    the same problems: its interval is that of seeds, and of the student's accuracy as if each expression were drawn anew."""
    student, teacher = (results.level(role, name=kind) for role in ("student", "teacher"))
    ends = results.shares(arm)
    expressions = measure(results.model("student"), kind)["num_prompts"] * LENGTHS[kind]
    half = math.hypot(half_of_seeds(ends), share_with_interval([student], expressions)[1])
    return share_of_way(student, (fmean(ends), half), teacher) if teacher != student else (0.0, math.inf)


def _rows(results: Results, kind: str) -> list[dict[str, Any]]:
    """Return a row for each arm of a kind: its training data and its accuracy."""
    rows = []
    for arm in results.experiment.arms:
        if arm.name.partition("-")[0] == kind and results.has(arm.name):
            prompts = arm.changes.get("data", {}).get("limit")
            rows.append({
                "about": arm.about, "problems": prompts and prompts * LENGTHS[kind], "rate": results.rate(arm.name),
                "accuracy": results.accuracy(arm.name), "greedy": results.accuracy(arm.name, "greedy"),
                "way": way(results, arm.name, kind),
            })  # fmt: skip
    return rows


def _panels(ways: Mapping[str, Mapping[int, Estimate]]) -> tuple[Panel, ...]:
    last = 4 * max(COUNTS)
    ticks = {float(count or last): str(count or "all") for count in COUNTS}
    named = {f"{kind} prompts": by for kind, by in ways.items()}
    problems = {f"{kind} prompts": {count * LENGTHS[kind]: found for count, found in by.items() if count}
                for kind, by in ways.items()}  # fmt: skip
    y = "of the way to the teacher"
    return (
        Panel(
            "what it brings", "distinct prompts", y, lines(named, lambda count: count or last), log_x=True, ticks=ticks
        ),
        Panel("the same, by problems", "distinct problems", y, lines(problems), log_x=True),
    )


EXPERIMENT = Experiment(
    name="one-prompt",
    question="From how many prompts on does a student learn, when each is answered so often that all make as many steps?",
    world="arithmetic-long-1",
    recipe=merged(
        TOY,
        {"method": {"type": "opd"}, "rollout": {"max_tokens": 256}, "optim": {"warmup_steps": 5}, "steps": STEPS},
    ),
    arms=tuple(_arms()),
    rates=(5e-4, 1e-3, 2e-3),
    dev_problems=256,
    test_problems=512,
    extensions=3,
    seeds=5,
    quick_arms=("short-1", "short-all", "long-1", "long-all"),
    data={
        "short": {"world": "arithmetic-long-1"},
        "long": {"world": "arithmetic-long-8"},
        f"short-{INVITING}": {"world": "arithmetic-long-1", "options": {"inviting": 1.0}},
        f"long-{INVITING}": {"world": "arithmetic-long-8", "options": {"inviting": 1.0}},
        "short-each": {"world": "arithmetic-long-1", "options": {"reward": "share"}},
        "long-each": {"world": "arithmetic-long-8", "options": {"reward": "share"}, "limit": 64},
    },
    measures={"short": "short-each", "long": "long-each"},
    find=find,
)
