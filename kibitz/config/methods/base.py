"""What every method's section shares, and what it says of its needs."""

from typing import Literal

from pydantic import Field

from kibitz.config.methods.extras import ExtrasConfig
from kibitz.config.sections import ModelConfig, RolloutConfig
from kibitz.config.teachers import SignalKind, TeacherConfig

HOW_TO_ASK: dict[SignalKind, str] = {
    "dense": "full",
    "top_k": "top_k with method.top_k_of=teacher",
    "named": "top_k",
    "sampled": "sampled",
    "spans": "sampled with method.type=opd",
    "span_distributions": "full with method.type=opd and method.alignment=gold",
}


class MethodConfig(ExtrasConfig):
    """What a method shares with every other one."""

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

    def needs_teacher(self) -> bool:
        """Whether the recipe must name a teacher."""
        return False

    def needs_reward(self) -> bool:
        """Whether there must be a grader."""
        return False

    def trains_adversary(self) -> bool:
        """Whether more than the student learns, and from all rollouts of a step: it then needs them in one process."""
        return False

    def needs_responses(self) -> bool:
        """Whether every row of the data must bring a response."""
        return False

    def wants_demonstrations(self) -> bool:
        """Whether it reads the data's responses, for itself or for `replay`."""
        return self.needs_responses() or self.replay > 0

    def fills_gaps(self) -> bool:
        """Whether somebody answers the prompts to which the data has no response."""
        return False

    def asks(self) -> tuple[SignalKind, ...]:
        """The signals that the loss can do with, the one with the least work first; none: no teacher scores."""
        return ()

    def scores_with_teacher(self) -> bool:
        """Whether the teacher reads each rollout: its cost then counts."""
        return bool(self.asks())

    def writes_with_teacher(self) -> bool:
        """Whether the teacher writes any of the text."""
        return False

    def judges_with_teacher(self) -> bool:
        """Whether a teacher reads the text while it is written, token by token."""
        return False

    def scores_with_student(self) -> bool:
        """Whether the student reads each rollout once more before it learns, to choose tokens."""
        return False

    def stored_rollouts(self) -> str | None:
        """The file of rollouts to learn from, if nobody is to write any."""
        return None

    def other_models(self) -> dict[str, ModelConfig]:
        """What it loads beside student and teacher, by the key of the recipe. They must share the student's tokenizer."""
        return {} if self.reference is None else {"method.reference": self.reference}

    def check(self, rollout: RolloutConfig) -> None:
        """Raise ValueError, with what to write instead, for settings that exclude each other."""

    def check_teacher(self, teacher: TeacherConfig) -> None:
        """Raise ValueError for a teacher that cannot give what this method asks for."""
        asked, given = self.asks(), teacher.answers()
        if asked and not set(asked) & set(given):
            raise ValueError(
                f"method {self.type} asks its teacher for {' or '.join(asked)} signals and this one gives "
                f"{' and '.join(given) or 'none'}: "
                + (f"write method.support={HOW_TO_ASK[given[0]]}" if given else "choose one that scores tokens")
            )
        if self.writes_with_teacher() and not teacher.writes():
            raise ValueError(f"method {self.type} lets the teacher write, and this one cannot: choose one that can")
        if self.judges_with_teacher() and not teacher.reads_along():
            raise ValueError(
                f"{self.type} judges a text while it is written: its teacher must be a model of its own in this process that "
                "reads the student's prompt: write teacher.model without teacher.context, or method.type=opd"
            )
