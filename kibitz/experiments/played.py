"""Experiments in which policies play and no language model has a part: a file for each run, and what was run is not run again."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kibitz.config import load_as
from kibitz.control.recipe import DistilRecipe, RPDRecipe
from kibitz.experiments.records import Record, about_here, read, write


@dataclass(frozen=True)
class Play:
    """Where the records of an experiment go, and its runs; `quick` asks for seconds, to see that all of it runs."""

    folder: Path
    work: Path
    seeds: int
    quick: bool
    say: Callable[[str], None]

    def trained(self, name: str, policy: str, tree: Mapping[str, Any], **keys: Any) -> Record:
        """The record of a network that learnt by `kibitz.control.rpd`, made now if there is none of these settings. A teacher is
        named by the run that it is."""
        recipe = load_as(RPDRecipe, self._runnable(name, tree))

        def make() -> Record:
            from kibitz.control import rpd

            run = rpd.run(recipe, overwrite=True)
            flops = [sum(row["flops"].values()) for row in run.metrics]
            return {
                "curve": [[row["step"], row["return"]["mean"]] for row in run.evals if row["split"] == "episodes"],
                "final": run.evals[-1]["return"], "episodes": run.evals[-1]["num_episodes"],
                "steps": run.evals[-1]["step"], "gflop": sum(flops) / 1e9, "sampled": by_chance(recipe),
            }  # fmt: skip

        return self._once(
            name, {"policy": policy, **keys, "settings": dict(tree)}, make, self.work / name / "checkpoints"
        )

    def measured(self, name: str, teacher: str, tree: Mapping[str, Any], **keys: Any) -> Record:
        """The record of a teacher on the episodes that a student of that recipe is measured on: `level` of those that it is
        evaluated on during training, `final` of the fresh ones."""
        settings = {"teacher": teacher, **{key: tree[key] for key in ("env", "eval", "seed")}}

        def make() -> Record:
            from kibitz.control import rpd, taught

            recipe = load_as(RPDRecipe, {**self._runnable(name, settings), "method": {"type": "ppo"}, "teacher": None})
            act, env, seed = rpd.act_of(taught.load_policy(self.work / teacher)), recipe.env, recipe.seed
            level = rpd.evaluated(act, env, "episodes", seed, recipe.eval.episodes)
            fresh = rpd.evaluated(act, env, "fresh episodes", seed, recipe.eval.last)
            return {"level": level["return"]["mean"], "final": fresh["return"], "episodes": recipe.eval.last}

        return self._once(name, {"policy": "teacher again", **keys, "settings": settings}, make)

    def distilled(self, name: str, policy: str, tree: Mapping[str, Any], **keys: Any) -> Record:
        """The same of a student that can be read."""
        recipe = load_as(DistilRecipe, self._runnable(name, tree))

        def make() -> Record:
            from kibitz.control import distil

            run = distil.run(recipe, overwrite=True)
            info = read(run.folder / "run.json") or {}
            kept = ("teacher_return", "agreement_on_own_states", "best_iterate", "depth", "leaves", "terms", "nodes")
            return {
                "final": run.evals[-1]["return"], "episodes": run.evals[-1]["num_episodes"],
                "validation": max(r["return"]["mean"] for r in run.evals if r["split"] == "validation"),
                "states": run.metrics[-1]["states"], "rules": (run.folder / "policy.txt").read_text(encoding="utf-8"),
                "exported": plays_alike(recipe, run.folder), **{key: info[key] for key in kept if key in info},
            }  # fmt: skip

        return self._once(name, {"policy": policy, **keys, "settings": dict(tree)}, make)

    def _runnable(self, name: str, tree: Mapping[str, Any]) -> dict[str, Any]:
        found = {
            **tree,
            "output": str(self.work / name),
            "eval": {**tree.get("eval", {}), "frames": 0, "teacher": False},
        }
        if isinstance(found.get("teacher"), Mapping):
            found["teacher"] = {**found["teacher"], "run": str(self.work / found["teacher"]["run"])}
        return found

    def _once(self, name: str, keys: Record, make: Callable[[], Record], needed: Path | None = None) -> Record:
        """`needed`: what others start from; a teacher whose weights are gone is made again."""
        path = self.folder / f"{name}.json"
        found = read(path)
        there = keys["policy"] != "teacher" or needed is None or needed.is_dir()
        if found is not None and found["settings"] == keys["settings"] and there:
            return found
        shutil.rmtree(self.work / name, ignore_errors=True)
        started = time.process_time()
        made = make()
        record = {**keys, **made, **about_here(time.process_time() - started)}
        write(path, record)
        self.say(f"{name}: {record['final']['mean']:.4g}")
        if keys["policy"] != "teacher":
            shutil.rmtree(self.work / name / "checkpoints", ignore_errors=True)
        return record


def by_chance(recipe: RPDRecipe) -> Record:
    """A run's policy with actions that are drawn, as in training, on the same fresh episodes: the mean return, and the mean
    entropy in the states that it comes to, in nats."""
    import torch

    from kibitz.control import environments, taught

    policy, entropy = taught.load_policy(Path(recipe.output)).policy, []
    torch.manual_seed(recipe.seed)

    def act(seen_BO: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            asked = policy.get_distribution(policy.obs_to_tensor(seen_BO)[0])
        entropy.extend(asked.distribution.entropy().reshape(len(seen_BO), -1).sum(-1).tolist())
        action = asked.sample().numpy()
        return action if shape.discrete else action.clip(shape.low_A, shape.high_A)

    shape = environments.shape_of(environments.make(recipe.env), recipe.env.id)
    seeds = environments.seeds_of("fresh episodes", recipe.seed, recipe.eval.last)
    mean = float(environments.returns(act, recipe.env, seeds).mean())
    return {"mean": mean, "entropy": float(np.mean(entropy))}


def plays_alike(recipe: DistilRecipe, folder: Path) -> Record:
    """Whether the exported function, on its own observations, plays the fresh episodes to the same returns: how many did."""
    from kibitz.control import environments, export

    act = export.load((folder / "policy.py").read_text(encoding="utf-8"))
    seeds = environments.seeds_of("fresh episodes", recipe.seed, recipe.eval.last)
    found = environments.returns(lambda seen_BO: np.array([act(row.tolist()) for row in seen_BO]), recipe.env, seeds)
    return {"mean": float(found.mean()), "episodes": len(seeds)}
