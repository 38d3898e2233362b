"""Two experts, one good at + and -, one at *: what a student learns from each alone, from both routed, from both mixed.

The experts are the teacher, which is then shown answers that are 3 too high for the other's problems; the student is the
shipped one, shown answers 3 too high for both kinds. All of it is made for each seed by the probe, from problems of its own.
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kibitz
from kibitz.config import DataConfig, EvalConfig, RolloutConfig
from kibitz.evaluate.evaluate import evaluate_model
from kibitz.experiments.design import TOY, Experiment, merged
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.records import Record, share_with_interval, write_rows
from kibitz.experiments.results import Results
from kibitz.experiments.shapes import compared, turned
from kibitz.experiments.statistics import Estimate, apart
from kibitz.worlds import arithmetic

OPERATORS = {"sum": "+-", "product": "*"}
LESSONS = {"sum": ("sum",), "product": ("product",), "student": ()}
"""Model -> the tasks of which it is shown right answers."""
ARMS = {
    "sum expert": ("sum",),
    "product expert": ("product",),
    "routed": ("sum", "product"),
    "mixed": ("sum", "product"),
}
"""Arm -> the experts that it learns from."""
ABOUT = {
    "sum": "expert for + and -",
    "product": "expert for *",
    "student": "student, before",
    "sum expert": "student of the expert for + and - alone",
    "product expert": "student of the expert for * alone",
    "routed": "student of both, routed by task",
    "mixed": "student of both, mixed half and half",
}
NUM_LESSONS, LESSON_STEPS, STEPS = 2000, 120, 60


def problems(split: str, task: str, count: int, seed: int, wrong: bool) -> list[dict[str, Any]]:
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


def probe(study: Any, seed: int) -> Record:
    """The accuracy at temperature 1 of each model of one seed, on dev problems of each kind."""
    num, quick = study.experiment.dev_problems, study.experiment.dev_problems < EXPERIMENT.dev_problems
    folder = study.work / f"seed-{seed}"

    def file(name: str, rows: list[dict[str, Any]]) -> str:
        return str(write_rows(folder / f"{name}.jsonl", rows))

    def trained(name: str, start: str, prompts: str, steps: int, **more: Any) -> Path:
        few = {"steps": 2, "rollout": {"prompts_per_step": 4}} if quick else {"steps": steps}
        named = {"student": {"model": start}, "data": {"prompts": prompts, "grader": "exact"}, "seed": seed}
        places = {"save": {"every": 0}, "output": str(folder / name)}
        checkpoint = kibitz.train(merged(study.experiment.recipe, named, places, more, few), overwrite=True).checkpoint
        assert checkpoint is not None
        return checkpoint

    held_out = {
        task: DataConfig(prompts=file(f"{task}-dev", problems("dev", task, num, 0, wrong=False))) for task in OPERATORS
    }

    def accuracy(model: Path) -> dict[str, float]:
        how = {"eval": EvalConfig(num_prompts=num), "rollout": RolloutConfig(max_tokens=40)}
        return {
            task: evaluate_model(str(model), data=data, **how)["sampled"]["accuracy"] for task, data in held_out.items()
        }

    models, found = {}, {}
    for name, good in LESSONS.items():
        lessons = [row for task in OPERATORS for row in problems("train", task, NUM_LESSONS, seed, task not in good)]
        start = study.place("student" if name == "student" else "teacher", seed)
        models[name] = trained(name, start, file(name, lessons), LESSON_STEPS, method={"type": "sft"})
        found[name] = accuracy(models[name])
    asked = [row for task in OPERATORS for row in problems("train", task, NUM_LESSONS, seed + 100, wrong=False)]
    prompts = file("prompts", [{key: row[key] for key in ("prompt", "answer", "task")} for row in asked])
    for arm, experts in ARMS.items():
        teacher = [{"model": str(models[e]), "name": e, "tasks": [e] if arm == "routed" else []} for e in experts]
        taught = trained(arm, str(models["student"]), prompts, STEPS, method={"type": "opd"}, teacher=teacher)
        found[arm] = accuracy(taught)
    return {"seed": seed, "problems": num, "accuracy": found}


# ------------------------------------------------------------------ what it says


def find(results: Results) -> Finding:
    """Report the accuracy of each model on each kind of problem."""
    runs = results.probes()
    seeds = {name: {task: [run["accuracy"][name][task] for run in runs] for task in OPERATORS} for name in ABOUT}
    shares = {
        name: {task: share_with_interval(found, runs[0]["problems"]) for task, found in by.items()}
        for name, by in seeds.items()
    }
    numbers = {
        "shares": shares,
        "rows": [(ABOUT[name], [(shares[name][task], seeds[name][task]) for task in OPERATORS]) for name in ABOUT],
        "seeds": len(runs),
        "problems": runs[0]["problems"],
        "steps": STEPS,
    }
    series = {f"problems with {OPERATORS[task]}": by for task, by in turned(shares).items()}
    return Finding(verdict(shares), numbers, [compared("what each model can do", "accuracy", list(ABOUT), series)])


def verdict(shares: Mapping[str, Mapping[str, Estimate]]) -> Verdict:
    """Reproduced if the routed student is above the student of each single expert at the other's task, and not below it at the
    expert's own, by the intervals; partly if it is so for one expert."""
    holds = [
        apart(shares["routed"][other], shares[f"{task} expert"][other])
        and not apart(shares[f"{task} expert"][task], shares["routed"][task])
        for task, other in (("sum", "product"), ("product", "sum"))
    ]
    return "reproduced" if all(holds) else "partly" if any(holds) else "not"


EXPERIMENT = Experiment(
    name="experts",
    question="What does a student learn from two experts, from each alone, from both routed by task, from both mixed?",
    world="arithmetic",
    recipe=merged(
        {**TOY, "steps": STEPS},
        {
            "rollout": {"prompts_per_step": 32, "max_tokens": 40},
            "optim": {"lr": 1e-3, "warmup_steps": 5, "tokens_per_micro_batch": 2048},
            "device": "cpu",
        },
    ),
    arms=(),
    rates=(1e-3,),
    dev_problems=300,
    probe=probe,
    find=find,
)
