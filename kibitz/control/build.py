"""Makes the teacher that a recipe names, before anything is played."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kibitz.control.environments import Shape
from kibitz.control.export import load
from kibitz.control.recipe import PolicyTeacherConfig
from kibitz.control.served import ServedTeacher
from kibitz.control.taught import load_policy
from kibitz.control.teachers import (
    CachedTeacher,
    FunctionTeacher,
    NetworkTeacher,
    NoisyTeacher,
    SampledTeacher,
    Teacher,
)


def build_teacher(config: PolicyTeacherConfig, shape: Shape) -> Teacher:
    """The teacher that a recipe names; ValueError, before anything is played, for one that is not there."""
    asked: Teacher
    match config.kind:
        case "sb3":
            asked = NetworkTeacher(f"the teacher {config.sb3}", _sb3(config), shape)
        case "run":
            asked = _of_run(Path(str(config.run)), config.trust, shape)
        case "python":
            asked = FunctionTeacher(f"the teacher {config.python}", _function(str(config.python)), shape)
        case "url":
            asked = ServedTeacher(config, shape)
    if config.noise:
        asked = NoisyTeacher(asked, config.noise, config.seed, shape)
    if config.samples > 1:
        return SampledTeacher(asked, config.samples, shape)
    plain = config.kind in ("python", "url") and not config.noise
    return CachedTeacher(asked) if plain and config.cache else asked


def _sb3(config: PolicyTeacherConfig) -> Any:
    import stable_baselines3

    path = Path(str(config.sb3))
    if not path.is_file():
        raise ValueError(f"teacher.sb3: there is no file {path}")
    try:
        return getattr(stable_baselines3, config.algorithm).load(path, device="cpu")
    except Exception as error:  # a pickle raises what it likes
        raise ValueError(f"teacher.sb3: {path} cannot be loaded as {config.algorithm}: {error}") from error


def _of_run(folder: Path, trust: bool, shape: Shape) -> Teacher:
    """A run of kibitz: weights alone are read of a network, and a readable student is the text of its exported function."""
    name = f"the teacher {folder}"
    if (folder / "policy.py").is_file():
        if not trust:
            raise ValueError(f"teacher.run: {folder}/policy.py is a program: write teacher.trust: true if you trust it")
        act = load((folder / "policy.py").read_text(encoding="utf-8"))
        return FunctionTeacher(name, lambda seen_BO: [act(row.tolist()) for row in seen_BO], shape)
    return NetworkTeacher(name, load_policy(folder), shape)


def _function(name: str) -> Callable[[np.ndarray], Any]:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"teacher.python: {name} names no function: write module:function")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"teacher.python: {name} cannot be imported: {error}") from None
    if not callable(found):
        raise ValueError(f"teacher.python: {name} is no function")
    return found
