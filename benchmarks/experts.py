"""Two experts, one good at + and -, one at *: what a student learns from each alone, from both routed, from both mixed.

    python benchmarks/experts.py --seed 0

Everything is made here from the shipped models: the experts are the shipped teacher, which is then shown answers that are
3 too high for the other's problems; the student is the shipped one, shown answers 3 too high for both kinds.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import kibitz
from kibitz import worlds
from kibitz.config import DataConfig, EvalConfig, RolloutConfig
from kibitz.evaluate import evaluate_model
from kibitz.worlds import arithmetic

OPERATORS = {"sum": "+-", "product": "*"}
ARMS = {"sum expert": ["sum"], "product expert": ["product"], "routed": ["sum", "product"], "mixed": ["sum", "product"]}


def rows(split: str, task: str, count: int, seed: int, wrong: bool) -> list[dict]:
    """Problems of one kind with their solutions; of the wrong ones the last digit is 3 too high."""
    rng, found = random.Random(f"{split}/{task}/{seed}"), {}
    while len(found) < count:
        items = [str(rng.randrange(10))]
        for _ in range(rng.randint(2, 4)):
            items += [rng.choice(OPERATORS[task]), str(rng.randrange(10))]
        if arithmetic.split_of(text := "".join(items)) == split:
            response = arithmetic.solve(text, rng)
            if wrong:
                response = response[:-1] + str((int(response[-1]) + 3) % 10)
            found[text] = {"prompt": text, "answer": arithmetic.value(text), "task": task, "response": response}
    return list(found.values())


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(folder: Path, seed: int, name: str, start: Path, prompts: str, steps: int, **more) -> Path:
    tree = {
        "student": {"model": str(start)},
        "data": {"prompts": prompts, "grader": "exact"},
        "rollout": {"prompts_per_step": 32, "samples_per_prompt": 1, "max_tokens": 40},
        "optim": {"lr": 1e-3, "warmup_steps": 5, "tokens_per_micro_batch": 2048},
        "steps": steps,
        "save": {"every": 0},
        "seed": seed,
        "threads": 1,
        "device": "cpu",
        "output": str(folder / name),
        **more,
    }
    checkpoint = kibitz.train(tree).checkpoint
    assert checkpoint is not None
    return checkpoint


def accuracy(model: Path, folder: Path, task: str) -> float:
    data = DataConfig(prompts=write(folder / f"{task}-dev.jsonl", rows("dev", task, 300, 0, wrong=False)))
    row = evaluate_model(str(model), data=data, eval=EvalConfig(num_prompts=300), rollout=RolloutConfig(max_tokens=40))
    return row["sampled"]["accuracy"]


def study(folder: Path, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """The accuracy at temperature 1 of each model, as it is made."""
    shipped, models = worlds.get("arithmetic"), {}
    for name, good in {"sum": ["sum"], "product": ["product"], "student": []}.items():
        lessons = [row for task in OPERATORS for row in rows("train", task, 2000, seed, wrong=task not in good)]
        start = shipped.checkpoint("student" if name == "student" else "teacher")
        prompts = write(folder / f"{name}.jsonl", lessons)
        models[name] = run(folder, seed, name, start, prompts, 120, method={"type": "sft"})
        yield name, {task: accuracy(models[name], folder, task) for task in OPERATORS}
    prompts = [row for task in OPERATORS for row in rows("train", task, 2000, seed + 100, wrong=False)]
    path = write(folder / "prompts.jsonl", [{k: row[k] for k in ("prompt", "answer", "task")} for row in prompts])
    for arm, experts in ARMS.items():
        teacher = [{"model": str(models[e]), "name": e, "tasks": [e] if arm == "routed" else []} for e in experts]
        models[arm] = run(folder, seed, arm, models["student"], path, 60, method={"type": "opd"}, teacher=teacher)
        yield arm, {task: accuracy(models[arm], folder, task) for task in OPERATORS}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    with tempfile.TemporaryDirectory() as folder:
        for name, scores in study(Path(folder), seed):
            print(
                f"seed {seed}  {name:15}",
                "  ".join(f"{task} {score:.3f}" for task, score in scores.items()),
                flush=True,
            )
