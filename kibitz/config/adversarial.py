"""The sections of methods with an opponent: a function that learns to tell the student from the teacher."""

from typing import Literal

from pydantic import Field

from kibitz.config.base import Section
from kibitz.config.methods import MethodConfig, PolicyGradientConfig, PolicyLossName
from kibitz.config.sections import ModelConfig, RolloutConfig
from kibitz.config.teachers import SignalKind


class AMMDConfig(MethodConfig):
    """Adversarial moment matching: action values learn where the two policies differ most, the student closes that gap."""

    type: Literal["ammd"] = "ammd"
    on_policy: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of a step's prompts that the student answers: they give the on-policy moment, the others the "
        "off-policy one. Each is a mean of its own and both count alike. 0.5: ours.",
    )
    source: Literal["dataset", "teacher"] = Field("teacher", description="Who answers the other prompts.")
    q_lr: float = Field(1e-2, gt=0, description="Rate of the action values, constant. 1e-2: ours, on a toy world.")
    q_steps: int = Field(5, ge=1, description="Steps of theirs before each one of the student. 5: ours.")
    q_bound: float = Field(
        1.0, gt=0, description="Their largest size; the loss goes with it. 1: the moment gap is 2 TV."
    )
    q_width: int = Field(128, ge=1, description="Of their one hidden layer, on both models' probabilities. 128: ours.")

    def trains_an_opponent(self) -> bool:
        return True

    def needs_teacher(self) -> bool:
        return True

    def asks(self) -> tuple[SignalKind, ...]:
        return ("dense",)

    def writes_with_teacher(self) -> bool:
        return self.source == "teacher" and self.on_policy < 1

    def scores_with_student(self) -> bool:
        return True  # the action values are trained against the student as it is before the step

    def needs_responses(self) -> bool:
        return self.source == "dataset" and self.on_policy < 1

    def check(self, rollout: RolloutConfig) -> None:
        if self.reference_kl:
            raise ValueError(
                "ammd learns a moment and not a loss of each token, which a KL could join: drop method.reference_kl"
            )
        own, all_of_them = round(self.on_policy * rollout.prompts_per_step), rollout.prompts_per_step
        if 0 < self.on_policy < 1 and own in (0, all_of_them):
            raise ValueError(
                f"on_policy: {self.on_policy:g} of {all_of_them} prompts leaves one of the two moments without any: write "
                "more rollout.prompts_per_step, or method.on_policy=1 or 0"
            )


class DiscriminatorConfig(Section):
    """The judge of gad: a language model's body with one number on top, read at the response's last token."""

    model: str | None = Field(
        None, description="Folder or name of the model that it starts from. Off: the student's own, as in the paper."
    )
    lr: float | None = Field(None, gt=0, description="Its rate, constant. Off: optim.lr, as in the paper.")


class GADConfig(PolicyGradientConfig):
    """Generative adversarial distillation: a judge learns to tell the teacher's text from the student's, and is the reward."""

    type: Literal["gad"] = "gad"
    source: Literal["dataset", "teacher"] = Field(
        "dataset",
        description="Where the teacher's text is. dataset: the responses of the data, and no teacher is needed.",
    )
    warmup: float = Field(
        1 / 3,
        ge=0,
        lt=1,
        description="Share of the run's steps in which the student learns the teacher's text by cross-entropy, and the judge "
        "as always. A third: one of three epochs, the paper (2511.10643).",
    )
    normalize_std: bool = Field(True, description="Divide by the group's deviation. On: GRPO's own form (2402.03300).")
    policy_loss: PolicyLossName = Field(
        "ppo_clip", description="ppo_clip: GRPO, as in the paper; see opd for the others."
    )
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    def trains_an_opponent(self) -> bool:
        return True

    def needs_teacher(self) -> bool:
        return self.source == "teacher"

    def writes_with_teacher(self) -> bool:
        return self.source == "teacher"

    def needs_responses(self) -> bool:
        return self.source == "dataset"

    def check(self, rollout: RolloutConfig) -> None:
        if rollout.samples_per_prompt < 2:
            raise ValueError("gad compares the samples of a prompt: write rollout.samples_per_prompt of 2 or more")
        if rollout.truncated:
            raise ValueError("gad's importance ratio needs untruncated rollouts: drop rollout.top_p and rollout.top_k")
        if rollout.epsilon:
            raise ValueError("gad's importance ratio starts from the student itself: drop rollout.epsilon")

    def other_models(self) -> dict[str, ModelConfig]:
        name = self.discriminator.model
        return super().other_models() | ({} if name is None else {"method.discriminator": ModelConfig(model=name)})
