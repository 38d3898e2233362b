"""Build a `Teacher` from the recipe's section: first refuse what can be refused without weights, then load them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kibitz.config import (
    LocalTeacherConfig,
    ModelConfig,
    Recipe,
    StoredTeacherConfig,
    StudentTeacherConfig,
    TeacherConfig,
)
from kibitz.config.teachers import ChatTeacherConfig, HostedTeacherConfig, RemoteTeacherConfig
from kibitz.models import LanguageModel, lora, offload
from kibitz.models.load import check_same_tokenizer, load_tokenizer
from kibitz.teachers import Teacher, stored
from kibitz.teachers.aligned import aligned
from kibitz.teachers.alignment import Aligner
from kibitz.teachers.chat import chat_teacher
from kibitz.teachers.context import check_context, in_context
from kibitz.teachers.local import local_teacher
from kibitz.teachers.own import own_teacher
from kibitz.teachers.remote import remote_teacher
from kibitz.teachers.several import routed, several
from kibitz.types import Prompt


@dataclass(frozen=True)
class StudentInfo:
    """The student that a teacher is for: some teachers are made of it, or must know its tokenizer. `load` loads the teacher's own
    model."""

    tokenizer: Any
    template: Mapping[str, Any] = field(default_factory=dict)
    model: LanguageModel | None = None
    section: ModelConfig | None = None
    load: Callable[[LocalTeacherConfig, str, torch.device], LanguageModel] = offload.load_frozen


@dataclass(frozen=True)
class Kind:
    """`check(config, tokenizer)` raises ValueError, before any weights load, for a teacher that cannot teach a student
    with this tokenizer, and gives the teacher's own; `load(config, device, pupil)` makes it."""

    check: Callable[[Any, Any], Any]
    load: Callable[[Any, torch.device, StudentInfo | None], Teacher]


def _check_local(config: LocalTeacherConfig, tokenizer: Any) -> Any:
    offload.require(config, "teacher")
    own = load_tokenizer(config, "teacher")
    if config.tokenizer == "student":
        check_same_tokenizer(tokenizer, own)
    return own


def _load_local(config: LocalTeacherConfig, device: torch.device, student: StudentInfo | None) -> Teacher:
    load = offload.load_frozen if student is None else student.load
    teacher = local_teacher(load(config, "teacher", device))
    if config.tokenizer == "student":
        return teacher
    assert student is not None, "spans are of two tokenizers"
    return aligned(teacher, Aligner(student.tokenizer, load_tokenizer(config, "teacher")), dict(student.template))


def _check_stored(config: StoredTeacherConfig, tokenizer: Any) -> Any:
    stored.check(Path(config.stored), tokenizer)
    return tokenizer


def _load_stored(config: StoredTeacherConfig, device: torch.device, student: StudentInfo | None) -> Teacher:
    return stored.stored_teacher(Path(config.stored), device)


def _load_remote(config: RemoteTeacherConfig, device: torch.device, student: StudentInfo | None) -> Teacher:
    assert student is not None, "a server is asked about the student's tokens"
    return remote_teacher(config, student.tokenizer)


def _check_hosted(config: HostedTeacherConfig, tokenizer: Any) -> Any:
    section = ModelConfig(model=config.model)
    if lora.is_adapter(Path(config.model)):
        raise ValueError(
            f"teacher.model: {config.model} is an adapter, and a server wants a whole folder: `kibitz export FOLDER --merge "
            "--output NEW`, and teacher.model=NEW"
        )
    check_same_tokenizer(tokenizer, own := load_tokenizer(section, "teacher"))
    return own


def _load_hosted(config: HostedTeacherConfig, device: torch.device, student: StudentInfo | None) -> Teacher:
    raise ValueError(
        f"teacher.engine: the server of {config.model} is started by `kibitz train` alone: leave out engine here"
    )


def _load_own(config: StudentTeacherConfig, device: torch.device, student: StudentInfo | None) -> Teacher:
    assert student is not None and student.model is not None and student.section is not None, "nothing to make it of"
    return own_teacher(config, student.section, student.model)


def _load_chat(config: ChatTeacherConfig, device: torch.device, student: StudentInfo | None) -> Teacher:
    assert student is not None, "its text becomes the student's tokens"
    return chat_teacher(config, student.tokenizer)


KINDS: dict[type[TeacherConfig], Kind] = {
    LocalTeacherConfig: Kind(_check_local, _load_local),
    StudentTeacherConfig: Kind(lambda config, tokenizer: tokenizer, _load_own),
    StoredTeacherConfig: Kind(_check_stored, _load_stored),
    # All that a server can be asked, it is asked when it is loaded.
    RemoteTeacherConfig: Kind(lambda config, tokenizer: tokenizer, _load_remote),
    HostedTeacherConfig: Kind(_check_hosted, _load_hosted),
    ChatTeacherConfig: Kind(lambda config, tokenizer: tokenizer, _load_chat),
}


def check(config: TeacherConfig, tokenizer: Any) -> Any:
    """Raise ValueError for a teacher that cannot teach a student with this tokenizer; the tokenizer of the teacher."""
    return KINDS[type(config)].check(config, tokenizer)


def load(config: TeacherConfig, device: torch.device, student: StudentInfo | None = None) -> Teacher:
    """One teacher with its store, and no context yet."""
    teacher = KINDS[type(config)].load(config, device, student)
    if config.store is None:
        return teacher
    return stored.with_store(teacher, Path(config.store), config.says_by(), device)


def check_all(recipe: Recipe, tokenizer: Any, prompts: Sequence[Prompt]) -> list[Any]:
    """The tokenizer of each teacher. `prompts` are all that a teacher will read: of training, and of evaluation."""
    configs = recipe.teachers
    tokenizers = [check(config, tokenizer) for config in configs]
    heard = routed(configs, prompts, recipe.method) if len(configs) > 1 else [prompts] * len(configs)
    for config, own in zip(configs, heard, strict=True):
        if config.context is not None:
            check_context(config.context, own)
    return tokenizers


def load_all(
    recipe: Recipe,
    tokenizers: Sequence[Any],
    student: LanguageModel,
    load_own: Callable[[LocalTeacherConfig, str, torch.device], LanguageModel] = offload.load_frozen,
) -> Teacher | None:
    """The teacher of a run, if it has any. `tokenizers` are the teachers', `load_own` how a model of theirs is had."""
    members, configs, device = [], recipe.teachers, student.device
    info = StudentInfo(student.tokenizer, recipe.data.template, student, recipe.student, load_own)
    for config, tokenizer in zip(configs, tokenizers, strict=True):
        teacher = load(config, device, info)
        members.append(teacher if config.context is None else in_context(teacher, config.context, tokenizer))
    if len(members) > 1:
        return several(members, configs)
    return members[0] if members else None


def reader_of(model: LanguageModel, tokenizer: Any, template: dict[str, Any]) -> Teacher:
    """A model to compare a student with, whatever its tokenizer: by tokens if it is the student's, else by spans."""
    teacher, aligner = local_teacher(model), Aligner(tokenizer, model.tokenizer)
    return teacher if aligner.same else aligned(teacher, aligner, template)
