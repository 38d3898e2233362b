"""A student that is taught by itself with the worked solution in the prompt (OPSD): what does it gain?

A large model can use a solution that stands in its prompt; the toy student has never seen one there. So it is first shown,
for half of its prompts, `PROMPT=SOLUTION` and must write the solution again; for the other half the plain prompt and a
solution as it would write it itself, misconception included. Half of the shown solutions' steps are misread too, so this
stage teaches to read what is shown, and nothing about which solution is right. What it leaves is the student *and* the
teacher of every arm: they differ in their prompts only. The rival is SFT on the same solutions of the same problems; with
no solutions at hand, a successful attempt at the same problem is shown (SDPO), and the rival is GRPO.
"""

import random
from pathlib import Path
from typing import Any

from kibitz import worlds
from kibitz.config import DataConfig, ModelConfig
from kibitz.data import load_prompts
from kibitz.engines.torch import TorchEngine
from kibitz.evaluate.evaluate import grade
from kibitz.experiments.design import MADE, OF_ARM, TOY, Arm, Experiment, merged
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.make_world import DATA_SEED
from kibitz.experiments.records import Record, measure, read, score, share_with_interval, write_rows
from kibitz.experiments.results import NotRun, Results
from kibitz.experiments.shapes import compared
from kibitz.experiments.statistics import Estimate, apart
from kibitz.models.load import load_model, load_tokenizer, pick_device, stop_ids
from kibitz.types import Sampling
from kibitz.worlds import arithmetic

SHOWN = "{{ prompt }}={{ response }}"
SUCCESS = "{{ prompt }}{% if success %}={{ success }}{% endif %}"
FIXED = "opsd-fixed"
"""The family of the arms whose teacher is the student as it began."""
LESSON_STEPS, LESSONS_A_STEP = 300, 64


# ------------------------------------------------------------------ the reader


def lessons(count: int, seed: int) -> list[dict[str, str]]:
    """Plain prompts with solutions as the student writes them, and prompts that show a solution, to be written again."""
    rng, found = random.Random(f"lessons/{seed}"), []
    for number, row in enumerate(worlds.get("arithmetic-wide").rows("train", count, seed)):
        if number % 2:
            found.append({"prompt": row["prompt"], "response": arithmetic.solve(row["prompt"], rng, corrupted=0.9)})
        else:
            shown = arithmetic.solve(row["prompt"], rng, corrupted=0.5)
            found.append({"prompt": f"{row['prompt']}={shown}", "response": shown})
    return found


def written_lessons(study: Any) -> Path:
    return write_rows(study.work / "lessons.jsonl", lessons(LESSON_STEPS * LESSONS_A_STEP, DATA_SEED))


READER = Arm(
    "reader",
    "the shipped student after lessons in reading what is shown",
    {
        "student": {"model": "arithmetic/student"},
        "method": {"type": "sft"},
        "optim": {"name": "muon", "muon_lr": 1e-2, "tokens_per_micro_batch": 4096},
        "steps": LESSON_STEPS,
    },
    rates=(3e-3,),
    data="lessons",
)


def probe(study: Any, seed: int) -> Record:
    """Measure how often the student is right, and how often it repeats the solution that it is shown, at temperature 1: without a
    solution, with a right one, and with one that is misread at every possible step."""
    config, num = ModelConfig(model=study.place("student", seed)), study.experiment.test_problems
    tokenizer = load_tokenizer(config, "student")
    loaded = load_model(config, "student", pick_device(), tokenizer)
    sampling, found = Sampling(max_tokens=64, stop_ids=stop_ids(loaded, []), seed=seed), {}
    for name, corrupted in {"plain": None, "right": 0.0, "misread": 1.0}.items():
        rng, rows = random.Random(name), worlds.get("arithmetic").rows("test", num, 0)
        shown = ["" if corrupted is None else arithmetic.solve(row["prompt"], rng, corrupted) for row in rows]
        asked = [row | {"prompt": f"{row['prompt']}={text}".rstrip("=")} for row, text in zip(rows, shown, strict=True)]
        data = DataConfig(prompts=str(write_rows(study.work / f"{name}.jsonl", asked)))
        written = TorchEngine(loaded).generate(load_prompts(data, tokenizer), sampling)
        grade(None, loaded, written)
        texts = [rollout.text for rollout in written]
        found[name] = {
            "right": sum(arithmetic.grade(row["answer"], text) for row, text in zip(rows, texts, strict=True)) / num,
            "again": sum(a == b for a, b in zip(texts, shown, strict=True)) / num,
            "shown_right": sum(arithmetic.grade(row["answer"], text) for row, text in zip(rows, shown, strict=True)) / num,
        }  # fmt: skip
    return {"test": found}


# ------------------------------------------------------------------ what it says


def find(results: Results) -> Finding:
    """Compare the student's gain from itself as the teacher with the gain by SFT on the same solutions."""
    student, best = results.model("student"), results.of_family(FIXED)
    before = share_with_interval([student["sampled"]["accuracy"]], student["num_prompts"])
    shares = {arm.name: results.accuracy(arm.name) for arm in results.experiment.arms if results.has(arm.name)}
    greedy = {name: results.accuracy(name, "greedy") for name in shares}
    dev = {name: max(map(score, sweep.values())) for name, sweep in results.sweeps.items()}
    numbers = {
        "before": before,
        "best": shares[best],
        "shares": shares,
        "greedy": greedy,
        "dev": dev,
        "tokens": {"student": measure(student)["response_tokens"]}
        | {name: results.mean(name, lambda run: run["test"]["response_tokens"])[0] for name in shares},
        "reading": _reading(results),
    }
    levels = {"student before": before[0]}
    series = {"temperature 1": shares, "greedy": greedy}
    return Finding(
        verdict(before, shares[best]), numbers, [compared("accuracy", "accuracy", list(shares), series, levels=levels)]
    )


def verdict(before: Estimate, after: Estimate) -> Verdict:
    """Reproduced if the student that is taught by its fixed start ends above it by the interval of the difference."""
    if apart(after, before):
        return "reproduced"
    return "partly" if after[0] > before[0] else "not"


def _reading(results: Results) -> dict[str, Any]:
    """Return the first seed's probe or, without probes, the record in `reading.json`."""
    earlier = read(results.folder / "reading.json")
    try:
        return results.probes()[0]["test"]
    except NotRun:
        if earlier is None:
            raise
        return earlier["test"]


# ------------------------------------------------------------------ runs


def _taught(name: str, about: str, student: str, context: str, family: str = "", **method: Any) -> Arm:
    changes: dict[str, Any] = {"teacher": {"student": student, "context": context}, "method": {"type": "opd", **method}}
    if context == SUCCESS:
        changes["rollout"] = {"prompts_per_step": 8, "samples_per_prompt": 8}
    return Arm(name, about, changes, family=family)


EXPERIMENT = Experiment(
    name="privileged",
    question="What does a student learn from itself, if its teacher's half sees the worked solution?",
    world="arithmetic",
    models={"student": f"{OF_ARM}{READER.name}"},
    data={"prompts": {"world": "arithmetic"}, "lessons": {"prompts": f"{MADE}lessons"}},
    recipe=merged(TOY, {"rollout": {"max_tokens": 48}, "device": "cpu"}),
    rates=(5e-4, 1e-3, 2e-3),
    reference="sft",
    dev_problems=256,
    test_problems=512,
    quick_arms=("opsd-rkl", "sft"),
    makers=(READER,),
    made={"lessons": written_lessons},
    arms=(
        _taught("opsd", "JSD(½) to its start, which sees a solution", "start", SHOWN, FIXED, divergence="jsd"),
        _taught("opsd-rkl", "reverse KL to its start, which sees a solution", "start", SHOWN, FIXED),
        _taught("opsd-fkl", "forward KL to its start, which sees a solution", "start", SHOWN, FIXED, divergence="forward_kl"),
        _taught("opsd-current", "JSD(½) to itself as it is now, which sees a solution", "current", SHOWN, divergence="jsd"),
        Arm("sft", "cross-entropy on the same solutions", {"method": {"type": "sft"}}),
        _taught("sdpo", "JSD(½) to its average, which sees a successful attempt", "ema", SUCCESS, divergence="jsd"),
        Arm("grpo", "the reward that sdpo's attempts are chosen by, nothing else",
            {"method": {"type": "grpo"}, "rollout": {"prompts_per_step": 8, "samples_per_prompt": 8}}),
    ),
    probe=probe,
    find=find,
)  # fmt: skip
