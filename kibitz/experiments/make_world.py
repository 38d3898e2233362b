"""The models that the worlds ship, made from nothing by the library itself.

    kibitz worlds make arithmetic

Arithmetic is runs of supervised fine-tuning: a teacher; a smaller student that becomes competent; and the same student
on solutions that read `5+2*3` from left to right, which gives it the misconception a teacher can mend. Two more students are
as often wrong for other reasons: one was competent and then shown solutions with random slips, one was trained too little.
The long form goes on from the shipped teacher and student of arithmetic, which have to learn letters and longer texts.
Navigation is two runs: a teacher that learns from places off the way too, and a very small student that is shown shortest
walks only. The assistant is one run, on documents and chat together; it is student and, later, its own teacher.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import kibitz
from kibitz.models.progress import no_progress_bars
from kibitz.training.trainer import Progress
from kibitz.worlds import arithmetic_long, get

# Muon on the matrices: with AdamW alone the circuits that copy a line come several times later. Many small batches
# do more than few large ones: a student of 600 x 32 sequences reached 0.65, one of 300 x 64 reached 0.41.
FROM_NOTHING = {"name": "muon", "lr": 5e-3, "muon_lr": 2e-2, "weight_decay": 0.01, "warmup_steps": 10}
GROWN = {"name": "muon", "lr": 2e-3, "muon_lr": 1e-2, "weight_decay": 0.01, "warmup_steps": 10}
MISLED = {"lr": 1e-3, "weight_decay": 0.01, "warmup_steps": 10}

DATA_SEED = 1000  # no seed that a person would try: the corpora here are nobody's training prompts
TEACHER_SHAPE = {"hidden_size": 96, "num_hidden_layers": 4, "intermediate_size": 256}
STUDENT_SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 176}
GUIDE_SHAPE = {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 128}
WALKER_SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 44}


@no_progress_bars()
def blank(folder: Path, shape: dict[str, Any], seed: int, world: str = "arithmetic", tokenizer: Any = None) -> Path:
    """A Qwen3 of that shape with random weights, saved with the world's tokenizer, or with another."""
    tokenizer = tokenizer or get(world).tokenizer()
    num_heads = 4
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=shape["hidden_size"] // num_heads,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **shape,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@no_progress_bars()
def grown(folder: Path, name: str, seed: int) -> Path:
    """A shipped model of arithmetic with the letters of the long form, whose rows are drawn as a new model's are."""
    world = get("arithmetic-long")
    tokenizer, model = world.tokenizer(), AutoModelForCausalLM.from_pretrained(get("arithmetic").checkpoint(name))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.max_position_embeddings = arithmetic_long.ROOM
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(
    start: Path, steps: int, batch: int, optim: dict[str, Any], world: str, seed: int, **options: Any
) -> dict[str, Any]:
    """Supervised fine-tuning on demonstrations of the world, each seen once."""
    return {
        "student": {"model": str(start)},
        "data": {"world": world, "limit": steps * batch, "options": options},
        "method": {"type": "sft"},
        "rollout": {"prompts_per_step": batch, "samples_per_prompt": 1, "max_tokens": get(world).longest_response},
        "optim": {"tokens_per_micro_batch": 1024, **optim},
        "steps": steps,
        "eval": {"every": 0, "num_prompts": 512},
        "save": {"every": 0},
        "seed": seed,
        "device": "cpu",
        "threads": 1,
    }


def make(name: str, folder: Path, seed: int = 0, progress: Progress | None = None) -> dict[str, dict[str, Any]]:
    """Train all that the world ships: minutes of one CPU core. Leaves `folder/teacher`, `folder/student` and so on, and the
    runs in `folder/runs`; returns the last evaluation of each. The shipped models are those of seed 0."""
    if name not in MAKERS:
        raise ValueError(f"the world {name!r} ships no models of its own: write {' or '.join(MAKERS)}")
    evals: dict[str, dict[str, Any]] = {}

    def trained(stage: str, source: dict[str, Any]) -> Path:
        run = kibitz.train(source, [f"output={folder / 'runs' / stage}"], overwrite=True, progress=progress)
        evals[stage] = run.evals[-1]
        assert run.checkpoint is not None
        return run.checkpoint

    for role, checkpoint in MAKERS[name](folder / "runs", seed, trained).items():
        shutil.rmtree(folder / role, ignore_errors=True)
        shutil.copytree(checkpoint, folder / role, ignore=shutil.ignore_patterns("training"))
    return evals


Trained = Callable[[str, dict[str, Any]], Path]
"""The name of a stage and its recipe, to the checkpoint that it leaves."""


def _arithmetic(runs: Path, seed: int, trained: Trained) -> dict[str, Path]:
    data_seed = DATA_SEED + seed
    teacher = blank(runs / "blank-teacher", TEACHER_SHAPE, seed)
    teacher = trained("teacher", recipe(teacher, 1800, 32, FROM_NOTHING, "arithmetic-wide", data_seed))
    blank_student = blank(runs / "blank-student", STUDENT_SHAPE, seed)
    competent = recipe(blank_student, 1200, 32, FROM_NOTHING, "arithmetic-wide", data_seed)
    competent = trained("competent", competent)
    student = trained("student", recipe(competent, 200, 64, MISLED, "arithmetic", data_seed, corrupted=0.9))
    slips = trained("slips", recipe(competent, 200, 64, MISLED, "arithmetic", data_seed, slips=0.1))
    undertrained = recipe(blank_student, 600, 32, FROM_NOTHING, "arithmetic-wide", data_seed)
    undertrained = trained("undertrained", undertrained)
    return {"teacher": teacher, "student": student, "undertrained": undertrained, "slips": slips}


def _arithmetic_long(runs: Path, seed: int, trained: Trained) -> dict[str, Path]:
    data_seed = DATA_SEED + seed
    teacher = grown(runs / "grown-teacher", "teacher", seed)
    teacher = trained("teacher", recipe(teacher, 1200, 32, GROWN, "arithmetic-long", data_seed))
    student = grown(runs / "grown-student", "student", seed)
    student = trained("competent", recipe(student, 900, 32, GROWN, "arithmetic-long", data_seed))
    misled = recipe(student, 200, 32, MISLED, "arithmetic-long", data_seed + 1, corrupted=0.9)
    return {"teacher": teacher, "student": trained("student", misled)}


def _navigation(runs: Path, seed: int, trained: Trained) -> dict[str, Path]:
    data_seed = DATA_SEED + seed
    teacher = blank(runs / "blank-teacher", GUIDE_SHAPE, seed, "navigation")
    teacher = trained("teacher", recipe(teacher, 1500, 64, FROM_NOTHING, "navigation-astray", data_seed))
    student = blank(runs / "blank-student", WALKER_SHAPE, seed, "navigation")
    few = recipe(student, 200, 64, FROM_NOTHING, "navigation", data_seed)
    student = trained("student", few | {"data": {"world": "navigation", "limit": 2000}})
    return {"teacher": teacher, "student": student}


def _assistant(runs: Path, seed: int, trained: Trained) -> dict[str, Path]:
    student = blank(runs / "blank-student", STUDENT_SHAPE, seed, "assistant")
    optim = FROM_NOTHING | {"tokens_per_micro_batch": 2048}
    return {
        "student": trained(
            "student", recipe(student, 2000, 32, optim, "assistant-background", DATA_SEED + seed, chat=0.5)
        )
    }


MAKERS: dict[str, Callable[[Path, int, Trained], dict[str, Path]]] = {
    "arithmetic": _arithmetic,
    "arithmetic-long": _arithmetic_long,
    "navigation": _navigation,
    "assistant": _assistant,
}
