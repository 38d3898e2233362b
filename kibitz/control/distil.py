"""The loop of `kibitz control distil`: DAgger with VIPER's weights, for students that a person can read.

    D <- the teacher's states, with its actions
    for i in 1..N:  fit student_i to a sample of D;  play student_i;  D <- D + its states, with the teacher's actions
    return the student that is best in fresh validation episodes

DAgger (1011.0686) samples evenly; VIPER (Bastani et al., 1805.08328) with a probability proportional to what a wrong action
costs, l(s) = max_a Q(s,a) - min_a Q(s,a). Of a teacher that was trained by a policy gradient the log-probabilities stand for Q,
as in the soft policy of maximum entropy. Behaviour cloning (`bc`) has the teacher play in every iteration.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kibitz.config import RecipeError
from kibitz.control import export, frames, require, students
from kibitz.control.build import build_teacher
from kibitz.control.environments import Act, make, seeds_of, shape_of, visits
from kibitz.control.folder import Folder, newest, stop_if
from kibitz.control.recipe import DistilRecipe
from kibitz.control.rpd import TEACHERS, Asked, ControlRun, Progress, Row, evaluated, first_look, nobody
from kibitz.control.students import Labelled, Student
from kibitz.control.teachers import Answer, Teacher, reseed
from kibitz.files import write_atomically

TITLES = {"bc": "Behaviour cloning", "dagger": "DAgger", "viper": "VIPER"}
KINDS = {
    "tree": "a decision tree",
    "linear": "a linear rule",
    "polynomial": "a sparse polynomial",
    "symbolic": "a formula",
}
STORIES = {
    "bc": "{student} was fitted to what the teacher {teacher} does in {env}, in the states that the teacher comes to.",
    "dagger": "{student} played {env}, and was fitted again and again to what the teacher {teacher} would have done in the "
    "states that it came to.",
    "viper": "{student} played {env}, and was fitted again and again to what the teacher {teacher} would have done in the "
    "states that it came to; states in which a wrong action costs more count more.",
}
SIDE_BY_SIDE = 4
"""Episodes that are begun together when states are collected."""


def costs(logp_NK: np.ndarray) -> np.ndarray:
    """What a wrong action costs in each state, [N]: max_a log pi(a|s) - min_a log pi(a|s), in nats, in the place of VIPER's
    max_a Q - min_a Q."""
    return logp_NK.max(-1) - logp_NK.min(-1)


def sample(cost_N: np.ndarray | None, num: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of the states that a fit sees: with costs so many as there are, at most `most`, drawn with replacement, p ~ cost;
    without, all of them once, or an even sample."""
    if cost_N is None or cost_N.sum() == 0:
        return np.arange(num) if num <= most else rng.choice(num, most, replace=False)
    return rng.choice(num, min(num, most), p=cost_N / cost_N.sum())


@dataclass
class Collected:
    """All labelled states, in the order in which they were visited; `ends` is how many there were at each fit."""

    observed_NO: np.ndarray
    action: np.ndarray
    cost_N: np.ndarray | None
    ends: list[int] = field(default_factory=list)

    def fitted(self, recipe: DistilRecipe, shape: Any, iteration: int) -> Student:
        """The student of an iteration: a function of what was known then, so that it need not be stored."""
        end = self.ends[iteration]
        rng = np.random.default_rng([recipe.seed, iteration])
        cost_N = None if self.cost_N is None or recipe.method.type != "viper" else self.cost_N[:end]
        rows = sample(cost_N, end, recipe.method.most, rng)
        data = Labelled(self.observed_NO[rows], self.action[rows], np.ones(len(rows)))
        return students.fit(recipe.student, data, shape, recipe.seed + iteration)

    def add(self, observed_NO: np.ndarray, answer: Answer) -> None:
        cost_N = None if answer.logp_BK is None else costs(answer.logp_BK)
        if not len(self.ends):
            self.observed_NO, self.action, self.cost_N = observed_NO, answer.action, cost_N
        else:
            self.observed_NO = np.concatenate([self.observed_NO, observed_NO])
            self.action = np.concatenate([self.action, answer.action])
            both = self.cost_N is not None and cost_N is not None
            self.cost_N = np.concatenate([self.cost_N, cost_N]) if both else None  # pyright: ignore[reportArgumentType]
        self.ends.append(len(self.observed_NO))


def run(
    recipe: DistilRecipe,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    asked: Asked = nobody,
) -> ControlRun:
    """Fit, play and fit again as the recipe says; the best student's files stand in the run's folder. Stopped (a
    KeyboardInterrupt) between two iterations where it is `asked` to stop."""
    require()
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    shape = shape_of(make(recipe.env), recipe.env.id)
    teacher = build_teacher(recipe.teacher, shape)
    first = teacher.answer(first_look(recipe.env))
    if recipe.method.type == "viper" and first.logp_BK is None:
        raise RecipeError(
            "method.type: viper weighs states by the log-probabilities of discrete actions, and this teacher gives none: write "
            "method.type: dagger, or teacher.samples: 8 for discrete actions"
        )
    name = str(getattr(recipe.teacher, recipe.teacher.kind))
    told = STORIES[recipe.method.type].format(
        student=KINDS[recipe.student.type].capitalize(), teacher=name, env=recipe.env.id
    )
    title = f"{TITLES[recipe.method.type]} of {KINDS[recipe.student.type]}"
    folder = Folder(recipe, title, told, unit="iteration")
    with folder.open(resume, overwrite):
        loop = _Loop(recipe, teacher, shape, folder, asked)
        loop.take_up()
        if progress is not None:
            progress.start(Counted(recipe.method.iterations), len(loop.data.ends))
        for row in loop.rows():
            if progress is not None:
                progress.step(row["metrics"])
                progress.evaluated(row["evals"])
        loop.finish()
    return ControlRun(folder.path, folder.metrics.read(), folder.evals.read())


@dataclass(frozen=True)
class Counted:
    """What a progress bar asks a recipe for."""

    steps: int


@dataclass
class _Loop:
    """The iterations from a checkpoint on. A step is an iteration."""

    recipe: DistilRecipe
    teacher: Teacher
    shape: Any
    folder: Folder
    asked: Asked
    data: Collected = field(default_factory=lambda: Collected(np.empty(0), np.empty(0), None))
    students: dict[int, Student] = field(default_factory=dict)
    """Of iterations that this process has fitted; another would fit the same."""

    def take_up(self) -> None:
        checkpoint = newest(self.folder.path)
        if checkpoint is not None:
            with np.load(checkpoint / "data.npz", allow_pickle=False) as held:
                ends = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["ends"]
                cost_N = held.get("cost")
                self.data = Collected(held["observed"], held["action"], cost_N, ends)
        self.folder.begin(len(self.data.ends))

    def rows(self) -> Iterator[dict[str, Row]]:
        recipe = self.recipe
        for iteration in range(len(self.data.ends), recipe.method.iterations):
            stop_if(self.asked(), iteration)
            begun = time.perf_counter()
            played, spent = self._collect(iteration)
            collected = time.perf_counter()
            student, step = self._student(iteration), iteration + 1
            seconds = {**spent, "training": time.perf_counter() - collected}
            seconds["sampling"] = collected - begun - spent["scoring"]
            metrics = {
                "step": step, "states": self.data.ends[-1], "agreement": played, **student.size(), "seconds": seconds,
                "flops": self._flops(iteration),
            }  # fmt: skip
            row = evaluated(student.act, recipe.env, "validation", recipe.seed, recipe.method.validation)
            self.folder.metrics.append(metrics)
            self.folder.evals.append({"step": step, **row})
            self._save(step)
            yield {"metrics": metrics, "evals": {"step": step, **row}}

    def _flops(self, iteration: int) -> dict[str, float]:
        """Of the states that an iteration added: those of who played them, and of the teacher who answered."""
        ends = self.data.ends
        new = ends[iteration] - (ends[iteration - 1] if iteration else 0)
        if self._by_teacher(iteration):
            return {"teacher_scoring": 2 * new * self.teacher.flops}
        played = new * students.operations(self._student(iteration - 1))
        return {"student_sampling": float(played), "teacher_scoring": new * self.teacher.flops}

    def _by_teacher(self, iteration: int) -> bool:
        return iteration == 0 or self.recipe.method.type == "bc"

    def _collect(self, iteration: int) -> tuple[float | None, dict[str, float]]:
        """Add states; returns how often the student that visited them acted as the teacher would have, and how long the teacher
        took to answer."""
        reseed(self.teacher, seeds_of(f"teacher {iteration}", self.recipe.seed, 1)[0])
        by_teacher = self._by_teacher(iteration)
        player = None if by_teacher else self._student(iteration - 1)
        act: Act = (lambda seen: self.teacher.answer(seen).action) if player is None else player.act
        observed, acted = states(act, self.recipe, iteration)
        begun = time.perf_counter()
        answer = self.teacher.answer(observed)
        spent = {"scoring": time.perf_counter() - begun}
        self.data.add(observed, answer)
        return (None if by_teacher else students.agreement(acted, answer.action, self.shape)), spent

    def _student(self, iteration: int) -> Student:
        if iteration not in self.students:
            self.students[iteration] = self.data.fitted(self.recipe, self.shape, iteration)
        return self.students[iteration]

    def _save(self, step: int) -> None:
        def write(folder: Path) -> None:
            data = self.data
            costs = {} if data.cost_N is None else {"cost": data.cost_N}
            arrays: Any = {"observed": data.observed_NO, "action": data.action, **costs}
            np.savez_compressed(folder / "data.npz", **arrays)
            write_atomically(folder / "state.json", json.dumps({"ends": data.ends}))

        self.folder.save(step, write)

    def finish(self) -> None:
        """Measure the best iterate by validation on episodes that chose nothing, and the teacher on the same; write its files."""
        recipe, folder = self.recipe, self.folder
        rows = [row for row in folder.evals.read() if row["split"] == "validation"]
        best = max(rows, key=lambda row: row["return"]["mean"])["step"]
        student = self._student(best - 1)
        names = students.names_of(recipe.env.id, self.shape.num_observed)
        section = export.write(student, names, folder.path)
        by_teacher: Act = lambda seen: self.teacher.answer(seen).action  # noqa: E731
        theirs = evaluated(by_teacher, recipe.env, "fresh episodes", recipe.seed, recipe.eval.last)
        folder.note({"step": len(self.data.ends), **theirs, "split": TEACHERS})
        fresh = evaluated(student.act, recipe.env, "fresh episodes", recipe.seed, recipe.eval.last)
        folder.note({"step": len(self.data.ends), **fresh})
        observed, acted = states(student.act, recipe, recipe.method.iterations + 1)
        alike = students.agreement(acted, self.teacher.answer(observed).action, self.shape)
        section["words"] = f"{words(student, best, fresh, theirs, alike)} {section['words']}".strip()
        drawn = [frames.section(folder.path, "after.png", "An episode of the student")] if recipe.eval.frames else []
        folder.show([section, *drawn])
        folder.finish(
            best_iterate=best, agreement_on_own_states=alike, teacher_return=theirs["return"]["mean"], **student.size()
        )


def words(student: Student, best: int, ours: Row, theirs: Row, alike: float) -> str:
    """What a person wants to know first of a policy: how large it is, what it is worth, and how far it is its teacher's."""
    sizes = ", ".join(f"{what} {size}" for what, size in student.size().items())
    returns = [row["return"]["mean"] for row in (ours, theirs)]
    return (
        f"The student of iteration {best}, which was best in validation ({sizes}). Its mean return in "
        f"{ours['num_episodes']} fresh episodes is {returns[0]:.4g}, its teacher's in the same ones {returns[1]:.4g}. Where it "
        f"comes to, it acts as its teacher would have in {alike:.1%} of the states."
    )


def states(act: Act, recipe: DistilRecipe, iteration: int) -> tuple[np.ndarray, np.ndarray]:
    """The observations and actions of whole episodes, until there are `method.steps` of them."""
    observed, acted = [], []
    seeds = seeds_of(f"states {iteration}", recipe.seed, 1000)
    for first in range(0, len(seeds), SIDE_BY_SIDE):
        for moment in visits(act, recipe.env, seeds[first : first + SIDE_BY_SIDE]):
            observed += [visit.observation_O for visit in moment]
            acted += [visit.action for visit in moment]
        if len(observed) >= recipe.method.steps:
            break
    return np.stack(observed), np.stack(acted)
