"""The `teacher` section: one class per kind of teacher, told apart by the key that names it (`model: ...`, `student: ...`),
or a list of them."""

from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from kibitz.config.base import Section
from kibitz.config.models import FrozenConfig, StudentConfig
from kibitz.config.servers import HostedConfig, ServerConfig, ServerURL

SignalKind = Literal["dense", "top_k", "named", "sampled", "spans", "span_distributions"]
"""The kinds of signal that a teacher can give for a token: its whole distribution (dense), its K likeliest tokens (top_k), the
tokens that it is asked about (named), or the sampled token's log-probability (sampled). A teacher with its own tokenizer
gives the log-probability of a span of text, alone (spans) or with a distribution over its first token (span_distributions)."""


class ContextConfig(Section):
    """Privileged context: text that the teacher reads and the student does not. Templates are Jinja's, in a sandbox. Their
    variables are the row's columns, `prompt`, `answer`, `response` (the demonstration) and `task`; and, from the rollout that
    is scored, `attempt` (its text), `reward`, and `success` (another response of this step to the same prompt, with reward 1,
    or none)."""

    prompt: str = Field(
        "{{ prompt }}", description="Template that replaces the last user message in the teacher's prompt."
    )
    system: str | None = Field(None, description="Template that replaces or adds the teacher's system message.")
    template: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of the teacher's chat template; data.template is the student's."
    )

    def names(self) -> set[str]:
        """Return the names of the variables that the templates use."""
        from jinja2 import TemplateSyntaxError, meta, sandbox

        environment = sandbox.ImmutableSandboxedEnvironment()
        try:
            trees = [environment.parse(text) for text in (self.prompt, self.system or "")]
        except TemplateSyntaxError as error:
            raise ValueError(f"teacher.context is no Jinja template: {error}") from None
        return set().union(*(meta.find_undeclared_variables(tree) for tree in trees))


class TeacherConfig(Section):
    """The settings that all teachers share."""

    store: str | None = Field(
        None,
        description="Folder that keeps the teacher's scores, so that it need not read the same rollout again, in this run or "
        "another (Lightning OPD, 2604.13010). Whole distributions take 2-4 bytes x its width for each token.",
    )
    name: str | None = Field(
        None, description="Name of the teacher in the heat-map and in a row's column `route`. null: its number."
    )
    tasks: list[str] = Field(
        default_factory=list,
        description="With several teachers: the tasks that only this one (and others that list them) teaches. Empty: all tasks "
        "that no teacher lists (MOPD, 2606.30406: a teacher per domain).",
    )
    weight: float | dict[str, float] = Field(
        1.0,
        description="With several teachers on one prompt: weight in the mixture, before the weights are divided by their sum; a "
        "mapping gives it by task (1 for a task that is not in it). 1: equal weights.",
    )
    context: Annotated[
        ContextConfig | None, BeforeValidator(lambda value: {"prompt": value} if isinstance(value, str) else value)
    ] = Field(
        None,
        description="Privileged context that only the teacher's prompt has; a text is the template of that prompt.",
    )

    def says_by(self) -> dict[str, Any]:
        """Return the settings that change its scores. A store of scores is refused to a teacher with other settings. The context
        is not among them, because the store compares the prompt that was rendered with it."""
        silent = {"store", "model", "trust_remote_code", "name", "tasks", "weight", "context", "offload"}
        silent |= {*ServerConfig.model_fields, *HostedConfig.model_fields}
        return self.model_dump(mode="json", exclude=silent, exclude_defaults=True)

    def answers(self) -> tuple[SignalKind, ...]:
        """Return the kinds of signal that it can give, the most informative first."""
        return ("dense", "top_k", "sampled")

    def writes(self) -> bool:
        """Return True if it can write responses."""
        return True

    def reads_along(self) -> bool:
        """Return True if it is a model in this process that reads the student's own prompt. Then several teachers can write one
        text together."""
        return self.context is None

    def scores_late(self) -> bool:
        """Return True if it can score one micro-batch after another while the student learns: a model in this process that reads
        a rollout without those around it, and is not fetched anew each time."""
        return False

    def check(self, student: StudentConfig) -> None:
        """Raise ValueError, with what to write instead, for settings that exclude each other."""
        weights = self.weight.values() if isinstance(self.weight, dict) else [self.weight]
        if min(weights, default=0.0) < 0:
            raise ValueError("teacher.weight is a share and cannot be negative: write 0 for a teacher that is silent")
        if self.context is not None:
            self.context.names()

    def weight_on(self, task: str) -> float:
        return self.weight.get(task, 1.0) if isinstance(self.weight, dict) else self.weight


class LocalTeacherConfig(FrozenConfig, TeacherConfig):
    """A model in this process: it scores every token and is never changed."""

    tokenizer: Literal["student", "own"] = Field(
        "student",
        description="student: the same as the student's, or the run is refused; own: it reads prompt and text in its own "
        "tokens, by its own chat template, and is heard by spans of text; see docs/tokenizers.md.",
    )

    def answers(self) -> tuple[SignalKind, ...]:
        return ("spans", "span_distributions") if self.tokenizer == "own" else super().answers()

    def writes(self) -> bool:
        return self.tokenizer == "student" and self.offload is None and self.quantize is None

    def reads_along(self) -> bool:
        return super().reads_along() and self.writes()

    def scores_late(self) -> bool:
        alone = self.context is None and self.store is None and self.tokenizer == "student"
        return alone and self.offload != "body"

    @model_validator(mode="after")
    def _keeps_tokens(self) -> "LocalTeacherConfig":
        if self.tokenizer == "own" and self.store is not None:
            raise ValueError("a store keeps scores of tokens, and this teacher scores spans of text: leave out store")
        return self


class StoredTeacherConfig(TeacherConfig):
    """Stored scores of some teacher for certain rollouts. No model is loaded."""

    stored: str = Field(description="A folder that `kibitz score --out` or `teacher.store` made.")

    def writes(self) -> bool:
        return False

    def reads_along(self) -> bool:
        return False

    @model_validator(mode="after")
    def _one_folder(self) -> "StoredTeacherConfig":
        if self.store is not None:
            raise ValueError("stored scores are in a folder already: leave out store")
        return self


class _ServedTeacherConfig(TeacherConfig, ServerConfig, HostedConfig):
    """A model behind a vLLM server: it scores over HTTP."""

    def answers(self) -> tuple[SignalKind, ...]:
        return ("top_k", "named", "sampled")

    def writes(self) -> bool:
        return False

    def reads_along(self) -> bool:
        return False


class RemoteTeacherConfig(_ServedTeacherConfig):
    """A model behind a vLLM server: it scores over HTTP, and nothing of it is loaded here."""

    url: ServerURL = Field(
        description="Address of the server, such as http://127.0.0.1:8001; `kibitz serve` prints the command that starts it."
    )
    model: str | None = Field(None, description="Name under which the server has the model. null: the only one served.")


class HostedTeacherConfig(_ServedTeacherConfig):
    """A model behind a vLLM server that the run starts and ends."""

    engine: Literal["vllm"] = Field(description="vllm: a server of vLLM, which the run starts and ends.")
    model: str = Field(description="A folder, or a name on the Hugging Face hub.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: float32 on a CPU, what the checkpoint says on a GPU."
    )

    def at(self, url: str, sleeps: bool) -> RemoteTeacherConfig:
        """Return the same teacher at the address where its server has been started. `sleeps`: it gives its memory back."""
        kept = {name: value for name, value in self if name in RemoteTeacherConfig.model_fields}
        return RemoteTeacherConfig.model_construct(**{**kept, "url": url, "model": "teacher", "sleep": sleeps})


class ChatTeacherConfig(TeacherConfig, ServerConfig):
    """A black-box teacher that gives text only, behind an OpenAI-compatible chat endpoint. For sft and gad."""

    chat: ServerURL = Field(description="Address of the endpoint, without /v1/chat/completions.")
    model: str | None = Field(None, description="Name under which the server has the model. null: the only one served.")

    def answers(self) -> tuple[SignalKind, ...]:
        return ()

    def reads_along(self) -> bool:
        return False

    def check(self, student: StudentConfig) -> None:
        super().check(student)
        if self.store is not None or self.context is not None:
            raise ValueError("a chat endpoint scores nothing: drop teacher.store and teacher.context")


class StudentTeacherConfig(TeacherConfig):
    """A teacher made of the student: nothing else is loaded."""

    student: Literal["start", "ema", "base", "current"] = Field(
        description="start: as the run found it; ema: the average of its weights over time; base: its adapter switched off, "
        "no second copy; current: the same weights as they are, which needs a context to have something to say."
    )
    decay: float = Field(
        0.95, ge=0, lt=1, description="For ema: decay a step. 0.95: SDPO (2601.20802), which renews 5% a step."
    )

    def check(self, student: StudentConfig) -> None:
        super().check(student)
        if self.student == "base" and student.lora is None:
            raise ValueError(
                "teacher.student: base is a student without its adapter: write student.lora, or teacher.student=start"
            )
        if self.student == "current" and self.context is None:
            raise ValueError("teacher.student: current gives the student's own distribution: write teacher.context")
        if self.student != "start" and self.store is not None:
            raise ValueError("teacher.store keeps what is said for good, and this teacher changes: drop teacher.store")
        if self.student != "ema" and self.decay != type(self).model_fields["decay"].default:
            raise ValueError("teacher.decay belongs to an average: write teacher.student=ema, or drop it")

    def reads_along(self) -> bool:
        return super().reads_along() and self.student in ("start", "ema")

    def scores_late(self) -> bool:
        return self.context is None and self.store is None


TEACHER_CONFIGS: dict[str, type[TeacherConfig]] = {
    "chat": ChatTeacherConfig,
    "url": RemoteTeacherConfig,  # its model is a name on the server
    "engine": HostedTeacherConfig,
    "model": LocalTeacherConfig,
    "student": StudentTeacherConfig,
    "stored": StoredTeacherConfig,
}
"""The classes of teachers by the key that such a section must have. The first key that is present decides."""

SEVERAL = "several"


def teacher_key(value: Any) -> str:
    """Return the key of a teacher's section, parsed or raw. A section without any key counts as `model`, so that the error says
    that `model` is missing."""
    if isinstance(value, list | tuple):
        return SEVERAL
    for key, section in TEACHER_CONFIGS.items():
        if isinstance(value, section) or (isinstance(value, dict) and key in value):
            return key
    return "model"


def teacher_union() -> Any:
    """All sections of `TEACHER_CONFIGS` as one type, or a list of them."""
    members = tuple(Annotated[section, Tag(key)] for key, section in TEACHER_CONFIGS.items())
    one = Annotated[Union[members], Discriminator(teacher_key)]  # noqa: UP007  # of a tuple made at run time
    several = Annotated[list[one], Field(min_length=1), Tag(SEVERAL)]
    return Annotated[Union[(*members, several)], Discriminator(teacher_key)]
