"""The `guards` section: the thresholds at which a collapse guard raises an alarm, and the action that follows."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from kibitz.config.base import Section


def _action(value: Any) -> Any:
    if value == "mask":
        raise ValueError(
            "mask leaves out single rollouts, and this guard is about the whole run: write warn or stop. "
            "cut_off, repetition and length_inflation can mask"
        )
    return _off(value)


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads off as false


GuardAction = Annotated[Literal["off", "warn", "stop"], BeforeValidator(_action)]
RolloutGuardAction = Annotated[Literal["off", "warn", "mask", "stop"], BeforeValidator(_off)]


class GuardConfig(Section):
    """Collapse guards. Each compares the last steps with the run's first or best ones and reports each problem once.

    A field with a guard's name is its action: off, warn, stop (after the step, with a checkpoint), or mask (warn, and learn
    nothing, in any step, from the rollouts that show the symptom themselves)."""

    early: int = Field(
        20,
        ge=4,
        description="Steps that say how the run was at first; no alarm before they are over, but for NaN. "
        "20: Adam's oversized first steps (reverse KL x10 at step 2, gone by step 8 in toy runs) stay a minority.",
    )
    window: int = Field(
        20,
        ge=2,
        description="Steps whose median counts as now; at most `early`. 20: half of it is a delay of 10 steps, and "
        "the abrupt collapse of StableOPD (2604.08527) takes 30.",
    )
    sigmas: float = Field(
        5.0,
        gt=0,
        description="A change must also be this many deviations of a window's median. 5: of flat toy rewards (0.1, 64 "
        "rollouts a step) 4 called 5 of 80 runs falling, 5 none.",
    )
    length_inflation: RolloutGuardAction = Field(
        "warn",
        description="Responses grow, and nothing gets better. mask: those length_ratio times as long as the longest of a step "
        "at first.",
    )
    length_ratio: float = Field(
        1.2, gt=1, description="Growth of responses without gain. 1.2: a toy collapse went from 5.5 to 7.2."
    )
    cut_off: RolloutGuardAction = Field(
        "warn",
        description="More responses reach the token limit. mask: learn nothing from any of these (DAPO's overlong filter, "
        "2503.14476). Not by default: each token's signal is sound; when they take over it helps (StableOPD).",
    )
    cut_off_rise: float = Field(
        0.1, gt=0, lt=1, description="Rise of the cut-off share. 0.1: 0 to 0.17 when raw OPD burst."
    )
    cut_off_share: float = Field(
        0.6, gt=0, le=1, description="Share that is too high from the start. StableOPD's stable phases: to 0.5."
    )
    repetition: RolloutGuardAction = Field(
        "warn",
        description="Responses repeat themselves. mask: those of whose own tokens more than repetition_share repeat.",
    )
    repetition_ngram: int = Field(
        8, ge=2, description="Tokens of a repeated n-gram. 8: healthy mathematics repeats 18% of its 4-grams."
    )
    repetition_rise: float = Field(
        0.1, gt=0, lt=1, description="0.1: StableOPD saw 0 before its collapse and 0.25-0.35 after."
    )
    repetition_share: float = Field(
        0.5, gt=0, lt=1, description="For repetition: mask. 0.5: half a response is a loop; StableOPD's mean was 0.3."
    )
    entropy_collapse: GuardAction = Field("warn", description="The student becomes certain of everything.")
    entropy_share: float = Field(
        0.33,
        gt=0,
        lt=1,
        description="Share of the entropy at first, or of the teacher's if that is less. 0.33: RL has spent 73% of its entropy "
        "and 76% of its gain at 200 of 2400 steps (2505.22617).",
    )
    overlap_falling: GuardAction = Field("warn", description="Student and teacher have fewer likely tokens in common.")
    overlap_drop: float = Field(
        0.05, gt=0, lt=1, description="Below the best window. Rethinking-OPD: it grows, 0.72 to 0.91."
    )
    kl_rising: GuardAction = Field("warn", description="The student moves away from the teacher, and gains no reward.")
    kl_ratio: float = Field(
        1.5, gt=1, description="Above the lowest window, without more reward. 1.5: healthy toy windows vary by 1.3."
    )
    reward_falling: GuardAction = Field("warn", description="The reward falls from its best and stays there.")
    reward_drop: float = Field(
        0.25,
        gt=0,
        description="Relative, below the best window. 0.25: toy runs recovered from dips of 18%, not from 28%.",
    )
    student_stuck: GuardAction = Field(
        "warn", description="No gradient, or groups of equal rewards, and nothing moves."
    )
    stuck_grad_norm: float = Field(1e-4, gt=0, description="A gradient that is none. Published runs have 0.4 to 20.")
    stuck_equal_groups: float = Field(
        0.9, gt=0, le=1, description="Prompts whose samples all got one reward: GRPO learns nothing there."
    )
    style_overfit: GuardAction = Field("warn", description="The teacher's style is learnt and its skill is not.")
    style_drop: float = Field(
        0.05, gt=0, lt=1, description="Fall of pass@k at two evaluations running, while the reverse KL falls."
    )
    not_finite: GuardAction = Field(
        "warn", description="The loss or the gradient is NaN or infinite; the step is skipped."
    )

    @model_validator(mode="after")
    def _windows(self) -> "GuardConfig":
        if self.window > self.early:
            raise ValueError(
                f"window is {self.window} and early is {self.early}: write a window of at most early steps"
            )
        return self
