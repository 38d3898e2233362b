"""Metrics for TensorBoard, Weights & Biases or Trackio: the rows of metrics.jsonl and evals.jsonl, as numbers by name.

A tracker is a watcher of the run like any other. What it needs to log in stands in the environment and nowhere else, and
a tracker that fails is named in a note and dropped: the files of the run hold everything anyway.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kibitz.config import Recipe, RecipeError, TrackConfig

Log = Callable[[int, dict[str, float]], None]
"""Takes the step and the numbers of a row; names such as train/loss and eval/greedy/accuracy."""


@dataclass(frozen=True)
class Tracker:
    log: Log
    close: Callable[[], None]


def require(config: TrackConfig | None) -> None:
    """Raise RecipeError, before anything loads, for a tracker that is not installed or could not log in."""
    if config is None:
        return
    if importlib.util.find_spec(config.to) is None:
        raise RecipeError(f"track.to: the package {config.to} is missing: pip install 'kibitz[{config.to}]'")
    if config.to == "wandb" and not (os.environ.get("WANDB_API_KEY") or _wandb_is_offline()):
        raise RecipeError(
            "track.to: wandb takes its key from the environment: set WANDB_API_KEY, or WANDB_MODE=offline"
        )


def _wandb_is_offline() -> bool:
    return os.environ.get("WANDB_MODE", "online") != "online"


# ------------------------------------------------------------------ the three


def _tensorboard(config: TrackConfig, recipe: Recipe, folder: Path, done: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(log, writer.close)


def _wandb(config: TrackConfig, recipe: Recipe, folder: Path, done: int) -> Tracker:
    import wandb

    quiet = wandb.Settings(console="off", silent=True, disable_git=True, save_code=False)
    run = wandb.init(
        project=config.project,
        name=config.name or folder.name,
        id=_identity(folder, done),
        resume="allow",
        dir=str(folder),
        config=recipe.model_dump(mode="json"),
        settings=quiet,
    )
    return Tracker(lambda step, values: run.log(values, step=step), run.finish)


def _trackio(config: TrackConfig, recipe: Recipe, folder: Path, done: int) -> Tracker:
    import trackio

    name = f"{config.name or folder.name}-{_identity(folder, done)}"  # it goes on with a run by its name
    run = trackio.init(
        project=config.project,
        name=name,
        config=recipe.model_dump(mode="json"),
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    return Tracker(lambda step, values: run.log(values, step=step), trackio.finish)


OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


def _identity(folder: Path, done: int) -> str:
    """The name of a run for a tracker: drawn when the run begins, and the same when it goes on."""
    path = folder / "tracker.json"
    if done and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))["id"]
    identity = secrets.token_hex(4)
    path.write_text(json.dumps({"id": identity}), encoding="utf-8")
    return identity


# ------------------------------------------------------------------ as a watcher of the run


class Tracked:
    """Hands on everything to `progress`, and the numbers to the recipe's tracker too."""

    def __init__(self, progress: Any):
        self.progress = progress
        self.tracker: Tracker | None = None

    def start(self, recipe: Recipe, first_step: int) -> None:
        self.progress.start(recipe, first_step)
        if recipe.track is not None and os.environ.get("RANK", "0") == "0":  # of several processes one
            config, folder = recipe.track, Path(recipe.output)
            with self._surviving():
                self.tracker = OPEN[config.to](config, recipe, folder, first_step)

    def phase(self, name: str) -> None:
        self.progress.phase(name)

    def note(self, text: str) -> None:
        self.progress.note(text)

    def step(self, row: dict[str, Any]) -> None:
        self.progress.step(row)
        self._log("train", row)

    def evaluated(self, row: dict[str, Any]) -> None:
        self.progress.evaluated(row)
        self._log("eval", row)

    def close(self) -> None:
        if self.tracker is not None:
            with self._surviving():
                self.tracker.close()

    def _log(self, prefix: str, row: Mapping[str, Any]) -> None:
        if self.tracker is not None:
            with self._surviving():
                self.tracker.log(row["step"], dict(numbers(row, prefix)))

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """Send what a tracker prints to stderr, because stdout is for results. What it raises becomes a note, without its words:
        they may hold what it logs in with."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except Exception as error:  # noqa: BLE001 - a service that is down must not cost a run
            self.tracker = None
            self.note(
                f"the tracker failed ({type(error).__name__}) and is left out from here on; metrics.jsonl goes on"
            )


def numbers(row: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """All numbers of a row, those inside inner tables too: `train/seconds/sampling`."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}/{key}")
        elif isinstance(value, int | float) and key != "step":
            yield f"{prefix}/{key}", float(value)
