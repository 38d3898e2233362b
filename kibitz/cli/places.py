"""Folders that commands name."""

from pathlib import Path


def resolved(model: str) -> str:
    """A run folder stands for its last checkpoint."""
    from kibitz.models.folders import check_folder
    from kibitz.training.checkpoint import checkpoints

    if not (Path(model) / "recipe.yaml").is_file():
        check_folder(model, "model")
        return model
    found = checkpoints(Path(model))
    if not found:
        raise ValueError(f"the run at {model} has no checkpoint yet: continue it with --resume, or name a model folder")
    return str(found[-1])
