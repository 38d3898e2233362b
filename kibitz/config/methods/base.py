"""What every method's section shares, and the record in which it says what it needs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import Field

from kibitz.config.methods.extras import ExtrasConfig
from kibitz.config.sections import RolloutConfig
from kibitz.config.teachers import SignalKind, TeacherConfig

HOW_TO_ASK: dict[SignalKind, str] = {
    "dense": "full",
    "top_k": "top_k with method.top_k_of=teacher",
    "named": "top_k",
    "sampled": "sampled",
    "spans": "sampled with method.type=opd",
    "span_distributions": "full with method.type=opd and method.alignment=gold",
}


@dataclass(frozen=True)
class Needs:
    """What a method, as its section is set, asks of the recipe and of the program around it. By default nothing."""

    teacher: bool = False
    """The recipe must name a teacher."""
    signals: tuple[SignalKind, ...] = ()
    """What the loss can learn from, that with the least work first; none: the teacher scores nothing."""
    top_k: int | None = None
    """How many of the likeliest tokens the loss looks at, where it may look at some only."""
    temperature: float = 1.0
    """What divides the teacher's logits."""
    teacher_writes: bool = False
    """The teacher writes some of the text."""
    teacher_judges: bool = False
    """The teacher reads the text while it is written, token by token."""
    student_scores: bool = False
    """The student reads the rollouts once more before it learns from them. `kibitz check` counts that pass."""
    reward: bool = False
    """There must be a grader."""
    responses: bool = False
    """Every row of the data must bring a response."""
    fills_gaps: bool = False
    """Somebody answers the prompts to which the data has no response."""
    rollouts: str | None = None
    """The file of stored rollouts to learn from, if nobody is to write any."""
    reference: bool = False
    """It compares the student with `method.reference`, with or without `reference_kl`."""
    models: Mapping[str, str | None] = field(default_factory=dict)
    """Folders or names of other models that it loads, by the key of their section; None: the student's own."""
    adversary: bool = False
    """More than the student learns, from all rollouts of a step: they must be in one process."""


class MethodConfig(ExtrasConfig):
    """What a method shares with every other one."""

    title: ClassVar[str] = ""
    """The method's name in a report; its `type` where there is none."""
    story: ClassVar[str] = ""
    """What a run of it did, in a sentence of a report: {student}, {teacher}, {prompts}, {divergence} are filled in."""
    stories: ClassVar[Mapping[str, str]] = {}
    """The same by the value of `source`, where it decides what was done."""

    type: str
    normalize: Literal["token", "sequence"] = Field(
        "token",
        description="token: the mean over the step's tokens; sequence: the mean over responses of each one's mean (GRPO's "
        "1/|o|), in which a token of a short response counts more.",
    )
    mask_tokens: list[str] = Field(
        default_factory=list,
        description="Single tokens, such as <think>, that are not learnt: student and teacher may differ on them "
        "(Revisiting OPD, 2603.25562).",
    )

    def needs(self) -> Needs:
        """What these settings ask for. A method without an answer of its own asks for nothing."""
        return Needs()

    def needs_reference(self) -> bool:
        """Whether a frozen model is to be loaded that the student is compared with."""
        return self.reference_kl > 0 or self.needs().reference

    def check_extras(self) -> None:
        """Raise ValueError for extras that nothing asks for. For every method, whatever its own `check` says."""
        if self.reference is not None and not self.needs_reference():
            raise ValueError(
                "nothing is compared with method.reference: write method.reference_kl=0.05 too, or drop it"
            )

    def check(self, rollout: RolloutConfig) -> None:
        """Raise ValueError, with what to write instead, for settings that exclude each other."""

    def check_teacher(self, teacher: TeacherConfig) -> None:
        """Raise ValueError for a teacher that cannot give what this method asks for."""
        needs, given = self.needs(), teacher.answers()
        asked = needs.signals
        if asked and not set(asked) & set(given):
            raise ValueError(
                f"method {self.type} asks its teacher for {' or '.join(asked)} signals and this one gives "
                f"{' and '.join(given) or 'none'}: "
                + (f"write method.support={HOW_TO_ASK[given[0]]}" if given else "choose one that scores tokens")
            )
        if needs.teacher_writes and not teacher.writes():
            raise ValueError(f"method {self.type} lets the teacher write, and this one cannot: choose one that can")
        if needs.teacher_judges and not teacher.reads_along():
            raise ValueError(
                f"{self.type} judges a text while it is written: its teacher must be a model of its own in this process that "
                "reads the student's prompt: write teacher.model without teacher.context, or method.type=opd"
            )
