"""Runs an experiment. What was run already, with the same settings, is not run again: kill it and start it as you like."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kibitz
from kibitz.config import DataConfig, EvalConfig, Recipe
from kibitz.evaluate.evaluate import evaluate_model
from kibitz.experiments import design
from kibitz.experiments.design import BLANK, MADE, OF_ARM, Arm, Experiment, Subject, cut, models_of, with_models
from kibitz.experiments.make_world import blank
from kibitz.experiments.records import (
    PROBE,
    Record,
    about_here,
    about_the_run,
    best_rate,
    chooser,
    costs_until,
    made_with,
    name_of,
    read,
    read_all,
    score,
    told,
    write,
)
from kibitz.models.lora import is_adapter
from kibitz.training.checkpoint import checkpoints, export

QUIET = {"eval": {"every": 0, "num_prompts": 1, "heatmaps": 0}}
"""A run measures nothing itself; `evaluate_model` does, on the split that is due."""
OF_A_SOURCE = {"prompts", "world", "options", "split", "limit", "pick"}


@dataclass(frozen=True)
class Study:
    """An experiment on its subject. Results go to `folder`, a file for each run; the runs themselves to `work`."""

    experiment: Experiment
    subject: Subject
    folder: Path
    work: Path
    say: Callable[[str], None] = lambda _: None

    def run(self, arms: Sequence[Arm] = (), seeds: int | None = None) -> None:
        """All of it, family by family: each is finished before the next begins."""
        for source, path in self.subject.files.items():
            cut(Path(path), self._data(source))
        arms, num_seeds = arms or self.experiment.arms, seeds or self.experiment.seeds
        recipes = [self.recipe(arm, self.experiment.rates[0], 0) for arm in arms]  # mistakes show before hours go by
        recipes = recipes or [self.untrained()]
        torch.set_num_threads(recipes[0].threads or torch.get_num_threads())
        longest = max(recipes, key=lambda recipe: recipe.rollout.max_tokens)
        measured: dict[str, Any] = {}
        for role in self.experiment.roles:
            self._model(role, longest, measured)
        for family in design.families(arms):
            for arm, rate in self._leading(family):
                for seed in range(num_seeds):
                    self.measured(arm, rate, seed)
        whole = {arm.name for arm in arms} == {arm.name for arm in self.experiment.arms}  # a probe looks at all of them
        for seed in range(num_seeds) if self.experiment.probe and whole else ():
            self._probed(seed)

    def best(self, family: Sequence[Arm]) -> tuple[Arm, float]:
        """The arm of a family, and its rate, that is best on the dev split with seed 0."""
        return self._leading(family)[0]

    def _leading(self, family: Sequence[Arm]) -> list[tuple[Arm, float]]:
        """Those of a family that are run with all seeds: its best one; where the cost to a target decides, the two best,
        because one seed may be there early by luck."""
        found = [(arm, self.sweep(arm)) for arm in family]
        key = chooser(self.experiment, self.folder)
        found.sort(key=lambda pair: key([self.trained(*pair, 0)]), reverse=True)
        return found[: 1 if self.experiment.until is None else 2]

    def sweep(self, arm: Arm) -> float:
        """The best rate on the dev split. One at the edge is tried against one beyond it, a few times."""
        self._forget(arm)
        if arm.rate_of:
            return self.sweep(self.experiment.arm(arm.rate_of))
        rates, key = sorted(arm.rates or self.experiment.rates), chooser(self.experiment, self.folder)
        found = {rate: self.trained(arm, rate, 0) for rate in rates}
        factor = rates[1] / rates[0] if len(rates) > 1 else 2.0
        for _ in range(self.experiment.extensions if len(rates) > 1 else 0):
            best = best_rate(found, key)
            if min(found) < best < max(found):
                break
            rate = _rounded(best * factor if best == max(found) else best / factor)
            found[rate] = self.trained(arm, rate, 0)
        return best_rate(found, key)

    def _forget(self, arm: Arm) -> None:
        """Runs of the arm that were made otherwise: a table must not mix them with those to come."""
        for record in read_all(self.folder):
            if record["arm"] == arm.name:
                rate, seed = record["lr"], record["seed"]
                if made_with(record) != self._settings(arm, self.recipe(arm, rate, seed)):
                    self._path(arm, rate, seed).unlink()

    def trained(self, arm: Arm, rate: float, seed: int) -> Record:
        """A run measured on the dev split: from its file, or made now."""
        path, settings = self._path(arm, rate, seed), self._settings(arm, self.recipe(arm, rate, seed))
        found = read(path)
        if found is not None and made_with(found) == settings:
            return found
        return self._train(arm, rate, seed)

    def measured(self, arm: Arm, rate: float, seed: int) -> Record:
        """The same with its figures on the test split. A run whose checkpoint is gone is made again."""
        record, path = self.trained(arm, rate, seed), self._path(arm, rate, seed)
        if "test" in record:
            return record
        model = self._checkpoint(arm, rate, seed)
        record = self.trained(arm, rate, seed)
        record["test"] = self._evaluate(str(model), "test", self.recipe(arm, rate, seed), arm, seed)
        write(path, record)
        self.say(f"{path.stem}: {told(record['test'])} on test")
        return record

    def recipe(self, arm: Arm, rate: float, seed: int) -> Recipe:
        return self.subject.recipe(self.experiment, arm, rate, seed)

    def untrained(self) -> Recipe:
        """The experiment's own recipe, of no arm: what models as they are are measured by."""
        return self.recipe(Arm("", "", {}, data=next(iter(self.experiment.sources))), self.experiment.rates[0], 0)

    # -------------------------------------------------------------- models

    def place(self, name: str, seed: int) -> str:
        """Return the folder of a model that a recipe names by a role, by an arm, or by a shape (`blank:64x3`)."""
        name = self.subject.called(name)
        if name.startswith(BLANK):
            return str(blank(self.work / name.replace(":", "-"), design.shape(name), 0, self.experiment.world))
        if name.startswith(MADE):
            return self.made(name)
        if not name.startswith(OF_ARM):
            return self.subject.model(name)
        arm, rate = self.chosen(name.removeprefix(OF_ARM))
        return str(_whole(self._checkpoint(arm, rate, self._seed_of(arm, seed))))

    def made(self, name: str) -> str:
        """Return the path of a model or a file that the experiment's own code writes."""
        return self.experiment.made[name.removeprefix(MADE)](self).as_posix()

    def _file(self, name: str, split: str) -> str:
        """The path of a file of prompts that code writes: the file itself, or that of the split in a folder."""
        path = Path(self.made(name))
        return (path / f"{split}.jsonl" if path.is_dir() else path).as_posix()

    def _seed_of(self, arm: Arm, seed: int) -> int:
        """Models that one starts from are the same for all seeds."""
        return 0 if arm in self.experiment.makers else seed

    def chosen(self, name: str) -> tuple[Arm, float]:
        """The arm of that name, or the best of the family of that name, at its best rate."""
        return self.best([arm for arm in self.experiment.arms if arm.family == name] or [self.experiment.arm(name)])

    def _checkpoint(self, arm: Arm, rate: float, seed: int) -> Path:
        """Return the last checkpoint of the arm's run or, if the arm stops where it is best, the checkpoint of that step."""
        work = self.work / self._path(arm, rate, seed).stem
        step = self.trained(arm, rate, seed).get("step")
        found = [path for path in checkpoints(work) if step is None or path.name == f"step-{step:06d}"]
        if not found:
            self._train(arm, rate, seed)
            return self._checkpoint(arm, rate, seed)
        return found[-1]

    # -------------------------------------------------------------- one run

    def _train(self, arm: Arm, rate: float, seed: int) -> Record:
        path, recipe = self._path(arm, rate, seed), self.recipe(arm, rate, seed)
        tree = self._runnable(arm, recipe, seed) | {"output": str(self.work / path.stem)}
        started = time.process_time()
        run = kibitz.train(tree, overwrite=True)
        cpu_seconds = time.process_time() - started
        if len({row["step"] for row in run.metrics}) != len(run.metrics):
            raise ValueError(f"{path.stem} was run by two processes at one time: give each its own arms by --only")
        record = {
            "experiment": self.experiment.name,
            "arm": arm.name,
            "lr": rate,
            "seed": seed,
            "settings": self._settings(arm, recipe),
            **about_the_run(run, cpu_seconds, self.experiment.series),
            **self._on_dev(run, arm, recipe, seed),
        }
        write(path, record)
        self.say(f"{path.stem}: {told(record['dev'])} on dev")
        return record

    def _on_dev(self, run: "kibitz.Run", arm: Arm, recipe: Recipe, seed: int) -> Record:
        """The last checkpoint measured on the dev split; of an arm with a curve all of them, and which of them it stops at."""
        if not arm.every:
            return {"dev": self._evaluate(str(run.checkpoint), "dev", recipe, arm, seed)}
        curve = []
        for path in checkpoints(run.folder):
            step = int(path.name.rpartition("-")[2])
            dev = self._evaluate(str(path), "dev", recipe, arm, seed)
            curve.append({"step": step, **costs_until(run.metrics, step), "dev": dev})
        if arm.stop == "last":
            return {"dev": curve[-1]["dev"], "curve": curve}
        best = max(curve, key=lambda point: score(point, arm.judge))
        return {"step": best["step"], "dev": best["dev"], "curve": curve}

    def _runnable(self, arm: Arm, recipe: Recipe, seed: int) -> dict[str, Any]:
        """The recipe with the weights' and files' places, ready to be trained."""
        tree = with_models(recipe.model_dump(mode="json", exclude_unset=True), lambda name: self.place(name, seed))
        if arm.data in self.subject.files:
            tree["data"] = {**tree["data"], "prompts": str(self._data(arm.data) / "train.jsonl")}
        elif (prompts := str(tree["data"].get("prompts", ""))).startswith(MADE):
            tree["data"] = {**tree["data"], "prompts": self._file(prompts, "train")}
        return tree | QUIET | {"save": {"every": arm.every, "keep": 10_000 if arm.every else 1}}

    def _evaluate(self, model: str, split: str, recipe: Recipe, arm: Arm | None, seed: int) -> dict[str, Any]:
        """The main measure, and the others below `measures`."""
        names = (arm.measures if arm else ()) or tuple(self.experiment.measures)
        num = self.experiment.test_problems if split == "test" else self.experiment.dev_problems
        rows = [
            evaluate_model(
                model,
                teacher=self._judge(recipe, seed),
                data=self.asked(source, split, num, recipe, arm),
                eval=EvalConfig(num_prompts=num),
                rollout=recipe.rollout,
                device=recipe.device,
            )
            for source in (self.experiment.measures[name] for name in names)
        ]
        others = dict(zip(names[1:], rows[1:], strict=True))
        return rows[0] | ({"measures": others} if others else {})

    def asked(self, source: str, split: str, num: int, recipe: Recipe, arm: Arm | None) -> DataConfig:
        """The held-out problems of a source; how prompts are rendered and graded is the recipe's, unless the source says."""
        own = {} if arm is None else self.experiment.sources[arm.data]
        given = recipe.data.model_dump(exclude_unset=True)
        how = {name: value for name, value in given.items() if name not in OF_A_SOURCE | own.keys()}
        section = self.subject.section(self.experiment, source)
        changes: dict[str, Any] = {"split": split, "limit": min(num, section.get("limit", num))}
        if source in self.subject.files:
            changes["prompts"] = str(self._data(source) / f"{split}.jsonl")
        elif design.is_made(section):
            changes["prompts"] = self._file(section["prompts"], split)
        return DataConfig.model_validate({**how, **section, **changes})

    def _judge(self, recipe: Recipe, seed: int) -> str | None:
        """The teacher that the reverse KL is measured to: the experiment's, else the run's own, if it is one model."""
        if "teacher" in self.experiment.roles:
            return self.place("teacher", seed)
        name = getattr(recipe.teacher, "model", None)
        return None if name is None else self.place(name, seed)

    def _model(self, role: str, recipe: Recipe, measured: dict[str, Any]) -> None:
        """Evaluate an untrained model on the test split, unless its file is up to date, or `measured` knows its place."""
        path = self.folder / f"{role}.json"
        settings = (
            {"model": self.subject.models[role]} | self._problems() | self._made_of([self.subject.models[role]], 0)
        )
        found = read(path)
        if found is None or found["settings"] != settings:
            place = self.place(role, 0)
            if place not in measured:
                measured[place] = self._evaluate(place, "test", recipe, None, 0)
            write(path, {"settings": settings, "test": measured[place]})

    def _probed(self, seed: int) -> None:
        """Run the experiment's probe for one seed, unless its file is up to date."""
        assert self.experiment.probe is not None
        arms = [f"{OF_ARM}{arm.name}" for arm in self.experiment.arms if not arm.family]
        settings = {"recipe": self.experiment.recipe, **self.subject.models, "seed": seed} | self._problems()
        settings |= self._made_of([*self.subject.models.values(), *arms], seed)
        path = self.experiment.probed_in(self.folder) / f"{PROBE}-{seed}.json"
        found = read(path)
        if found is None or found["settings"] != settings:
            started = time.process_time()
            looked_at = self.experiment.probe(self, seed)
            write(path, {"settings": settings, **about_here(time.process_time() - started), **looked_at})
            self.say(f"{path.stem}: done")

    # -------------------------------------------------------------- names

    def _path(self, arm: Arm, rate: float, seed: int) -> Path:
        return self.folder / f"{name_of(arm.name, rate, seed)}.json"

    def _data(self, source: str) -> Path:
        return self.work / "data" / source

    def _settings(self, arm: Arm, recipe: Recipe) -> dict[str, Any]:
        """All that decides the result: the recipe, with roles for models and no folder of this machine."""
        tree = recipe.model_dump(mode="json", exclude_unset=True)
        named = set(models_of(tree))
        if arm not in self.experiment.makers:  # a maker may be what a role stands for
            named |= {"student", "teacher"}
        used = {role: name for role, name in self.subject.models.items() if role in named}
        found = {"recipe": tree, **used} | self._problems()
        if arm.every:
            found |= {"every": arm.every, "stop": arm.stop}
        if arm.measures:
            found["measured"] = list(arm.measures)
        made = [*(f"{OF_ARM}{name}" for name in arm.needs()), *used.values()]
        return found | self._made_of(made, recipe.seed)

    def _made_of(self, names: Iterable[str], seed: int) -> dict[str, Any]:
        """Return digests of the settings that made the models that arms leave, by name."""
        arms = [name.removeprefix(OF_ARM) for name in names if name.startswith(OF_ARM)]
        return {"on": {name: self._digest(name, seed) for name in dict.fromkeys(arms)}} if arms else {}

    def _digest(self, name: str, seed: int) -> str:
        """Return a digest of the settings of another arm's run. Results that depend on it are made again where it changes."""
        arm, rate = self.chosen(name)
        text = json.dumps(self._settings(arm, self.recipe(arm, rate, self._seed_of(arm, seed))), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _problems(self) -> dict[str, Any]:
        """Return the settings of the problems that the experiment is measured on."""
        found: dict[str, Any] = {"dev": self.experiment.dev_problems, "test": self.experiment.test_problems}
        if self.subject.files:
            return found | {"prompts": self.subject.prompts}
        found["world"] = self.subject.world
        sections = {name: dict(self.experiment.sources[source]) for name, source in self.experiment.measures.items()}
        plain = sections == {"accuracy": {"world": self.subject.world}}
        return found if plain else found | {"measures": sections}


def _whole(checkpoint: Path) -> Path:
    """The checkpoint, or, of an adapter, a folder beside it in which it is merged: an adapter goes on no other."""
    if not is_adapter(checkpoint):
        return checkpoint
    merged = checkpoint.with_name(f"merged-{checkpoint.name}")
    if not merged.exists():
        export(str(checkpoint), merged, merge=True)
    return merged


def _rounded(rate: float) -> float:
    """0.004, not 0.0040000000000000001: rates are names of files."""
    return float(f"{rate:.3g}")
