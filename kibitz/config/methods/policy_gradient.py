"""The settings of methods that use a policy gradient on the sampled token."""

from typing import Literal

from pydantic import Field

from kibitz.config.base import Section

PolicyLossName = Literal["sampled_token", "ppo_clip", "truncated", "banded", "one_sided"]


class PolicyGradientConfig(Section):
    """The settings that all policy-gradient methods share."""

    policy_loss: PolicyLossName = Field(
        "sampled_token",
        description="The treatment of a token whose probability has moved since it was sampled. sampled_token: weighed by the "
        "ratio; ppo_clip: no gain beyond the bound; truncated: weighed by at most ratio_cap; banded: dropped outside "
        "the band; one_sided: dropped once it has fallen by max_drop. At a ratio of 1 all are equal.",
    )
    clip_ratio: float = Field(
        0.2, gt=0, description="For ppo_clip: the largest distance of the ratio from 1 (1707.06347)."
    )
    ratio_cap: float = Field(5.0, ge=1, description="For truncated and banded: the largest ratio. 5: ExOPD, IcePop.")
    ratio_floor: float = Field(0.5, ge=0, le=1, description="For banded: the smallest ratio. 0.5: IcePop.")
    max_drop: float = Field(
        0.2, gt=0, le=1, description="For one_sided: the largest fall in probability. 0.2: prime-rl."
    )
