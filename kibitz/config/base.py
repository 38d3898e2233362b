"""What every section of a recipe shares."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class RecipeError(ValueError):
    """What is wrong with a recipe, where, and what to write instead."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    also_here: ClassVar[Mapping[str, str]] = {}
    """Settings of a section inside this one that may be written in this one too, and the key of that section."""
