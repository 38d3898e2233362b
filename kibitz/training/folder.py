"""A run is a folder of plain files; everything that shows or compares runs reads them."""

import json
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kibitz import __version__, config
from kibitz.config import Recipe, RecipeError
from kibitz.files import JSONL, LOCK, Lock, commit, earlier_parts, write_atomically, writer_of, written_by
from kibitz.losses.products import onednn_is_faster
from kibitz.methods.stored import as_row
from kibitz.models import LanguageModel
from kibitz.parallel.ranks import ALONE, Ranks
from kibitz.teachers import Teacher
from kibitz.training.checkpoint import checkpoints, newest_sound, remove, set_aside
from kibitz.types import Rollout

FILES = ("metrics", "evals", "rollouts", "alarms", "stored")
FREE_TO_CHANGE = {"steps", "eval", "save", "guards", "track", "output", "threads", "device", "parallel"}
"""Sections of the recipe that may differ when a run goes on."""


class RunFolder:
    """The files of one run, opened for writing; where another process writes them (`writes` is false), for reading."""

    def __init__(self, path: Path, recipe: Recipe, overwrite: bool = False, writes: bool = True):
        self.path, self.recipe, self.overwrite, self.writes = path, recipe, overwrite, writes
        self.files = [JSONL(path / f"{name}.jsonl", writes) for name in FILES]
        self.metrics, self.evals, self.rollouts, self.alarms, self.stored = self.files
        self.lock = Lock(path)
        self.started, self.clock = time.time(), time.monotonic()  # somebody may set the first one back
        self.before = 0.0
        """Seconds that earlier parts of the run took."""
        self.info: dict[str, Any] = {}
        self.notes: list[str] = []
        """What a person should know about how the run was taken up."""
        self.seen = _names(path)

    def begin(self, done: int, student: LanguageModel, teacher: Teacher | None) -> None:
        """Write what is known at the start; on resuming, drop what was written after the checkpoint, and everything if
        there is none. An old run is thrown away only here, when all of the new one is checked and loaded: its checkpoint
        may be the new one's student."""
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._take()
        if self.overwrite:
            _forget(self.path)
        parts = earlier_parts(self.path, self.metrics.read())
        self.before = sum(part["seconds"] for part in parts)
        self.notes += [f"{told}, and was left out" for file in self.files if (told := file.damage()) is not None]
        set_aside(self.path, last_step=done)
        write_atomically(self.path / "recipe.yaml", config.dump(self.recipe))
        for file in self.files:
            file.keep(last_step=done or -1)
        self.info = {
            "version": __version__,
            "commit": commit(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self.started)),
            "status": "running",
            "device": str(student.device),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "cpu_matmul": "onednn" if onednn_is_faster() else "torch's own",
            "torch": torch.__version__,
            "student_params": student.num_parameters,
            "trainable_params": student.num_trainable,
            "teacher_params": None if teacher is None else teacher.num_parameters,
            "first_step": done,
            "parts": parts,
            "notes": self.notes,
        }
        self.beat()

    def _take(self) -> None:
        """Be the one that writes; what was found when this process began must still be there."""
        try:
            self.lock.take()
        except BlockingIOError as other:
            raise RecipeError(written_by(self.path, str(other))) from None
        if self.seen != _names(self.path):
            self.lock.release()
            raise RecipeError(f"output: another process wrote to {self.path} while this one loaded: start again")

    def beat(self) -> None:
        """Note how long the run has taken so far, for whoever finds it dead."""
        self.info["seconds"] = self.before + time.monotonic() - self.clock
        self._write_info()

    def finish(self, status: str, ended_by: str, peaks: Mapping[str, Any]) -> None:
        """`ended_by` says why the run is over; `peaks` are the largest memory of each phase."""
        self.info |= {
            "status": status,
            "ended_by": ended_by,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **peaks,
        }
        self.beat()

    def _write_info(self) -> None:
        if not self.writes:
            return
        write_atomically(self.path / "run.json", json.dumps(self.info, indent=1))

    def sync(self) -> None:
        """Have the disk hold every row, before a checkpoint counts on them."""
        for file in self.files:
            file.sync()

    def choose_shown(self, rollouts: list[Rollout], num: int) -> list[Rollout]:
        """The rollouts that the heat-map shows: of those before training two thirds wrong ones, and the same prompts
        ever after."""
        before = [row.get("prompt_key") for row in self.rollouts.read() if row["step"] == 0]
        keys = list(dict.fromkeys(key for key in before if isinstance(key, str)))
        first = {rollout.prompt.key: rollout for rollout in reversed(rollouts)}
        if not keys:
            wrong = [key for key, rollout in first.items() if rollout.reward is not None and rollout.reward < 1]
            keys = wrong[: -(-2 * num // 3)]
            keys += [key for key in first if key not in keys][: num - len(keys)]
        return [first[key] for key in keys if key in first]

    def write_rollouts(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Keep the rows from before training and the newest: between them the report draws before and after."""
        if not self.writes:
            return
        kept = [row for row in self.rollouts.read() if row["step"] == 0 and step > 0]
        rows = kept + [{"step": step, **row} for row in rows]
        write_atomically(self.rollouts.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def store(self, step: int, rollouts: list[Rollout]) -> None:
        """Keep what was written, for `method.rollouts` of another run."""
        for rollout in rollouts:
            self.stored.append({"step": step, **as_row(rollout)})

    def as_run(self, make):
        last = checkpoints(self.path)
        return make(self.path, self.recipe, self.metrics.read(), self.evals.read(), last[-1] if last else None)


def open_folder(recipe: Recipe, resume: bool, overwrite: bool, ranks: Ranks = ALONE) -> tuple[RunFolder, Path | None]:
    """The folder of a new run, or that of an old one and the checkpoint to go on from."""
    folder = RunFolder(Path(recipe.output), recipe, overwrite, writes=ranks.is_main)
    resumed_from, folder.notes = ranks.first(lambda: _how_to_begin(recipe, resume, overwrite))
    return folder, resumed_from


def _names(path: Path) -> list[str]:
    """What a run has saved."""
    return [one.name for one in checkpoints(path)]


def _how_to_begin(recipe: Recipe, resume: bool, overwrite: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, if there is one, and what to tell about it."""
    path = Path(recipe.output)
    if path.exists() and not path.is_dir():
        raise RecipeError(f"output: {path} is a file; write the name of a folder")
    _check_places(path)
    if not overwrite and (other := writer_of(path)) is not None:
        raise RecipeError(written_by(path, other))
    held = (path / "recipe.yaml").exists() or (path / "metrics.jsonl").exists()
    if resume:
        return _to_resume(path, recipe, held)
    if held and not overwrite:
        raise RecipeError(
            f"output: {path} already holds a run: write --resume to continue it, --overwrite to replace it, or output=ANOTHER"
        )
    return None, []


def _check_places(path: Path) -> None:
    """Raise RecipeError where something else stands in the place of what a run writes, before it has anything to save."""
    if path.is_symlink() and not path.exists():
        raise RecipeError(f"output: {path} is a link to a folder that is not there: make it, or write output=ANOTHER")
    folders = [
        name
        for name in ("run.json", "recipe.yaml", LOCK, *(f"{name}.jsonl" for name in FILES))
        if (path / name).is_dir()
    ]
    if folders:
        raise RecipeError(f"output: {path / folders[0]} is a folder, and a run writes a file there: take it away")
    kept = path / "checkpoints"
    if (kept.exists() or kept.is_symlink()) and not kept.is_dir():
        raise RecipeError(f"output: {kept} is no folder, and a run saves its checkpoints there: take it away")


def _forget(path: Path) -> None:
    """Only what a run writes; other files in the folder are not ours to delete. The recipe goes last: as long as it is
    there, what is left is known as a run."""
    for old in reversed(checkpoints(path)):
        remove(old)
    shutil.rmtree(path / "checkpoints", ignore_errors=True)
    for name in ("run.json", "report.html", "tracker.json", *(f"{name}.jsonl" for name in FILES), "recipe.yaml"):
        (path / name).unlink(missing_ok=True)


def _to_resume(path: Path, recipe: Recipe, held: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, none if there is none yet, and what to tell about the choice."""
    if not held:
        return None, [f"there is no run at {path} yet: it starts from step 0"]
    try:
        old = config.load(path / "recipe.yaml").model_dump(mode="json")
    except RecipeError as error:
        raise RecipeError(f"output: the recipe.yaml of the run at {path} cannot be read: {error}") from None
    new = recipe.model_dump(mode="json")
    changed = [key for key in new if key not in FREE_TO_CHANGE and new[key] != old.get(key)]
    if changed:
        raise RecipeError(
            f"output: the run at {path} was made with another {', '.join(changed)}: "
            "keep them as they were, or write output=ANOTHER"
        )
    found, damaged = newest_sound(path)
    if found is not None:
        return found, [f"{one}; {found.name} is taken" for one in damaged]
    if damaged:
        raise RecipeError(
            f"output: {'; '.join(damaged)}. No other is left: put a copy back, or begin anew by --overwrite"
        )
    return None, [f"the run at {path} had saved no checkpoint: it starts again from step 0"]
