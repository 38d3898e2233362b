"""The `teacher` section: one class per kind of teacher, told apart by the key that names it (`model: ...`)."""

from typing import Annotated, Any, Literal, Union

from pydantic import Discriminator, Field, Tag, model_validator

from kibitz.config.base import Section
from kibitz.config.sections import ModelConfig
from kibitz.config.servers import ServerConfig, ServerURL

SignalKind = Literal["dense", "top_k", "named", "sampled", "spans", "span_distributions"]
"""What a teacher can say of a token: its whole distribution, the K likeliest tokens, those that it is asked about, or the
written one's probability. With a tokenizer of its own, the probability of a span of text, alone or with a distribution
over its first token."""


class TeacherConfig(Section):
    """What a teacher shares with every other one."""

    store: str | None = Field(
        None,
        description="Folder that keeps what the teacher says, so that it need not read the same rollout again, in this run or "
        "another (Lightning OPD, 2604.13010). Whole distributions take 2-4 bytes x its width for each token.",
    )

    def says_by(self) -> dict[str, Any]:
        """The settings that change what it says: a store of its scores is refused to a teacher with others."""
        return self.model_dump(mode="json", exclude={"store", "model", "trust_remote_code"}, exclude_defaults=True)

    def answers(self) -> tuple[SignalKind, ...]:
        """The kinds of signal that it can give, the most telling first."""
        return ("dense", "top_k", "sampled")

    def writes(self) -> bool:
        """Whether it can write responses."""
        return True


class LocalTeacherConfig(ModelConfig, TeacherConfig):
    """A model in this process: it scores every token and is never changed."""

    tokenizer: Literal["student", "own"] = Field(
        "student",
        description="student: the same as the student's, or the run is refused; own: it reads prompt and text in its own "
        "tokens, by its own chat template, and is heard by spans of text; see docs/tokenizers.md.",
    )

    def answers(self) -> tuple[SignalKind, ...]:
        return ("spans", "span_distributions") if self.tokenizer == "own" else super().answers()

    def writes(self) -> bool:
        return self.tokenizer == "student"

    @model_validator(mode="after")
    def _keeps_tokens(self) -> "LocalTeacherConfig":
        if self.tokenizer == "own" and self.store is not None:
            raise ValueError("a store keeps what is said of tokens, and this teacher speaks of spans: leave out store")
        return self


class StoredTeacherConfig(TeacherConfig):
    """What some teacher said earlier of certain rollouts, and nothing else: no model is loaded."""

    stored: str = Field(description="A folder that `kibitz score --out` or `teacher.store` made.")

    def writes(self) -> bool:
        return False

    @model_validator(mode="after")
    def _one_folder(self) -> "StoredTeacherConfig":
        if self.store is not None:
            raise ValueError("stored scores are in a folder already: leave out store")
        return self


class RemoteTeacherConfig(TeacherConfig, ServerConfig):
    """A model behind a vLLM server: it scores over HTTP, and nothing of it is loaded here."""

    url: ServerURL = Field(
        description="Its address, such as http://127.0.0.1:8001; `kibitz serve` prints how to start it."
    )
    model: str | None = Field(None, description="The name that it is served under; without it the only one served.")

    def answers(self) -> tuple[SignalKind, ...]:
        return ("top_k", "named", "sampled")

    def writes(self) -> bool:
        return False


TEACHER_CONFIGS: dict[str, type[TeacherConfig]] = {
    "url": RemoteTeacherConfig,  # its model is a name on the server
    "model": LocalTeacherConfig,
    "stored": StoredTeacherConfig,
}
"""By the key that a teacher of this kind must have; the first one that is there says which kind it is."""


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
