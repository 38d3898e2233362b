"""From the recipe's `teacher` to a `Teacher`: first what can be refused without weights, then the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kibitz.config import LocalTeacherConfig, TeacherConfig
from kibitz.models import check_same_tokenizer, load_model, load_tokenizer
from kibitz.teachers import Teacher
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


KINDS: dict[type[TeacherConfig], Kind] = {LocalTeacherConfig: Kind(_check_local, _load_local)}


def check(config: TeacherConfig | None, tokenizer: Any) -> None:
    if config is not None:
        KINDS[type(config)].check(config, tokenizer)


def load(config: TeacherConfig | None, device: torch.device) -> Teacher | None:
    return None if config is None else KINDS[type(config)].load(config, device)
