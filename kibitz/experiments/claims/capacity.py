"""Sizes: does a small student gain less from a teacher, and can a teacher be too large for it?"""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.design import TOY, Arm, Experiment
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.formats import params
from kibitz.experiments.make_world import FROM_NOTHING, MISLED
from kibitz.experiments.results import NotRun, Results
from kibitz.experiments.shapes import Grid, grid, lines, turned
from kibitz.experiments.statistics import Estimate, apart, share_of_way

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


def pair(student: str, teacher: str) -> str:
    return f"{student}-from-{teacher}"


def _cell(student: str, teacher: str) -> Arm:
    changes: dict[str, Any] = {
        "student": {"model": STUDENTS[student]}, "teacher": {"model": TEACHERS[teacher]}, "method": {"type": "opd"}
    }  # fmt: skip
    return Arm(pair(student, teacher), f"a {student} student from a {teacher} teacher", changes)


# ------------------------------------------------------------------ what it says


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
    ends = grid(results, STUDENTS, TEACHERS, pair)
    if len(ends) < 2 or min(map(len, ends.values())) < 2:
        raise NotRun("small-from-large")
    before = {student: results.level(STUDENTS[student]) for student in ends}
    teachers = {teacher: results.level(TEACHERS[teacher]) for by in ends.values() for teacher in by}
    shares = {s: {t: share_of_way(before[s], end, teachers[t]) for t, end in by.items()} for s, by in ends.items()}
    sizes = {student: _size(results, student, next(iter(by)), "student") for student, by in ends.items()}
    big = {
        teacher: _size(results, next(s for s in ends if teacher in ends[s]), teacher, "teacher") for teacher in teachers
    }
    last, (small, *_, large) = list(teachers)[-1], ends
    able = [run["dev"]["sampled"]["accuracy"] for run in results.made("small-able")]
    numbers = {
        "before": before,
        "ends": ends,
        "shares": shares,
        "sizes": sizes,
        "big": big,
        "teachers": teachers,
        "gains": {s: fmean(found[0] for found in by.values()) - before[s] for s, by in ends.items()},
        "able": able[0] if able else None,
        "smallest": shares[small].get(last),
        "largest": shares[large].get(last),
        "hurt": [sizes[student] for student in too_large(ends)],
        "last": teachers[last],
        "ablest": max(teachers.values()),
    }
    return Finding(
        verdict(shares, ends, ablest=teachers[last] >= max(teachers.values())), numbers,
        _panels(ends, shares, sizes, big, teachers),
    )  # fmt: skip


def _panels(ends: Grid, shares: Grid, sizes: Mapping, big: Mapping, teachers: Mapping[str, float]) -> tuple[Panel, ...]:
    itself = Line("the teacher", [(size, teachers[t], 0.0) for t, size in big.items()], dashed=True)
    by_student = lines(turned(shares), sizes.__getitem__, lambda teacher: f"teacher {params(big[teacher])}")
    by_teacher = lines(ends, big.__getitem__, lambda student: f"student {params(sizes[student])}")
    return (
        Panel("how far each student gets", "parameters of the student", "of the way to the teacher", by_student,
              log_x=True, ticks={size: params(size) for size in sizes.values()}),
        Panel("what each teacher leads to", "parameters of the teacher", "accuracy", [*by_teacher, itself],
              log_x=True, ticks={size: params(size) for size in big.values()}),
    )  # fmt: skip


def _size(results: Results, student: str, teacher: str, who: str) -> float:
    """Parameters, as the runs noted them; without a note, sizes in their order."""
    noted = results.runs(pair(student, teacher))[0].get(f"{who}_params")
    return float(noted or 10 ** (1 + list(STUDENTS).index(student if who == "student" else teacher)))


EXPERIMENT = Experiment(
    name="capacity",
    question="Does a small student gain less from on-policy distillation, and can a teacher be too large for it?",
    world="arithmetic",
    recipe=TOY,
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
    find=find,
)
