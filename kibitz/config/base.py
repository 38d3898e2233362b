"""What every section of a recipe shares."""

from pydantic import BaseModel, ConfigDict


class RecipeError(ValueError):
    """What is wrong with a recipe, where, and what to write instead."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
