"""Recipes small enough for a test, and what of two runs must be equal."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import kibitz
from kibitz.training.trainer import NullProgress
from kibitz.types import Step

STEP = Step(0, 4, 0)
LEAST = {
    "student": {"model": "s"},
    "teacher": {"model": "t"},
    "data": {"prompts": "p.jsonl"},
}  # a recipe may have no less
TIMES = {"seconds", "tokens_per_second", "peak_bytes", "host_peak_bytes", "sync", "timeline"}
TIMES |= {
    "rollout_bytes_per_token",
    "teacher_bytes_per_token",
}  # of a server's answers, a probe more or less among them


def recipe(student: Path, teacher: Path | None, output: Path, /, **sections: Any) -> dict[str, Any]:
    """A recipe small enough for a test: 8 prompts of 2 samples a step, 12 tokens each."""
    base: dict[str, Any] = {
        "student": {"model": str(student)},
        "data": {"world": "arithmetic", "limit": 64},
        "method": {"type": "opd"},
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 2, "max_tokens": 12},
        "optim": {"lr": 1e-3},
        "steps": 4,
        "eval": {"every": 0, "num_prompts": 8, "heatmaps": 2},
        "threads": 1,
        "output": str(output),
    }
    if teacher is not None:
        base["teacher"] = {"model": str(teacher)}
    for name, section in sections.items():
        base[name] = (
            {**base[name], **section} if isinstance(section, dict) and isinstance(base.get(name), dict) else section
        )
    return base


def model_of(teacher) -> Any:
    """The model behind a teacher that is one."""
    return teacher.writer(lambda model: model)


def teacher_model(setup) -> Any:
    return model_of(setup.parts.teacher)


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a log without what differs from one run to its repetition: seconds and memory."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


class Crash(NullProgress):
    """The power fails behind a step."""

    def __init__(self, step: int = 3):
        self.at = step

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] == self.at:
            raise RuntimeError("power cut")


class Interrupt(NullProgress):
    """Somebody presses Ctrl-C behind a step."""

    def __init__(self, step: int = 3):
        self.at = step

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] == self.at:
            os.kill(os.getpid(), signal.SIGINT)


class Notes(NullProgress):
    """Keeps what a run tells."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def crash(tree: dict[str, Any], step: int = 3, **options: Any) -> None:
    """Trains until the power fails behind `step`."""
    with pytest.raises(RuntimeError, match="power cut"):
        kibitz.train(tree, progress=Crash(step), **options)


def crash_and_resume(tree: dict[str, Any], step: int = 3, **options: Any) -> kibitz.Run:
    """The run that died behind `step` and went on from its last checkpoint."""
    crash(tree, step, **options)
    return kibitz.train(tree, resume=True, **options)
