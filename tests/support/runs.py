"""Recipes small enough for a test, and what of two runs must be equal."""

from pathlib import Path
from typing import Any

from kibitz.types import Step

STEP = Step(0, 4, 0)
TIMES = {"seconds", "tokens_per_second", "peak_bytes", "host_peak_bytes"}


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


def teacher_model(setup) -> Any:
    """The model behind a teacher that is one."""
    return setup.teacher.writer(lambda model: model)


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a log without what differs from one run to its repetition: seconds and memory."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
