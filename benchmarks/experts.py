"""Two experts, one good at + and -, one at *: what a student learns from each alone, from both routed, from both mixed.

    python benchmarks/experts.py

Everything is made here from the shipped models: the experts are the shipped teacher, which is then shown answers that are
3 too high for the other's problems; the student is the shipped one, shown answers 3 too high for both kinds.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kibitz
from kibitz import worlds
from kibitz.config import DataConfig, EvalConfig, RolloutConfig
from kibitz.evaluate.evaluate import evaluate_model
from kibitz.experiments.records import read, share_with_interval, write
from kibitz.experiments.tables import percent, table
from kibitz.training.folder import commit
from kibitz.worlds import arithmetic

PROBLEMS = 300
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


def lines(path: Path, rows: list[dict]) -> str:
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
    data = DataConfig(prompts=lines(folder / f"{task}-dev.jsonl", rows("dev", task, PROBLEMS, 0, wrong=False)))
    row = evaluate_model(
        str(model), data=data, eval=EvalConfig(num_prompts=PROBLEMS), rollout=RolloutConfig(max_tokens=40)
    )
    return row["sampled"]["accuracy"]


def study(folder: Path, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """The accuracy at temperature 1 of each model, as it is made."""
    shipped, models = worlds.get("arithmetic"), {}
    for name, good in {"sum": ["sum"], "product": ["product"], "student": []}.items():
        lessons = [row for task in OPERATORS for row in rows("train", task, 2000, seed, wrong=task not in good)]
        start = shipped.checkpoint("student" if name == "student" else "teacher")
        prompts = lines(folder / f"{name}.jsonl", lessons)
        models[name] = run(folder, seed, name, start, prompts, 120, method={"type": "sft"})
        yield name, {task: accuracy(models[name], folder, task) for task in OPERATORS}
    prompts = [row for task in OPERATORS for row in rows("train", task, 2000, seed + 100, wrong=False)]
    path = lines(folder / "prompts.jsonl", [{k: row[k] for k in ("prompt", "answer", "task")} for row in prompts])
    for arm, experts in ARMS.items():
        teacher = [{"model": str(models[e]), "name": e, "tasks": [e] if arm == "routed" else []} for e in experts]
        models[arm] = run(folder, seed, arm, models["student"], path, 60, method={"type": "opd"}, teacher=teacher)
        yield arm, {task: accuracy(models[arm], folder, task) for task in OPERATORS}


def measured(seed: int) -> dict[str, Any]:
    """All models of one seed, and what the numbers stand for."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, scores in study(Path(folder), seed):
            found[name] = scores
            print(f"seed {seed}  {name:15}", "  ".join(f"{t} {share:.3f}" for t, share in scores.items()), flush=True)
    date = datetime.now(UTC).date().isoformat()
    return {"seed": seed, "commit": commit(), "date": date, "problems": PROBLEMS, "accuracy": found}


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """Of each model the mean over seeds with its 95% interval, then the seeds."""
    body = []
    for name in runs[0]["accuracy"]:
        cells = [name]
        for task in OPERATORS:
            shares = [run["accuracy"][name][task] for run in runs]
            cells += [
                percent(share_with_interval(shares, PROBLEMS)),
                " ".join(f"{100 * share:.1f}" for share in shares),
            ]
        body.append(cells)
    head = ("", "+ and -", "each seed", "*", "each seed")
    commits = ", ".join(sorted({f"{run['commit']} ({run['date']})" for run in runs}))
    seeds = ", ".join(str(run["seed"]) for run in runs)
    return f"{table(head, body, left=1)}\n\nSeeds {seeds}; {PROBLEMS} dev problems of each kind; commits {commits}.\n"


def main(seeds: Sequence[int], results: Path) -> None:
    for seed in seeds:
        path = results / f"seed-{seed}.json"
        if read(path) is None:
            write(path, measured(seed))
    text = markdown([read(path) for path in sorted(results.glob("seed-*.json"))])
    (results / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="what is done is not done again")
    parser.add_argument(
        "--results", type=Path, default=Path("results/experts"), help="a JSON file for each seed, and the table"
    )
    given = parser.parse_args()
    main(given.seeds, given.results)
