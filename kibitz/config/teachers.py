"""The `teacher` section: one class per kind of teacher, told apart by the key that names it (`model: ...`)."""

from typing import Annotated, Any, Literal, Union

from pydantic import Discriminator, Tag

from kibitz.config.base import Section
from kibitz.config.sections import ModelConfig

SignalKind = Literal["dense", "top_k", "sampled"]
"""What a teacher can say of a token: its whole distribution, the K likeliest tokens, or the written one's probability."""


class TeacherConfig(Section):
    """What a teacher shares with every other one."""

    def answers(self) -> tuple[SignalKind, ...]:
        """The kinds of signal that it can give, the most telling first."""
        return ("dense", "top_k", "sampled")

    def writes(self) -> bool:
        """Whether it can write responses."""
        return True


class LocalTeacherConfig(ModelConfig, TeacherConfig):
    """A model in this process: it scores every token and is never changed."""


TEACHER_CONFIGS: dict[str, type[TeacherConfig]] = {"model": LocalTeacherConfig}
"""By the key that only this kind of teacher has, and must have."""


def teacher_key(value: Any) -> str:
    """Which kind of teacher a section is, read or not; what says nothing is taken for a model, to be told so."""
    for key, section in TEACHER_CONFIGS.items():
        if isinstance(value, section) or (isinstance(value, dict) and key in value):
            return key
    return "model"


def teacher_union() -> Any:
    """All sections of `TEACHER_CONFIGS` as one type."""
    members = tuple(Annotated[section, Tag(key)] for key, section in TEACHER_CONFIGS.items())
    return Annotated[Union[members], Discriminator(teacher_key)]  # noqa: UP007  # of a tuple made at run time
