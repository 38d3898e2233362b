"""From the recipe's `teacher` to a `Teacher`: first what can be refused without weights, then the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kibitz.config import LocalTeacherConfig, StoredTeacherConfig, TeacherConfig
from kibitz.models import check_same_tokenizer, load_model, load_tokenizer
from kibitz.teachers import Teacher, stored
from kibitz.teachers.local import local_teacher


@dataclass(frozen=True)
class Kind:
    """`check(config, tokenizer)` raises ValueError, before any weights load, for a teacher that cannot teach a student
    with this tokenizer; `load(config, device)` makes it."""

    check: Callable[[Any, Any], None]
    load: Callable[[Any, torch.device], Teacher]


def _check_local(config: LocalTeacherConfig, tokenizer: Any) -> None:
    check_same_tokenizer(tokenizer, load_tokenizer(config, "teacher"))


def _load_local(config: LocalTeacherConfig, device: torch.device) -> Teacher:
    return local_teacher(load_model(config, "teacher", device))


def _check_stored(config: StoredTeacherConfig, tokenizer: Any) -> None:
    stored.check(Path(config.stored), tokenizer)


def _load_stored(config: StoredTeacherConfig, device: torch.device) -> Teacher:
    return stored.stored_teacher(Path(config.stored), device)


KINDS: dict[type[TeacherConfig], Kind] = {
    LocalTeacherConfig: Kind(_check_local, _load_local),
    StoredTeacherConfig: Kind(_check_stored, _load_stored),
}


def check(config: TeacherConfig | None, tokenizer: Any) -> None:
    if config is not None:
        KINDS[type(config)].check(config, tokenizer)


def load(config: TeacherConfig | None, device: torch.device) -> Teacher | None:
    if config is None:
        return None
    teacher = KINDS[type(config)].load(config, device)
    if config.store is None:
        return teacher
    return stored.with_store(teacher, Path(config.store), config.says_by(), device)
