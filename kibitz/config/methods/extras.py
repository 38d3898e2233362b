"""Extras for any method: a KL penalty to a reference model, weights of turns, and replay of the data's responses."""

from typing import Literal

from pydantic import Field

from kibitz.config.base import Section
from kibitz.config.models import FrozenConfig


class ReferenceConfig(FrozenConfig):
    """A frozen model with the student's tokenizer."""


class ExtrasConfig(Section):
    """Extras for any method. `reference_kl` and `replay` together, with opd, are StableOPD (2604.08527)."""

    reference_kl: float = Field(
        0.0,
        ge=0,
        description="Adds this times KL(S || reference), exact at each token, to the loss: a hold on the start (StableOPD, "
        "2604.08527; the KL penalty of RLHF). Try 0.05. 0: off; it costs one forward pass of the reference.",
    )
    reference: ReferenceConfig | None = Field(
        None,
        description="The model that reference_kl and extrapolation compare with. null: the student before its first step.",
    )
    turn_weight: Literal["none", "even", "first", "last"] = Field(
        "none",
        description="Weights of the student's turns in a response with turns of the environment, such as tool results (in stored "
        "rollouts). none: each token has the same weight; even: each turn has; first, last: only that turn is learnt (turn "
        "curricula and step weights for agents, such as 2605.12913).",
    )
    replay: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of a step's prompts whose response in the data is learnt too, by cross-entropy (StableOPD mixes in "
        "gold solutions). Try 0.25. 0: off.",
    )
    replay_coef: float = Field(1.0, gt=0, description="Weight of the replay loss; the method's own has weight 1.")
