"""From the recipe's `teacher` to a `Teacher`: first what can be refused without weights, then the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kibitz.alignment import Aligner
from kibitz.config import LocalTeacherConfig, StoredTeacherConfig, TeacherConfig
from kibitz.config.teachers import RemoteTeacherConfig
from kibitz.models import LanguageModel, check_same_tokenizer, load_model, load_tokenizer
from kibitz.teachers import Teacher, stored
from kibitz.teachers.aligned import aligned
from kibitz.teachers.local import local_teacher
from kibitz.teachers.remote import remote_teacher


@dataclass(frozen=True)
class Kind:
    """`check(config, tokenizer)` raises ValueError, before any weights load, for a teacher that cannot teach a student
    with this tokenizer; `load(config, device, tokenizer)` makes it."""

    check: Callable[[Any, Any], None]
    load: Callable[[Any, torch.device, Any], Teacher]


def _check_local(config: LocalTeacherConfig, tokenizer: Any) -> None:
    own = load_tokenizer(config, "teacher")
    if config.tokenizer == "student":
        check_same_tokenizer(tokenizer, own)


def _load_local(config: LocalTeacherConfig, device: torch.device, tokenizer: Any) -> Teacher:
    return local_teacher(load_model(config, "teacher", device))


def _check_stored(config: StoredTeacherConfig, tokenizer: Any) -> None:
    stored.check(Path(config.stored), tokenizer)


def _load_stored(config: StoredTeacherConfig, device: torch.device, tokenizer: Any) -> Teacher:
    return stored.stored_teacher(Path(config.stored), device)


def _check_remote(config: RemoteTeacherConfig, tokenizer: Any) -> None:
    """All that it can be asked, it is asked when it is loaded."""


def _load_remote(config: RemoteTeacherConfig, device: torch.device, tokenizer: Any) -> Teacher:
    return remote_teacher(config, tokenizer)


KINDS: dict[type[TeacherConfig], Kind] = {
    LocalTeacherConfig: Kind(_check_local, _load_local),
    StoredTeacherConfig: Kind(_check_stored, _load_stored),
    RemoteTeacherConfig: Kind(_check_remote, _load_remote),
}


def check(config: TeacherConfig | None, tokenizer: Any) -> None:
    if config is not None:
        KINDS[type(config)].check(config, tokenizer)


def load(
    config: TeacherConfig | None, device: torch.device, tokenizer: Any = None, template: dict[str, Any] | None = None
) -> Teacher | None:
    """For a teacher with a tokenizer of its own, `tokenizer` is the student's and `template` the arguments of its chat
    template."""
    if config is None:
        return None
    teacher = KINDS[type(config)].load(config, device, tokenizer)
    if isinstance(config, LocalTeacherConfig) and config.tokenizer == "own":
        teacher = aligned(teacher, Aligner(tokenizer, load_tokenizer(config, "teacher")), template or {})
    if config.store is None:
        return teacher
    return stored.with_store(teacher, Path(config.store), config.says_by(), device)


def reader_of(model: LanguageModel, tokenizer: Any, template: dict[str, Any]) -> Teacher:
    """A model to compare a student with, whatever its tokenizer: by tokens if it is the student's, else by spans."""
    teacher, aligner = local_teacher(model), Aligner(tokenizer, model.tokenizer)
    return teacher if aligner.same else aligned(teacher, aligner, template)
