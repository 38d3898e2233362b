"""The base class of every method's section, and the record in which a section says what it needs."""

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
    """The requirements of a method, with its settings, on the recipe and on the training program. The default is none."""

    teacher: bool = False
    """The recipe must name a teacher."""
    signals: tuple[SignalKind, ...] = ()
    """The kinds of signal that the loss can learn from, the cheapest first. Empty: the teacher scores nothing."""
    top_k: int | None = None
    """The K of a top-k loss. It is ignored where the loss reads the whole distribution."""
    temperature: float = 1.0
    """The softmax temperature: the teacher's logits are divided by it."""
    scores_late: bool = False
    """Nothing but the loss of a token depends on its scores, so that each micro-batch can be scored just before its loss."""
    teacher_writes: bool = False
    """The teacher writes some of the text."""
    teacher_judges: bool = False
    """The teacher judges the text while it is generated, token by token."""
    student_scores: bool = False
    """The student reads the rollouts once more before it learns from them. `kibitz check` counts that pass."""
    reward: bool = False
    """There must be a grader."""
    responses: bool = False
    """Every row of the data must bring a response."""
    fills_gaps: bool = False
    """The teacher answers the prompts that have no response in the data."""
    rollouts: str | None = None
    """The file of stored rollouts to learn from, if nobody is to write any."""
    reference: bool = False
    """It compares the student with `method.reference`, with or without `reference_kl`."""
    models: Mapping[str, str | None] = field(default_factory=dict)
    """Folders or names of other models that it loads, by the key of their section; None: the student's own."""
    adversary: bool = False
    """A second model is trained beside the student, on all rollouts of a step: they must be in one process."""


class MethodConfig(ExtrasConfig):
    """The settings that all methods share."""

    title: ClassVar[str] = ""
    """The method's name in a report; its `type` where there is none."""
    story: ClassVar[str] = ""
    """A sentence for the report that says what a run did; {student}, {teacher}, {prompts} and {divergence} are filled in."""
    stories: ClassVar[Mapping[str, str]] = {}
    """Other sentences, by the value of `source`, for methods in which `source` decides what was done."""

    ahead: ClassVar[bool] = False
    """Whether its rollouts may be a step older than the student that learns from them."""

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
        """Return what these settings require. The default is nothing."""
        return Needs()

    def needs_reference(self) -> bool:
        """Return True if a frozen reference model must be loaded."""
        return self.reference_kl > 0 or self.needs().reference

    def can_be_ahead(self) -> bool:
        """Return True if the student's servers alone write the text of a step, and its loss allows text of older weights."""
        needs = self.needs()
        return self.ahead and not needs.teacher_writes and needs.rollouts is None and self.replay == 0

    def check_extras(self) -> None:
        """Raise ValueError for extras that have no effect. This runs for every method, besides its own `check`."""
        if self.reference is not None and not self.needs_reference():
            raise ValueError(
                "nothing is compared with method.reference: write method.reference_kl=0.05 too, or drop it"
            )

    def check(self, rollout: RolloutConfig) -> None:
        """Raise ValueError, with what to write instead, for settings that exclude each other."""

    def check_writes_jointly(self, rollout: RolloutConfig) -> None:
        """Raise ValueError for settings of the student's own engine, which writes nothing where student and teacher write a
        response together."""
        if rollout.dtype != "same":
            raise ValueError(
                f"method {self.type} writes with student and teacher together, in their own dtypes: write rollout.dtype=same"
            )

    def check_teacher(self, teacher: TeacherConfig) -> None:
        """Raise ValueError for a teacher that cannot give what this method requires."""
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
