"""Is one prompt enough, if the student answers it often? From how many on does it learn what the prompts have in common?"""

import math
from collections.abc import Iterator
from statistics import fmean

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.design import Arm, Claim, Experiment
from kibitz.experiments.evidence import Finding, percent
from kibitz.experiments.records import Record, half_of_seeds, measure, share_with_interval
from kibitz.experiments.results import Estimate, NotRun, Results
from kibitz.experiments.tables import table

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
    """How far each number of prompts brings a student on problems that it was not trained on."""
    kinds = [kind for kind in LENGTHS if results.has(_name(kind, 1), _name(kind, 0))]
    if not kinds:
        raise NotRun(_name("short", 1))
    one = {kind: _way(results, _name(kind, 1), kind) for kind in kinds}
    everything = {kind: _way(results, _name(kind, 0), kind) for kind in kinds}
    nears = [kind for kind in kinds if one[kind][0] >= ENOUGH * everything[kind][0] and one[kind][0] > one[kind][1]]
    gains = [kind for kind in kinds if one[kind][0] > one[kind][1]]
    verdict = "reproduced" if nears else "partly" if gains else "not"
    told = "; ".join(
        f"one {kind} prompt {_signed(one[kind])}, {_inviting(results, kind)}ever new ones {_signed(everything[kind])}"
        for kind in kinds
    )
    why = (
        f"Of the way from the student to the teacher, in {_steps(results, kinds[0])} steps of {_expressions(results, kinds[0])} "
        f"expressions, measured on problems that nobody was trained on: {told}. {' '.join(_begins(results, k) for k in kinds)} "
        f"{_greedily(results, kinds[-1])} "
        "A step answers as many expressions whether the prompts are short or long, so a long prompt is eight problems at once. "
        "Before and after meet the same problems, so a share of the way is known better than the accuracies at its ends. "
        f"Published is one mathematics prompt whose answers have thousands of tokens; here they have {_tokens(results, kinds)} "
        "tokens, and show the student few of the cases that it gets wrong."
    )
    ours = "; ".join(
        f"one {kind} prompt goes {_signed(one[kind])} of the way, ever new ones {_signed(everything[kind])}"
        for kind in kinds
    )
    return Finding(verdict, ours, why, (_table(results, kinds),), _panels(results, kinds))


def _greedily(results: Results, kind: str) -> str:
    levels = [results.level(role, "greedy", kind) for role in ("student", "teacher")]
    one = fmean(results.shares(_name(kind, 1), "greedy"))
    before, teacher, after = (percent(share) for share in (*levels, one))
    return f"Greedily one {kind} prompt goes from {before} to {after}%, with a teacher at {teacher}%."


def _tokens(results: Results, kinds: list[str]) -> str:
    student = results.model("student")
    return " and ".join(f"{measure(student, kind)['response_tokens']:.0f}" for kind in kinds)


def _way(results: Results, arm: str, kind: str) -> Estimate:
    """The share of the way from the student's accuracy to the teacher's, below zero if it got worse. Before and after meet
    the same problems: its interval is that of seeds, and of the student's accuracy as if each expression were drawn anew."""
    student, teacher = _levels(results, kind)
    ends = results.shares(arm)
    expressions = measure(results.model("student"), kind)["num_prompts"] * LENGTHS[kind]
    half = math.hypot(half_of_seeds(ends), share_with_interval([student], expressions)[1])
    gap = teacher - student
    return ((fmean(ends) - student) / gap, half / abs(gap)) if gap else (0.0, math.inf)


def _levels(results: Results, kind: str) -> tuple[float, float]:
    return results.level("student", name=kind), results.level("teacher", name=kind)


def _inviting(results: Results, kind: str) -> str:
    name = _name(kind, 1, INVITING)
    return f"one of only misreadable expressions {_signed(_way(results, name, kind))}, " if results.has(name) else ""


def _begins(results: Results, kind: str) -> str:
    """From how many prompts on the student learns anything, and nearly all."""
    ways = {count: _way(results, _name(kind, count), kind) for count in COUNTS if results.has(_name(kind, count))}
    limit = ENOUGH * ways[0][0]
    learns = [count for count, (mean, half) in ways.items() if count and mean > half]
    enough = [count for count, (mean, _) in ways.items() if count and mean >= limit > 0]
    plural = "" if LENGTHS[kind] == 1 else "s"
    helps = (
        f"from {min(learns)} on they help beyond the interval"
        if learns
        else "no number tried helps beyond the interval"
    )
    most = f"{min(enough)} bring" if enough else "none brings"
    return (
        f"Of {kind} prompts, of {LENGTHS[kind]} expression{plural} each, {helps}, and {most} {100 * ENOUGH:.0f}% of what ever "
        "new ones bring."
    )


def _signed(way: Estimate) -> str:
    return f"{100 * way[0]:+.0f}% ± {100 * way[1]:.0f}"


def _expressions(results: Results, kind: str) -> int:
    rollout = results.runs(_name(kind, 1))[0]["settings"]["recipe"]["rollout"]
    return rollout["prompts_per_step"] * rollout["samples_per_prompt"] * LENGTHS[kind]


def _steps(results: Results, kind: str) -> int:
    return results.runs(_name(kind, 1))[0]["settings"]["recipe"]["steps"]


def _table(results: Results, kinds: list[str]) -> str:
    rows = []
    for kind in kinds:
        student, teacher = (results.model(role) for role in ("student", "teacher"))
        rows.append((f"*{kind}: the student before*", "", "", *_shares(student, kind), ""))
        for arm in results.experiment.arms:
            if arm.name.partition("-")[0] != kind or not results.has(arm.name):
                continue
            count = arm.changes.get("data", {}).get("limit")
            distinct = "–" if count is None else str(count * LENGTHS[kind])
            rows.append((
                arm.about, distinct, f"{results.rate(arm.name):g}", percent(results.accuracy(arm.name)),
                percent(results.accuracy(arm.name, "greedy")), _signed(_way(results, arm.name, kind)),
            ))  # fmt: skip
        rows.append((f"*{kind}: the teacher*", "", "", *_shares(teacher, kind), ""))
    return table(("trained on", "distinct problems", "rate", "T=1, %", "greedy, %", "of the way"), rows)


def _shares(model: Record, kind: str) -> tuple[str, str]:
    row = measure(model, kind)
    return percent(row["sampled"]["accuracy"]), percent(row["greedy"]["accuracy"])


def _panels(results: Results, kinds: list[str]) -> tuple[Panel, ...]:
    lines, by_problem = [], []
    last = 4 * max(COUNTS)
    for kind in kinds:
        found = [count for count in COUNTS if results.has(_name(kind, count))]
        ways = {count: _way(results, _name(kind, count), kind) for count in found}
        lines.append(Line(f"{kind} prompts", [(count or last, *way) for count, way in ways.items()]))
        by_problem.append(
            Line(f"{kind} prompts", [(count * LENGTHS[kind], *way) for count, way in ways.items() if count])
        )
    ticks = {float(count or last): str(count or "all") for count in COUNTS}
    return (
        Panel("what it brings", "distinct prompts", "of the way to the teacher", lines, log_x=True, ticks=ticks),
        Panel("the same, by problems", "distinct problems", "of the way to the teacher", by_problem, log_x=True),
    )


EXPERIMENT = Experiment(
    name="one-prompt",
    question="From how many prompts on does a student learn, when each is answered so often that all make as many steps?",
    world="arithmetic-long-1",
    recipe={
        "method": {"type": "opd"},
        "rollout": {"max_tokens": 256},
        "optim": {"warmup_steps": 5},
        "threads": 1,
        "steps": STEPS,
    },
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
    claim=Claim(
        says="One prompt, answered 256 times in each of 20 steps, approaches the teacher's accuracy on AIME'24.",
        source="[Thinking Machines 2025](https://thinkingmachines.ai/blog/on-policy-distillation/)",
        short="one prompt approaches the teacher",
    ),
    find=find,
)
