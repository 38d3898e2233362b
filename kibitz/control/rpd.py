"""The loop of `kibitz control rpd`: iterations of PPO with a teacher, evaluations by fresh episodes, checkpoints to go on from.

A checkpoint is a boundary in the uninterrupted run, too: there all environments begin new episodes, and all random numbers begin
from a seed of that step. So a run that was killed goes on bit for bit, whatever an environment would not save of itself.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import numpy as np
import torch
from scipy import stats
from stable_baselines3.common.utils import set_random_seed

from kibitz.control import frames, require
from kibitz.control.build import build_teacher
from kibitz.control.environments import Act, make, returns, seeds_of, shape_of, vectorised
from kibitz.control.folder import Folder, newest, stop_if
from kibitz.control.recipe import EnvConfig, RPDRecipe
from kibitz.control.taught import Episodes, TaughtPPO, check, plain
from kibitz.control.teachers import Teacher, reseed
from kibitz.control.terms import cosine
from kibitz.files import step_of, write_atomically

Row = dict[str, Any]
TITLES = {
    "ppo": "Reinforcement learning",
    "bc": "Behaviour cloning",
    "opd": "On-policy distillation of a policy",
    "rpd": "Refined policy distillation",
}
TEACHERS = "fresh episodes of the teacher"
"""The split of what the teacher is worth in the student's environment, on the episodes of the last evaluation."""
STORIES = {
    "ppo": "A policy played {env} and learnt from the reward alone (PPO).",
    "bc": "The teacher {teacher} played {env}, and a policy learnt to do the same where the teacher had been.",
    "opd": "A policy played {env}, and learnt in every state that it came to what the teacher {teacher} would have done there.",
    "rpd": "A policy played {env} and learnt from the reward and, in every state that it came to, from what the teacher "
    "{teacher} would have done there (PPO with a term of weight {weight:g}{anneal}).",
}


class Progress(Protocol):
    """Told of every iteration and evaluation; the bar of the command line is one."""

    def start(self, recipe: Any, first_step: int) -> None: ...
    def step(self, row: Row) -> None: ...
    def evaluated(self, row: Row) -> None: ...


@dataclass(frozen=True)
class ControlRun:
    """What a finished run left."""

    folder: Path
    metrics: list[Row]
    evals: list[Row]


Asked = Callable[[], int]
"""Says which signal asks a run to stop; 0: none."""


def nobody() -> int:
    return 0


def run(
    recipe: RPDRecipe,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    asked: Asked = nobody,
) -> ControlRun:
    """Train as the recipe says; ValueError for what cannot be, TeacherError for a teacher that fails, Stopped (a
    KeyboardInterrupt) between two iterations where it is `asked` to stop."""
    require()
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    shape = shape_of(make(recipe.env), recipe.env.id)
    teacher = build_teacher(recipe.teacher, shape) if recipe.teacher else None
    folder = Folder(recipe, TITLES[recipe.method.type], story(recipe))
    set_random_seed(recipe.seed)
    model = TaughtPPO(recipe, teacher, vectorised(recipe.env), shape)
    first = None if teacher is None else teacher.answer(first_look(recipe.env))
    if teacher is not None:
        check(model.lesson, shape, first)
    with folder.open(resume, overwrite):
        loop = _Loop(recipe, model, folder, asked)
        loop.take_up()
        if progress is not None:
            progress.start(recipe, loop.done)
        for kind, row in loop.rows():
            if progress is not None:
                (progress.step if kind == "metrics" else progress.evaluated)(row)
        folder.finish(student_params=sum(p.numel() for p in model.policy.parameters()))
    return ControlRun(folder.path, folder.metrics.read(), folder.evals.read())


def first_look(env: EnvConfig) -> np.ndarray:
    """The observation an episode begins with, as a batch of one."""
    return make(env).reset(seed=0)[0][None]


def story(recipe: RPDRecipe) -> str:
    method, teacher = recipe.method, recipe.teacher
    name = "" if teacher is None else str(getattr(teacher, teacher.kind))
    anneal = "" if method.anneal is None else f" that falls to 0 by {method.anneal:.0%} of the steps"
    return STORIES[method.type].format(env=recipe.env.id, teacher=name, weight=method.weight, anneal=anneal)


def act_of(model: Any) -> Act:
    """The policy without chance."""
    return lambda seen_BO: model.predict(seen_BO, deterministic=True)[0]


def evaluated(act: Act, env: EnvConfig, split: str, seed: int, num: int) -> Row:
    """A row of `evals.jsonl`: the mean return of fresh episodes with its 95% interval (Student's t, over episodes; of one
    episode there is none)."""
    found = returns(act, env, seeds_of(split, seed, num))
    mean = float(found.mean())
    half = float(stats.t.ppf(0.975, num - 1) * stats.sem(found)) if num > 1 else 0.0
    return {
        "split": split, "num_episodes": num,
        "return": {"mean": mean, "low": mean - half, "high": mean + half, "least": float(found.min())},
    }  # fmt: skip


@dataclass
class _Loop:
    """Iterations from a checkpoint on. `done` counts steps of the environment."""

    recipe: RPDRecipe
    model: TaughtPPO
    folder: Folder
    asked: Asked
    done: int = 0
    ended: bool = False
    shown: list[Row] = field(default_factory=list)

    def take_up(self) -> None:
        """Begin, or go on from the newest checkpoint."""
        checkpoint = newest(self.folder.path)
        if checkpoint is not None:
            self.model.set_parameters(str(checkpoint / "policy.zip"), device="cpu")
            state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
            self.done, self.ended = step_of(checkpoint), state["ended"]
            self.model.num_timesteps = self.done
            self.shown = self.folder.seen("before.png", "An episode before training")
        self.folder.begin(self.done)

    def rows(self) -> Iterator[tuple[str, Row]]:
        recipe, size = self.recipe, self.recipe.ppo.num_steps * self.recipe.env.num_envs
        episodes = Episodes()
        if self.done == 0:
            row = self._evaluate("episodes", recipe.eval.episodes)
            self._save()
            yield "evals", row
            if self.model.lesson.teacher is not None and recipe.eval.teacher:
                yield "evals", self._measure(self.model.lesson.teacher)
            self._draw("before.png", "An episode before training")
        while self.done < recipe.steps and not self.ended:
            self._fresh()
            for _ in range(recipe.eval.every):
                stop_if(self.asked(), self.done)
                yield "metrics", self._iterate(size, episodes)
                if self.done >= recipe.steps:
                    break
            row = self._evaluate("episodes", recipe.eval.episodes)
            self.ended = recipe.stop_at is not None and row["return"]["mean"] >= recipe.stop_at
            self._save()
            yield "evals", row
        yield "evals", self._evaluate("fresh episodes", recipe.eval.last)
        self._draw("after.png", "An episode after training")
        self.folder.show(self.shown)

    def _draw(self, name: str, title: str) -> None:
        if self.recipe.eval.frames:
            self.shown.append(frames.section(self.folder.path, name, title))

    def _fresh(self) -> None:
        """All chance begins from a seed of this step, and all environments begin new episodes."""
        (seed,) = seeds_of(f"from {self.done}", self.recipe.seed, 1)
        set_random_seed(seed)
        reseed(self.model.lesson.teacher, seed)
        env = self.model.env
        assert env is not None
        env.seed(seed)
        self.model.set_env(env, force_reset=True)

    def _iterate(self, size: int, episodes: Episodes) -> Row:
        method, lesson = self.recipe.method, self.model.lesson
        lesson.weight = (
            0.0 if method.type == "ppo" else method.weight * cosine(self.done / self.recipe.steps, method.anneal)
        )
        episodes.ended.clear()
        self.model.learn(size, callback=episodes, reset_num_timesteps=False)
        self.done = self.model.num_timesteps
        values = self.model.logger.name_to_value
        row = {
            "step": self.done,
            "loss": float(values["train/loss"]),
            "reward": fmean(episodes.ended) if episodes.ended else None,
            "teacher_term": fmean(lesson.heard) if lesson.heard else None,
            "teacher_weight": lesson.weight,
            "value_loss": float(values["train/value_loss"]),
            "clipped": float(values["train/clip_fraction"]),
            "seconds": dict(self.model.seconds),
            "flops": self._flops(size),
        }
        self.folder.metrics.append(row)
        return row

    def _flops(self, size: int) -> dict[str, float]:
        """Two for each weight of a matrix and observation, thrice that to learn from it."""
        once = 2.0 * size * sum(p.numel() for p in self.model.policy.parameters() if p.dim() > 1)
        teacher, lesson = self.model.lesson.teacher, self.model.lesson
        asked = (lesson.weight > 0) + (self.recipe.method.type == "bc")
        found = {"student_sampling": once, "student_training": 3 * once * self.recipe.ppo.epochs}
        return found | (
            {"teacher_scoring": asked * size * teacher.flops} if teacher is not None and teacher.flops else {}
        )

    def _evaluate(self, split: str, num: int) -> Row:
        row = {"step": self.done, **evaluated(act_of(self.model), self.recipe.env, split, self.recipe.seed, num)}
        self.folder.note(row)
        return row

    def _measure(self, teacher: Teacher) -> Row:
        """What the teacher is worth, known before anything is learnt: the level that the student is to pass."""
        act: Act = lambda seen: teacher.answer(seen).action  # noqa: E731
        found = evaluated(act, self.recipe.env, "fresh episodes", self.recipe.seed, self.recipe.eval.last)
        row = {"step": 0, **found, "split": TEACHERS}
        self.folder.note(row)
        return row

    def _save(self) -> None:
        ended = self.ended

        def write(folder: Path) -> None:
            model = plain(self.recipe, self.model.env)
            model.policy.load_state_dict(self.model.policy.state_dict())
            model.policy.optimizer.load_state_dict(self.model.policy.optimizer.state_dict())
            model.num_timesteps = self.done
            model.save(folder / "policy.zip")
            write_atomically(folder / "state.json", json.dumps({"ended": ended}))

        self.folder.save(self.done, write)
