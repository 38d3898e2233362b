"""The section of generative adversarial distillation."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from kibitz.config.base import Section
from kibitz.config.methods.base import MethodConfig, Needs
from kibitz.config.methods.policy_gradient import PolicyGradientConfig, PolicyLossName
from kibitz.config.sections import RolloutConfig


class DiscriminatorConfig(Section):
    """The judge of gad: a language model's body with one number on top, read at the response's last token."""

    model: str | None = Field(
        None,
        description="Folder or hub name of the model that the judge starts from. null: the student's own, as in the paper.",
    )
    lr: float | None = Field(
        None, gt=0, description="Learning rate of the judge, constant. null: optim.lr, as in the paper."
    )


class GADConfig(PolicyGradientConfig, MethodConfig):
    """Generative adversarial distillation: a judge learns to tell the teacher's text from the student's, and is the reward."""

    title = "Generative adversarial distillation"
    story = (
        "The student {student} wrote its own responses to {prompts}, a judge learnt to tell them from the "
        "given ones, and its score was the reward of the student (GAD)."
    )
    stories: ClassVar[Mapping[str, str]] = {
        "teacher": (
            "The student {student} wrote its own responses to {prompts}, a judge learnt to tell them from those "
            "of the teacher {teacher}, and its score was the reward of the student (GAD)."
        ),
    }

    type: Literal["gad"] = "gad"
    source: Literal["dataset", "teacher"] = Field(
        "dataset",
        description="Source of the teacher's text. dataset: the responses in the data; no teacher is needed.",
    )
    warmup: float = Field(
        1 / 3,
        ge=0,
        lt=1,
        description="Share of the steps in which the student learns the teacher's text by cross-entropy while the judge already "
        "trains. A third: one of three epochs, the paper (2511.10643).",
    )
    normalize_std: bool = Field(
        True, description="Divide advantages by the group's standard deviation. true: GRPO's own form (2402.03300)."
    )
    policy_loss: PolicyLossName = Field(
        "ppo_clip", description="ppo_clip: GRPO, as in the paper; see opd for the others."
    )
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    def needs(self) -> Needs:
        asked = self.source == "teacher"
        judge = {"discriminator": self.discriminator.model}
        return Needs(teacher=asked, teacher_writes=asked, responses=not asked, models=judge, adversary=True)

    def check(self, rollout: RolloutConfig) -> None:
        if rollout.samples_per_prompt < 2:
            raise ValueError("gad compares the samples of a prompt: write rollout.samples_per_prompt of 2 or more")
        if rollout.truncated:
            raise ValueError("gad's importance ratio needs untruncated rollouts: drop rollout.top_p and rollout.top_k")
        if rollout.epsilon:
            raise ValueError("gad's importance ratio starts from the student itself: drop rollout.epsilon")
