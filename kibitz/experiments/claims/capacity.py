"""Sizes: does a small student gain less from a teacher, and can a teacher be too large for it?"""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.design import Arm, Claim, Experiment
from kibitz.experiments.evidence import Finding, Verdict, percent
from kibitz.experiments.make_world import FROM_NOTHING, MISLED
from kibitz.experiments.results import Estimate, NotRun, Results
from kibitz.experiments.statistics import apart
from kibitz.experiments.tables import table

STUDENTS: Mapping[str, str] = {"small": "student-small", "medium": "student", "large": "student-large"}
TEACHERS: Mapping[str, str] = {"small": "teacher-small", "medium": "teacher", "large": "teacher-large"}
"""Size -> role. What is small for a teacher is medium for a student."""


def _from_nothing(name: str, shape: str, steps: int) -> Arm:
    """As `kibitz worlds make arithmetic` trains its models."""
    changes = {
        "student": {"model": f"blank:{shape}"},
        "method": {"type": "sft"},
        "rollout": {"prompts_per_step": 32},
        "optim": {**FROM_NOTHING, "tokens_per_micro_batch": 1024},
        "steps": steps,
    }
    return Arm(name, f"{shape}, from nothing", changes, rates=(FROM_NOTHING["lr"],), data="wide")


def _misled(name: str, model: str) -> Arm:
    changes = {"student": {"model": model}, "method": {"type": "sft"}, "optim": MISLED, "steps": 200}
    return Arm(name, f"{model}, on solutions that misread", changes, rates=(MISLED["lr"],), data="misread")


def _cell(student: str, teacher: str) -> Arm:
    changes: dict[str, Any] = {
        "student": {"model": STUDENTS[student]}, "teacher": {"model": TEACHERS[teacher]}, "method": {"type": "opd"}
    }  # fmt: skip
    return Arm(f"{student}-from-{teacher}", f"a {student} student from a {teacher} teacher", changes)


# ------------------------------------------------------------------ what it says


def grid(results: Results) -> dict[str, dict[str, Estimate]]:
    """student -> teacher -> accuracy, of the pairs that were run."""
    found: dict[str, dict[str, Estimate]] = {}
    for student in STUDENTS:
        for teacher in TEACHERS:
            if results.has(f"{student}-from-{teacher}"):
                found.setdefault(student, {})[teacher] = results.accuracy(f"{student}-from-{teacher}")
    if len(found) < 2 or min(map(len, found.values())) < 2:
        raise NotRun("small-from-large")
    return found


def closed(results: Results, student: str, teacher: str, found: Estimate) -> Estimate:
    """The share of the way from the student to the teacher, and half its interval."""
    start, top = results.level(STUDENTS[student]), results.level(TEACHERS[teacher])
    way = top - start
    return ((found[0] - start) / way, abs(found[1] / way)) if way else (0.0, 0.0)


def verdict(
    shares: Mapping[str, Mapping[str, Estimate]], ends: Mapping[str, Mapping[str, Estimate]], ablest: bool = True
) -> Verdict:
    """The claim has two halves: of the way to the largest teacher the smallest student goes a smaller share than the largest
    one; and some student ends lower under the largest teacher than under a smaller one, though the largest is the `ablest`."""
    less = gains_less(shares)
    worse = ablest and bool(too_large(ends))
    return "reproduced" if less and worse else "partly" if less or worse else "not"


def gains_less(shares: Mapping[str, Mapping[str, Estimate]]) -> bool:
    smallest, *_, largest = shares
    teacher = list(shares[smallest])[-1]
    return teacher in shares[largest] and apart(shares[largest][teacher], shares[smallest][teacher])


def too_large(ends: Mapping[str, Mapping[str, Estimate]]) -> list[str]:
    """The students that the largest teacher is worse for than a smaller one."""
    found = []
    for student, by in ends.items():
        *smaller, largest = by.values()
        if any(apart(one, largest) for one in smaller):
            found.append(student)
    return found


def find(results: Results) -> Finding:
    """The share of the gap that each student closes under each teacher."""
    ends = grid(results)
    shares = {s: {t: closed(results, s, t, found) for t, found in by.items()} for s, by in ends.items()}
    teachers = list(dict.fromkeys(teacher for by in ends.values() for teacher in by))
    sizes = {student: _size(results, student, next(iter(by)), "student") for student, by in ends.items()}
    big = {
        teacher: _size(results, next(s for s in ends if teacher in ends[s]), teacher, "teacher") for teacher in teachers
    }
    head = ("student", "before, %", *(f"from {_millions(big[t])} ({percent(results.level(TEACHERS[t]))}%)" for t in teachers),
            "of the way to each, %")  # fmt: skip
    rows = [
        (
            f"{_millions(sizes[s])}", percent(results.level(STUDENTS[s])),
            *(percent(by[t]) if t in by else "–" for t in teachers),
            ", ".join(f"{100 * shares[s][t][0]:.0f} ± {100 * shares[s][t][1]:.0f}" for t in by),
        )
        for s, by in ends.items()
    ]  # fmt: skip
    last, (small, *_, large) = teachers[-1], ends
    return Finding(
        verdict(shares, ends, not _less_able(results, ends)),
        f"of the way to the largest teacher the smallest student goes {100 * shares[small][last][0]:.0f}%, the largest "
        f"{100 * shares[large][last][0]:.0f}%; {_worse(ends, sizes)}",
        _why(results, ends, shares, sizes),
        (table(head, rows),),
        _panels(results, ends, shares, sizes, big),
    )


def _worse(ends: Mapping[str, Mapping[str, Estimate]], sizes: Mapping[str, float]) -> str:
    hurt = too_large(ends)
    names = ", ".join(_millions(sizes[student]) for student in hurt)
    return (
        f"the largest teacher is worse than a smaller one for {names}"
        if hurt
        else "the largest teacher hurts none of them"
    )


def _why(results: Results, ends: Mapping, shares: Mapping, sizes: Mapping[str, float]) -> str:
    smallest = next(iter(ends))
    gains = "; ".join(
        f"{_millions(sizes[student])} parameters, from {percent(results.level(STUDENTS[student]))}%, by "
        f"{100 * (fmean(found[0] for found in by.values()) - results.level(STUDENTS[student])):.1f} points"
        for student, by in ends.items()
    )
    able = [r["dev"]["sampled"]["accuracy"] for r in results.made("small-able")]
    before = (
        f" Before it was taught to misread, the smallest solved {percent(able[0])}% itself, of the dev split: hardly more can be "
        "given back to it."
        if able and smallest == "small"
        else ""
    )
    less = "smaller" if gains_less(shares) else "not smaller, as far as can be told apart,"
    return (
        f"On average over the teachers the students gain: {gains}. The share of the way to the largest teacher is {less} for the "
        f"smallest student than for the largest.{before} As for the teachers, {_worse(ends, sizes)}, by the interval of the "
        f"difference.{_less_able(results, ends)} What differs from the published setting: models of one family on one task, all "
        "taught by the same recipe, so that a larger teacher does not think in another way, as a reasoning model does for a "
        "small student."
    )


def _less_able(results: Results, ends: Mapping) -> str:
    """Where the largest teacher is not the best one, size and accuracy cannot be told apart."""
    teachers = list(dict.fromkeys(teacher for by in ends.values() for teacher in by))
    levels = {teacher: results.level(TEACHERS[teacher]) for teacher in teachers}
    best = max(levels, key=levels.__getitem__)
    if levels[best] <= levels[teachers[-1]]:
        return ""
    return (
        f" The largest teacher is itself at {percent(levels[teachers[-1]])}%, a smaller one at {percent(levels[best])}%: what it "
        "does worse may be its accuracy, not its size."
    )


def _panels(results: Results, ends: Mapping, shares: Mapping, sizes: Mapping, big: Mapping) -> tuple[Panel, ...]:
    students = {size: _millions(size) for size in sizes.values()}
    teachers = {size: _millions(size) for size in big.values()}
    by_student = [
        Line(f"teacher {_millions(size)}", [(sizes[s], *by[teacher]) for s, by in shares.items() if teacher in by])
        for teacher, size in big.items()
    ]
    by_teacher = [
        Line(f"student {_millions(sizes[s])}", [(big[t], *found) for t, found in by.items()]) for s, by in ends.items()
    ]
    itself = Line("the teacher", [(size, results.level(TEACHERS[t]), 0.0) for t, size in big.items()], dashed=True)
    return (
        Panel("how far each student gets", "parameters of the student", "of the way to the teacher", by_student,
              log_x=True, ticks=students),
        Panel("what each teacher leads to", "parameters of the teacher", "accuracy", [*by_teacher, itself],
              log_x=True, ticks=teachers),
    )  # fmt: skip


def _size(results: Results, student: str, teacher: str, who: str) -> float:
    """Parameters, as the runs noted them; without a note, sizes in their order."""
    noted = results.runs(f"{student}-from-{teacher}")[0].get(f"{who}_params")
    return float(noted or 10 ** (1 + list(STUDENTS).index(student if who == "student" else teacher)))


def _millions(params: float) -> str:
    return (
        f"{params / 1e9:.1f}B" if params >= 1e9 else f"{params / 1e6:.2f}M" if params < 1e7 else f"{params / 1e6:.0f}M"
    )


EXPERIMENT = Experiment(
    name="capacity",
    question="Does a small student gain less from on-policy distillation, and can a teacher be too large for it?",
    world="arithmetic",
    recipe={
        "rollout": {"prompts_per_step": 64, "samples_per_prompt": 1, "max_tokens": 64},
        "optim": {"warmup_steps": 10},
        "threads": 1,
        "steps": 40,
    },
    makers=(
        _from_nothing("small-able", "32x2", 1200),
        _misled("small-misled", "arm:small-able"),
        _misled("large-misled", "teacher"),
        _from_nothing("able", "64x3", 1200),
        _from_nothing("huge", "128x5", 1200),
    ),
    arms=tuple(_cell(student, teacher) for student in STUDENTS for teacher in TEACHERS),
    rates=(1e-3, 2e-3),
    dev_problems=256,
    extensions=1,
    seeds=5,
    quick_arms=("small-from-medium", "small-from-large", "large-from-medium", "large-from-large"),
    models={
        "student": "arithmetic/student",
        "student-small": "arm:small-misled",
        "student-large": "arm:large-misled",
        "teacher": "arithmetic/teacher",
        "teacher-small": "arm:able",
        "teacher-large": "arm:huge",
    },
    data={
        "prompts": {"world": "arithmetic"},
        "wide": {"world": "arithmetic-wide"},
        "misread": {"world": "arithmetic", "options": {"corrupted": 0.9}},
    },
    claim=Claim(
        says="A student far smaller than its teacher gains less, and a teacher that is too large can be worse than a "
        "smaller one. Told as a rule (a teacher of 4 to 8 times the student's size; 32B better than 235B for 8B) without a "
        "table; what is published: Qwen3-8B taught Qwen3-8B-Base slightly better than Qwen3-32B, and distillation works where "
        "the models think alike and the teacher can do something new.",
        source="[Thinking Machines 2025](https://thinkingmachines.ai/blog/on-policy-distillation/), "
        "[Rethinking OPD](https://arxiv.org/abs/2604.13016)",
        short="a far smaller student gains less; a too large teacher can be worse",
    ),
    find=find,
)
