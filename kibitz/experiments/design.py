"""What an experiment is: one recipe, arms that change it, and the models and problems that it is run on."""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kibitz import config, worlds
from kibitz.config import Recipe

ROLES = ("student", "teacher")
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Arm:
    """One way to train. `changes` go over the experiment's recipe, section by section; models are named by their role,
    `student` and `teacher`. `rates` replaces the experiment's where an arm needs others."""

    name: str
    about: str
    changes: Mapping[str, Any]
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """A recipe without models, data, rate and seed; its arms; how they are measured.

    Every arm tries each of `rates` once, on seed 0, and the best on the dev split is run with all seeds and measured on
    the test split. `reference` is the arm that the others are compared with.
    """

    name: str
    question: str
    world: str
    recipe: Mapping[str, Any]
    arms: tuple[Arm, ...]
    rates: tuple[float, ...]
    reference: str
    dev_problems: int = 512
    test_problems: int = 1024
    extensions: int = 2
    seeds: int = 3
    quick_arms: tuple[str, ...] = ()

    def quick(self) -> "Experiment":
        """The same in seconds, to see that all of it runs; its numbers say nothing."""
        recipe = merged(self.recipe, {"steps": 3, "rollout": {"prompts_per_step": 8}})
        arms = tuple(replace(arm, rates=()) for arm in self.choose(self.quick_arms))
        return replace(
            self, recipe=recipe, arms=arms, rates=self.rates[1:2], dev_problems=16, test_problems=16, extensions=0, seeds=1
        )  # fmt: skip

    def choose(self, names: Sequence[str]) -> tuple[Arm, ...]:
        """The arms of these names, all if none is given."""
        known = {arm.name: arm for arm in self.arms}
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"{self.name} has no arm {name!r}; did you mean {near!r}? It has: {', '.join(known)}")
        return tuple(known[name] for name in names) or self.arms

    def around(self, rate: float) -> "Experiment":
        """The same with its sweep put around another learning rate, as other models need."""
        middle = self.rates[len(self.rates) // 2]
        arms = tuple(replace(arm, rates=tuple(r * rate / middle for r in arm.rates)) for arm in self.arms)
        return replace(self, rates=tuple(r * rate / middle for r in self.rates), arms=arms)


@dataclass(frozen=True)
class Subject:
    """The models and the problems. `world/name` is a model that the world ships; anything else is a folder or hub name.
    `prompts` is a JSONL file in the world's place; `overrides` are `a.b=value` of the recipe."""

    student: str
    teacher: str
    world: str
    prompts: str | None = None
    overrides: tuple[str, ...] = field(default=())

    @staticmethod
    def of(
        experiment: Experiment,
        student: str | None = None,
        teacher: str | None = None,
        prompts: str | None = None,
        overrides: Sequence[str] = (),
    ) -> "Subject":
        """The experiment's own world and its shipped models, where nothing else is named."""
        world = experiment.world
        return Subject(student or f"{world}/student", teacher or f"{world}/teacher", world, prompts, tuple(overrides))

    def model(self, role: str) -> str:
        """Where the weights are."""
        name = {"student": self.student, "teacher": self.teacher}[role]
        world, _, shipped = name.partition("/")
        return str(worlds.get(world).checkpoint(shipped)) if world in worlds.WORLDS else name

    def recipe(self, experiment: Experiment, arm: Arm, rate: float, seed: int) -> Recipe:
        """The arm's recipe with roles in the place of models: what is written down with its result."""
        tree = merged(experiment.recipe, {"teacher": {"model": "teacher"}}, arm.changes)
        tree = merged(tree, {"student": {"model": "student"}, "optim": {"lr": rate}, "seed": seed})
        if self.prompts is not None:
            return config.load(tree | {"data": {"prompts": self.prompts}}, self.overrides)
        recipe = config.load(tree | {"data": {"world": self.world}}, self.overrides)
        return config.load(recipe, [f"data.limit={recipe.steps * recipe.rollout.prompts_per_step}"])


def merged(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Later trees win, section by section; a method is replaced as a whole, because settings of two do not mix."""
    whole: dict[str, Any] = {}
    for tree in trees:
        for name, section in tree.items():
            joins = isinstance(section, Mapping) and name != "method"
            whole[name] = {**whole.get(name, {}), **section} if joins else section
    return whole


def cut(source: Path, folder: Path) -> None:
    """`train.jsonl`, `dev.jsonl` and `test.jsonl` of 80, 10 and 10% of a JSONL file. A row goes by a hash of its prompt,
    so no two splits share one."""
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for number, line in enumerate(source.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            asked = json.dumps(row.get("messages") or row["prompt"], sort_keys=True)
        except (json.JSONDecodeError, AttributeError, KeyError):
            raise ValueError(f"{source}, line {number} is no JSON object with a prompt or messages") from None
        bucket = hashlib.sha256(asked.encode()).digest()[0] % 10
        parts["dev" if bucket == 0 else "test" if bucket == 1 else "train"].append(line)
    if not all(parts.values()):
        raise ValueError(f"{source} is cut into train, dev and test, and one of them is empty: give it more prompts")
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in parts.items():
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
