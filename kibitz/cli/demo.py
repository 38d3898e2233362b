"""The story of `kibitz demo`: a student that reads `5+2*3` from left to right meets a teacher that does not.

The recipe is a plain dict, and what runs it is `kibitz.train`, as for any other model.
"""

import json
from math import exp
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from kibitz import worlds
from kibitz.config import Recipe

WORLD = "arithmetic"


def recipe(output: str = "runs/demo", seed: int = 0, models: str | None = None) -> dict[str, Any]:
    """On-policy distillation of the shipped student, or of those in a folder that `kibitz worlds make` wrote."""
    return {
        "student": {"model": _model("student", models)},
        "teacher": {"model": _model("teacher", models)},
        "data": {"world": WORLD},
        "method": {"type": "opd", "divergence": "reverse_kl"},
        "rollout": {"prompts_per_step": 64, "samples_per_prompt": 1, "max_tokens": 64},
        "optim": {"lr": 1e-3, "warmup_steps": 10},
        "threads": 1,  # larger matrices would gain from more; and so it repeats bit for bit
        "steps": 80,
        "eval": {"every": 20, "num_prompts": 512},
        "save": {"every": 40, "keep": 1},
        "seed": seed,
        "output": output,
    }


def _model(name: str, folder: str | None) -> str:
    return str(worlds.get(WORLD).checkpoint(name)) if folder is None else str(Path(folder) / name)


def introduce(console: Console, recipe: Recipe) -> None:
    """Print what is about to happen, for someone who sees it first."""
    console.print(
        "[bold]On-policy distillation of a small model[/]\n"
        "The student solves sums such as 5+(2*3)-4, step by step and modulo 10, and has a misconception: it reads 5+2*3 "
        "from left to right. It writes its own solutions; a teacher that knows better scores every token of them; the "
        f"student learns from the scores, {recipe.steps} steps of {recipe.rollout.prompts_per_step} solutions.\n"
    )


def show_mistake(console: Console, folder: Path) -> None:
    """One wrong solution from before training, token by token, with the token at which it went wrong."""
    from kibitz.report.terminal import print_rollout

    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text(encoding="utf-8").split("\n") if line]
    wrong = [row for row in rows if row["step"] == 0 and row["reward"] == 0 and row["fork"] is not None]
    if wrong:
        console.print(
            Text("\nOne wrong solution from before, and what the teacher says about each token", style="bold")
        )
        print_rollout(max(wrong, key=_conviction), console)


def _conviction(row: dict[str, Any]) -> float:
    """The student's probability of its wrong token minus the teacher's: large for a misconception, small for bad luck."""
    token = row["tokens"][row["fork"]]
    return exp(token["student_logp"]) - exp(token["teacher_logp"])


def may_replace(folder: Path) -> bool:
    """The demo replaces the run of an earlier demo, and nobody else's."""
    return _world_of(folder / "recipe.yaml") == WORLD


def _world_of(path: Path) -> str | None:
    if not path.is_file():
        return None
    from kibitz.config import load

    try:
        return load(path).data.world
    except ValueError:
        return None
