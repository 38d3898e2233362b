"""The policy gradient of `support: sampled`: the student learns from the sampled token alone."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, ValidationInfo, field_validator, model_validator

from kibitz.config.base import Section
from kibitz.config.methods.policy_gradient import PolicyGradientConfig
from kibitz.config.sections import RolloutConfig


class PolicyConfig(PolicyGradientConfig):
    """The advantage of the sampled token, and the loss that learns it."""

    kl_coef: float = Field(
        1.0, gt=0, description="Coefficient of the teacher's log-ratio; kl_penalty_coef in the cookbook."
    )
    discount: float = Field(
        0.0, ge=0, le=1, description="Discount of later tokens' log-ratios. 0: as published, where more gained nothing."
    )
    clip_advantage: float | None = Field(
        None, gt=0, description="Bounds the log-ratio: its lower tail is heavy (REOPOLD). 3 saved toy runs."
    )
    baseline: bool = Field(
        False, description="Adds KL(S || T) to the advantage: unbiased, less variance (vOPD, 2605.07865)."
    )
    extrapolation: float = Field(
        1.0,
        gt=0,
        description="Factor of the log-ratio between teacher and reference; above 1 it extrapolates past the teacher (ExOPD, "
        "2602.12125: 1.25). 1: off.",
    )
    reward_coef: float = Field(
        0.0, ge=0, description="Adds this times the group-centred reward to the advantage (slime, KDRL)."
    )

    def changed(self) -> list[str]:
        """Return the names of the settings that differ from their defaults."""
        return [name for name, info in type(self).model_fields.items() if getattr(self, name) != info.default]

    def by_token(self) -> str | None:
        """Return the name of a setting that credits single tokens, or None."""
        return "discount" if self.discount else "extrapolation" if self.extrapolation != 1 else None

    def check(self, rollout: RolloutConfig) -> None:
        if rollout.truncated or rollout.epsilon or rollout.temperature != 1:
            raise ValueError(
                "support: sampled needs rollouts from the student's own distribution: "
                "write rollout.temperature=1 without top_p, top_k and epsilon, or method.support=full"
            )
        if self.baseline and self.by_token():
            raise ValueError(
                "the baseline is that of a token's own log-ratio: drop it, or write method.policy.discount=0 without "
                "extrapolation"
            )
        if self.reward_coef and rollout.samples_per_prompt < 2:
            raise ValueError(
                "reward_coef compares the samples of a prompt: write rollout.samples_per_prompt of 2 or more"
            )


IDLE = {"kl_coef", "clip_ratio", "ratio_cap", "ratio_floor", "max_drop"}
"""Settings that, written outside the section, say nothing where another support is chosen."""


class SampledConfig(Section):
    """Settings that are allowed only with `support: sampled`. A `policy` section implies that support."""

    also_here: ClassVar[Mapping[str, str]] = dict.fromkeys(PolicyConfig.model_fields, "policy")

    policy: PolicyConfig | None = Field(
        None,
        description="Settings of support: sampled, which this section implies; method.discount is short for one of them.",
    )

    @model_validator(mode="before")
    @classmethod
    def _in_one_place(cls, given: Any) -> Any:
        """Settings of the policy gradient that stand beside the section are moved into it."""
        if not isinstance(given, dict):
            return given
        beside = {name: value for name, value in given.items() if name in cls.also_here}
        policy, rest = given.get("policy"), {name: value for name, value in given.items() if name not in beside}
        support = rest.get("support", "sampled" if policy is not None else "full")
        if support != "sampled":
            beside = {name: value for name, value in beside.items() if name not in IDLE}
        if isinstance(policy, PolicyConfig):
            policy = policy.model_dump(exclude_unset=True)
        if isinstance(policy, dict):
            for name in sorted(beside.keys() & policy.keys()):
                if beside[name] != policy[name]:
                    raise ValueError(
                        f"{name} is {beside[name]} and policy.{name} is {policy[name]}: drop method.{name}"
                    )
        if beside and (policy is None or isinstance(policy, dict)):
            policy = {**beside, **(policy or {})}
        return rest if policy is None else rest | {"policy": policy, "support": support}

    @field_validator("policy", mode="after")
    @classmethod
    def _where_sampled(cls, policy: PolicyConfig | None, info: ValidationInfo) -> PolicyConfig | None:
        """The section is there if, and only if, the loss is the policy gradient."""
        support = info.data.get("support")
        if support == "sampled":
            return policy or PolicyConfig()
        for name in policy.changed() if policy is not None and support is not None else ():
            raise ValueError(f"{name} belongs to the policy gradient: write method.support=sampled, or drop it")
        return None
