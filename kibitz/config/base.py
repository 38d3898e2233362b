"""The base class of every section of a recipe, and the error for a recipe that is wrong."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class RecipeError(ValueError):
    """A recipe is wrong. The message says what is wrong, where, and what to write instead."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, strict=True)

    also_here: ClassVar[Mapping[str, str]] = {}
    """Settings of a section inside this one that may be written in this one too, and the key of that section."""
