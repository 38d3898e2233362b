"""Runs an experiment. What was run already, with the same settings, is not run again: kill it and start it as you like."""

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import kibitz
from kibitz.checkpoint import checkpoints
from kibitz.config import DataConfig, EvalConfig, Recipe
from kibitz.evaluate import evaluate_model
from kibitz.experiments.design import ROLES, Arm, Experiment, Subject, cut
from kibitz.experiments.records import Record, best_rate, name_of, read, score, write

QUIET = {"eval": {"every": 0, "num_prompts": 1, "heatmaps": 0}, "save": {"every": 0, "keep": 1}}
"""A run measures nothing itself; `evaluate_model` does, on the split that is due."""


@dataclass(frozen=True)
class Study:
    """An experiment on its subject. Results go to `folder`, a file for each run; the runs themselves to `work`."""

    experiment: Experiment
    subject: Subject
    folder: Path
    work: Path
    say: Callable[[str], None] = lambda _: None

    def run(self, arms: Sequence[Arm] = (), seeds: int | None = None) -> None:
        """All of it, arm by arm: each is finished before the next begins."""
        if self.subject.prompts is not None:
            cut(Path(self.subject.prompts), self.work)
        arms = arms or self.experiment.arms
        recipes = [self.recipe(arm, self.experiment.rates[0], 0) for arm in arms]  # mistakes show before hours go by
        torch.set_num_threads(recipes[0].threads or torch.get_num_threads())
        for role in ROLES:
            self._model(role, recipes[0])
        for arm in arms:
            rate = self.sweep(arm)
            for seed in range(seeds or self.experiment.seeds):
                self.measured(arm, rate, seed)

    def sweep(self, arm: Arm) -> float:
        """The best rate on the dev split. One at the edge is tried against one beyond it, a few times."""
        rates = sorted(arm.rates or self.experiment.rates)
        found = {rate: self.trained(arm, rate, 0) for rate in rates}
        factor = rates[1] / rates[0] if len(rates) > 1 else 2.0
        for _ in range(self.experiment.extensions):
            best = best_rate(found)
            if min(found) < best < max(found):
                break
            rate = _rounded(best * factor if best == max(found) else best / factor)
            found[rate] = self.trained(arm, rate, 0)
        return best_rate(found)

    def trained(self, arm: Arm, rate: float, seed: int) -> Record:
        """A run measured on the dev split: from its file, or made now."""
        path, settings = self._path(arm, rate, seed), self._settings(self.recipe(arm, rate, seed))
        found = read(path)
        if found is not None and found["settings"] == settings:
            return found
        return self._train(arm, rate, seed)

    def measured(self, arm: Arm, rate: float, seed: int) -> Record:
        """The same with its figures on the test split. A run whose checkpoint is gone is made again."""
        record, path = self.trained(arm, rate, seed), self._path(arm, rate, seed)
        if "test" in record:
            return record
        if not self._checkpoints(path.stem):
            record = self._train(arm, rate, seed)
        recipe = self.recipe(arm, rate, seed)
        record["test"] = self._evaluate(str(self._checkpoints(path.stem)[-1]), "test", recipe)
        write(path, record)
        self.say(f"{path.stem}: {_told(record['test'])} on test")
        return record

    def recipe(self, arm: Arm, rate: float, seed: int) -> Recipe:
        return self.subject.recipe(self.experiment, arm, rate, seed)

    # -------------------------------------------------------------- one run

    def _train(self, arm: Arm, rate: float, seed: int) -> Record:
        path, recipe = self._path(arm, rate, seed), self.recipe(arm, rate, seed)
        started = time.process_time()
        run = kibitz.train(self._with_models(recipe, self.work / path.stem), overwrite=True)
        if len({row["step"] for row in run.metrics}) != len(run.metrics):
            raise ValueError(f"{path.stem} was run by two processes at one time: give each its own arms by --only")
        record = {
            "experiment": self.experiment.name,
            "arm": arm.name,
            "lr": rate,
            "seed": seed,
            "settings": self._settings(recipe),
            **_about_the_run(run, time.process_time() - started),
            "dev": self._evaluate(str(run.checkpoint), "dev", recipe),
        }
        write(path, record)
        self.say(f"{path.stem}: {_told(record['dev'])} on dev")
        return record

    def _with_models(self, recipe: Recipe, output: Path) -> dict[str, Any]:
        """The recipe with the weights' places, ready to be trained."""
        tree: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True) | QUIET
        tree |= {"output": str(output)}
        for role in ROLES:
            tree[role] = {**tree[role], "model": self.subject.model(tree[role]["model"])}
        if self.subject.prompts is not None:
            tree["data"] = {**tree["data"], "prompts": str(self.work / "train.jsonl")}
        return tree

    def _evaluate(self, model: str, split: str, recipe: Recipe) -> dict[str, Any]:
        num = self.experiment.test_problems if split == "test" else self.experiment.dev_problems
        changes: dict[str, Any] = {"split": split, "limit": num}
        if self.subject.prompts is not None:
            changes["prompts"] = str(self.work / f"{split}.jsonl")
        data = DataConfig.model_validate({**recipe.data.model_dump(exclude_unset=True), **changes})
        return evaluate_model(
            model,
            teacher=self.subject.model("teacher"),
            data=data,
            eval=EvalConfig(num_prompts=num),
            rollout=recipe.rollout,
            device=recipe.device,
        )

    def _model(self, role: str, recipe: Recipe) -> None:
        """What the student and the teacher can do as they are."""
        path = self.folder / f"{role}.json"
        settings = {"model": getattr(self.subject, role)} | self._problems()
        found = read(path)
        if found is None or found["settings"] != settings:
            write(path, {"settings": settings, "test": self._evaluate(self.subject.model(role), "test", recipe)})

    # -------------------------------------------------------------- names

    def _path(self, arm: Arm, rate: float, seed: int) -> Path:
        return self.folder / f"{name_of(arm.name, rate, seed)}.json"

    def _checkpoints(self, name: str) -> list[Path]:
        return checkpoints(self.work / name)

    def _settings(self, recipe: Recipe) -> dict[str, Any]:
        """All that decides the result: the recipe, with roles for models and no folder of this machine."""
        tree = recipe.model_dump(mode="json", exclude_unset=True)
        return {"recipe": tree, "student": self.subject.student, "teacher": self.subject.teacher} | self._problems()

    def _problems(self) -> dict[str, Any]:
        source = {"world": self.subject.world} if self.subject.prompts is None else {"prompts": self.subject.prompts}
        return source | {"dev": self.experiment.dev_problems, "test": self.experiment.test_problems}


def _about_the_run(run: "kibitz.Run", cpu_seconds: float) -> Record:
    """Where, when and by which code, and what it cost."""
    info = read(run.folder / "run.json") or {}
    alarms = (
        (run.folder / "alarms.jsonl").read_text(encoding="utf-8") if (run.folder / "alarms.jsonl").is_file() else ""
    )
    return {
        "commit": info.get("commit"),
        "version": info.get("version"),
        "torch": info.get("torch"),
        "machine": f"{info.get('machine')}, {os.cpu_count()} cores, {info.get('device')}, {platform.system()}",
        "threads": info.get("threads"),
        "date": info.get("finished"),
        "cpu_seconds": round(cpu_seconds, 2),
        "seconds": _summed(run.metrics, "seconds"),
        "flops": _summed(run.metrics, "flops"),
        "tokens": sum(row["num_tokens"] for row in run.metrics),
        "teacher_written": sum(row["teacher_written"] for row in run.metrics) / len(run.metrics),
        "alarms": sorted({json.loads(line)["name"] for line in alarms.split("\n") if line}),
    }


def _summed(metrics: list[dict[str, Any]], unit: str) -> dict[str, float]:
    """By kind, over all steps."""
    kinds = sorted({kind for row in metrics for kind in row[unit]})
    return {kind: round(sum(row[unit].get(kind, 0.0) for row in metrics), 3) for kind in kinds}


def _told(row: dict[str, Any]) -> str:
    return f"{100 * score({'dev': row}):.1f}%" if "sampled" in row else f"reverse KL {row['reverse_kl']:.4f}"


def _rounded(rate: float) -> float:
    """0.004, not 0.0040000000000000001: rates are names of files."""
    return float(f"{rate:.3g}")
