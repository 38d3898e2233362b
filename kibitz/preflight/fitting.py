"""What to change in a recipe until a step fits into the memory of a device: settings that leave the loss as it is, tried in the
order of what they cost in time."""

from collections.abc import Callable, Iterator

from kibitz.config import Recipe
from kibitz.preflight.budget import Memory

ROOM = 0.9
"""Share of a device's memory that a plan may fill."""
FEWEST_TOKENS, FEWEST_ROWS = 2048, 16


def changes(recipe: Recipe, plan: Callable[[Recipe], Memory], room: float) -> list[str] | None:
    """Return the lines to change, as overrides, until the peak of `plan` is below a share of `room`, in bytes; None where no
    such lines are enough. A line that frees nothing at the peak is left out."""
    made: dict[str, str] = {}
    while (peak := plan(recipe).peak) > ROOM * room:
        for key, value, changed in _steps(recipe):
            if plan(changed).peak < peak:
                recipe, made[key] = changed, value
                break
        else:
            return None
    return [f"{key}={value}" for key, value in made.items()]


def _steps(recipe: Recipe) -> Iterator[tuple[str, str, Recipe]]:
    """The next changes, each with its key and value: the first that lowers the peak is made, and then they begin anew."""

    def step(section: str, key: str, value: object) -> tuple[str, str, Recipe]:
        inner = getattr(recipe, section).model_copy(update={key: value})
        return f"{section}.{key}", str(value).lower(), recipe.model_copy(update={section: inner})

    tokens, rows = recipe.optim.tokens_per_micro_batch, recipe.rollout.max_rows
    yield step("optim", "checkpointing", True)
    yield step("optim", "hidden_states", "cpu")
    if len(recipe.teachers) == 1:
        yield step("parallel", "shard_teacher", True)
    if rows > FEWEST_ROWS:
        yield step("rollout", "max_rows", max(FEWEST_ROWS, rows // 2))
    if tokens > FEWEST_TOKENS:
        yield step("optim", "tokens_per_micro_batch", max(FEWEST_TOKENS, tokens // 2))
    yield step("parallel", "whole_copy", False)
