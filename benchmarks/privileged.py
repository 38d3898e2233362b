"""A student that is taught by itself with the worked solution in the prompt (OPSD): what does it gain?

    python benchmarks/privileged.py

A large model can use a solution that stands in its prompt; the toy student has never seen one there. So it is first shown,
for half of its prompts, `PROMPT=SOLUTION` and must write the solution again; for the other half the plain prompt and a
solution as it would write it itself, misconception included. Half of the shown solutions' steps are misread too, so this
stage teaches to read what is shown, and nothing about which solution is right. What it leaves is the student *and* the
teacher of every arm: they differ in their prompts only. The rival is SFT on the same solutions of the same problems; with
no solutions at hand, a successful attempt at the same problem is shown (SDPO), and the rival is GRPO.

Rates, seeds, splits and files are those of every experiment (`kibitz.experiments`): what is done is not done again, and
the table is made of the files.
"""

import argparse
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kibitz
from kibitz import worlds
from kibitz.config import DataConfig, ModelConfig
from kibitz.data import load_prompts
from kibitz.engines.torch import TorchEngine
from kibitz.experiments import Arm, Experiment, Subject, pages
from kibitz.experiments.make_world import DATA_SEED
from kibitz.experiments.records import read, write
from kibitz.experiments.study import Study
from kibitz.models.load import load_model, load_tokenizer, stop_ids
from kibitz.types import Sampling
from kibitz.worlds import arithmetic

MAX_TOKENS = 48
SHOWN = "{{ prompt }}={{ response }}"
SUCCESS = "{{ prompt }}{% if success %}={{ success }}{% endif %}"

# ------------------------------------------------------------------------------------------------------------ reader


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


def make_reader(folder: Path, steps: int, batch: int = 64) -> Path:
    """The shipped student after the lessons."""
    done = folder / "reader" / "checkpoints" / f"step-{steps:06d}"
    if done.exists():
        return done
    source = {
        "student": {"model": str(worlds.get("arithmetic").checkpoint("student"))},
        "data": {"prompts": _file(folder / "lessons.jsonl", lessons(steps * batch, DATA_SEED))},
        "method": {"type": "sft"},
        "rollout": {"prompts_per_step": batch, "samples_per_prompt": 1, "max_tokens": MAX_TOKENS},
        "optim": {"name": "muon", "lr": 3e-3, "muon_lr": 1e-2, "warmup_steps": 10, "tokens_per_micro_batch": 4096},
        "steps": steps,
        "eval": {"every": 0, "num_prompts": 1, "heatmaps": 0},
        "save": {"every": 0},
        "device": "cpu",
        "threads": 1,
    }
    kibitz.train(source, [f"output={folder / 'reader'}"], overwrite=True)
    return done


def _file(path: Path, rows: list[dict[str, str]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def reading(model: Path, folder: Path, num: int, split: str = "test") -> dict[str, dict[str, float]]:
    """How often it is right, and how often it writes again what it was shown, at temperature 1: without a solution, with a
    right one, with one that is misread wherever it can be."""
    config = ModelConfig(model=str(model))
    tokenizer = load_tokenizer(config, "student")
    loaded = load_model(config, "student", torch.device("cpu"), tokenizer)
    sampling, found = Sampling(max_tokens=64, stop_ids=stop_ids(loaded, []), seed=0), {}
    for name, corrupted in {"plain": None, "right": 0.0, "misread": 1.0}.items():
        rng, rows = random.Random(name), worlds.get("arithmetic").rows(split, num, 0)
        shown = ["" if corrupted is None else arithmetic.solve(row["prompt"], rng, corrupted) for row in rows]
        asked = [row | {"prompt": f"{row['prompt']}={text}".rstrip("=")} for row, text in zip(rows, shown, strict=True)]
        data = DataConfig(prompts=_file(folder / f"{name}.jsonl", asked))
        written = TorchEngine(loaded).generate(load_prompts(data, tokenizer), sampling)
        texts = [tokenizer.decode(r.response_ids, skip_special_tokens=True) for r in written]
        found[name] = {
            "right": sum(arithmetic.grade(row["answer"], text) for row, text in zip(rows, texts, strict=True)) / num,
            "again": sum(a == b for a, b in zip(texts, shown, strict=True)) / num,
            "shown_right": sum(arithmetic.grade(row["answer"], text) for row, text in zip(rows, shown, strict=True)) / num,
        }  # fmt: skip
    return found


# ------------------------------------------------------------------------------------------------------------ arms


def _taught(name: str, about: str, student: str, context: str, family: str = "", **method: Any) -> Arm:
    changes: dict[str, Any] = {"teacher": {"student": student, "context": context}, "method": {"type": "opd", **method}}
    if context == SUCCESS:
        changes["rollout"] = {"prompts_per_step": 8, "samples_per_prompt": 8}
    return Arm(name, about, changes, family=family)


EXPERIMENT = Experiment(
    name="privileged",
    question="What does a student learn from itself, if its teacher's half sees the worked solution?",
    world="arithmetic",
    models={"student": "reader"},
    recipe={
        "rollout": {"prompts_per_step": 64, "samples_per_prompt": 1, "max_tokens": MAX_TOKENS},
        "optim": {"warmup_steps": 10},
        "steps": 40,
        "threads": 1,
        "device": "cpu",
    },
    rates=(5e-4, 1e-3, 2e-3),
    reference="sft",
    dev_problems=256,
    test_problems=512,
    arms=(
        _taught("opsd", "JSD(½) to its start, which sees a solution", "start", SHOWN, "opsd", divergence="jsd"),
        _taught("opsd-rkl", "reverse KL to its start, which sees a solution", "start", SHOWN, "opsd"),
        _taught("opsd-fkl", "forward KL to its start, which sees a solution", "start", SHOWN, "opsd", divergence="forward_kl"),
        _taught("opsd-current", "JSD(½) to itself as it is now, which sees a solution", "current", SHOWN, divergence="jsd"),
        Arm("sft", "cross-entropy on the same solutions", {"method": {"type": "sft"}}),
        _taught("sdpo", "JSD(½) to its average, which sees a successful attempt", "ema", SUCCESS, divergence="jsd"),
        Arm("grpo", "the reward that sdpo's attempts are chosen by, nothing else",
            {"method": {"type": "grpo"}, "rollout": {"prompts_per_step": 8, "samples_per_prompt": 8}}),
    ),
)  # fmt: skip


def main(work: Path, results: Path, only: list[str], steps: int, page: Path | None) -> None:
    torch.set_num_threads(1)
    reader, folder = make_reader(work, steps), results / EXPERIMENT.name
    if (told := read(folder / "reading.json")) is None:
        told = {"steps": steps, "test": reading(reader, work, EXPERIMENT.test_problems)}
        write(folder / "reading.json", told)
    print(json.dumps(told), flush=True)
    subject = Subject.of(EXPERIMENT, {"student": reader.as_posix()})
    Study(EXPERIMENT, subject, folder, work / "runs", partial(print, flush=True)).run(EXPERIMENT.choose(only))
    pages.write(EXPERIMENT, results)
    if page is not None:
        page.write_text(pages.render(page.read_text("utf-8"), {EXPERIMENT.name: EXPERIMENT}, results), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/privileged"), help="the reader and the runs")
    parser.add_argument("--results", type=Path, default=Path("results"), help="a JSON file for each run, and the table")
    parser.add_argument("--only", default="", help="some of its arms: opsd,sft")
    parser.add_argument("--steps", type=int, default=300, help="of the lessons in reading")
    parser.add_argument("--page", type=Path, help="put the table between the marks that this page has for it")
    given = parser.parse_args()
    main(given.work, given.results, [name for name in given.only.split(",") if name], given.steps, given.page)
