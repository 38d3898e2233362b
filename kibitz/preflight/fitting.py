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
    made, peak = [], plan(recipe).peak
    for line, section, key, value in _steps(recipe):
        if peak <= ROOM * room:
            break
        changed = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={key: value})})
        if (less := plan(changed).peak) < peak:
            recipe, peak = changed, less
            made = [*(one for one in made if not one.startswith(f"{section}.{key}=")), line]
    return made if peak <= ROOM * room else None


def _steps(recipe: Recipe) -> Iterator[tuple[str, str, str, object]]:
    """Lines with the section, key and value that they set."""

    def step(section: str, key: str, value: object) -> tuple[str, str, str, object]:
        return f"{section}.{key}={str(value).lower()}", section, key, value

    yield step("optim", "checkpointing", True)
    yield step("optim", "hidden_states", "cpu")
    tokens, rows = recipe.optim.tokens_per_micro_batch, recipe.rollout.max_rows
    while tokens > FEWEST_TOKENS or rows > FEWEST_ROWS:
        if tokens > FEWEST_TOKENS:
            tokens = max(FEWEST_TOKENS, tokens // 2)
            yield step("optim", "tokens_per_micro_batch", tokens)
        if rows > FEWEST_ROWS:
            rows = max(FEWEST_ROWS, rows // 2)
            yield step("rollout", "max_rows", rows)
