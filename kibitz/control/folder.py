"""The run folder of `kibitz control`: the same plain files as every run's, so that the same report reads them."""

import json
import platform
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kibitz import __version__, config
from kibitz.config import RecipeError
from kibitz.files import JSONL, Lock, checkpoints, commit, earlier_parts, in_words, write_atomically, written_by

FREE_TO_CHANGE = {"output", "threads"}
WRITTEN = ("run.json", "report.html", "shown.json", "policy.py", "policy.txt", "policy.svg", "policy.onnx", "before.png",
           "after.png", "metrics.jsonl", "evals.jsonl", "recipe.yaml")  # fmt: skip


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end, and it did between two iterations. Its first argument is the number of the signal."""

    def __init__(self, number: int, step: int):
        super().__init__(number)
        self.words = f"{signal.Signals(number).name} after step {step}"


def stop_if(asked: int, step: int) -> None:
    """Raise Stopped where `asked`, the number of a signal, is not 0."""
    if asked:
        raise Stopped(asked, step)


class Folder:
    """The files of one run. `recipe.yaml` goes last when a run is replaced: as long as it is there, what is left is a run."""

    def __init__(self, recipe: Any, title: str, story: str, unit: str = "step"):
        self.path, self.recipe = Path(recipe.output), recipe
        self.metrics, self.evals = (JSONL(self.path / f"{name}.jsonl") for name in ("metrics", "evals"))
        self.info: dict[str, Any] = {"title": title, "story": story, "unit": unit}
        self.clock, self.before = time.monotonic(), 0.0
        """`before`: seconds that earlier parts of the run took."""

    @contextmanager
    def open(self, resume: bool, overwrite: bool) -> Iterator[None]:
        """Be the one that writes the folder, and say in `run.json` what ended the run. Refused are a folder that another
        process writes, and one that holds another run."""
        held = (self.path / "recipe.yaml").exists()
        if held and not resume and not overwrite:
            raise RecipeError(
                f"output: {self.path} already holds a run: write --resume to continue it, --overwrite to replace it, or "
                "output=ANOTHER"
            )
        if held and resume:
            self._same()
        self.path.mkdir(parents=True, exist_ok=True)
        lock = Lock(self.path)
        try:
            lock.take()
        except BlockingIOError as other:
            raise RecipeError(written_by(self.path, str(other))) from None
        try:
            if held and overwrite:
                shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
                for name in WRITTEN:
                    (self.path / name).unlink(missing_ok=True)
            write_atomically(self.path / "recipe.yaml", config.dump(self.recipe))
            yield
        except BaseException as error:
            with suppress(OSError):  # of a full disk, the first error says it
                words = error.words if isinstance(error, Stopped) else in_words(error)
                self._end("stopped" if isinstance(error, KeyboardInterrupt) else "failed", words)
            raise
        finally:
            lock.release()

    def _same(self) -> None:
        old = config.load_as(type(self.recipe), self.path / "recipe.yaml").model_dump(mode="json")
        new = self.recipe.model_dump(mode="json")
        changed = [key for key in new if key not in FREE_TO_CHANGE and new[key] != old.get(key)]
        if changed:
            raise RecipeError(
                f"output: the run at {self.path} was made with another {', '.join(changed)}: keep them as they were, or write "
                "output=ANOTHER"
            )

    def begin(self, done: int, **facts: Any) -> None:
        """Drop what was written after the step that the run goes on from, and write what is known at the start."""
        import torch

        parts = earlier_parts(self.path, self.metrics.read())
        self.before = sum(part["seconds"] for part in parts)
        for file in (self.metrics, self.evals):
            file.keep(done if done else -1)
        self.info |= {
            "version": __version__, "commit": commit(), "status": "running", "device": "cpu",
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "machine": platform.machine(), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "first_step": done, "parts": parts, **facts,
        }  # fmt: skip
        self.show([])
        self._write()

    def finish(self, **facts: Any) -> None:
        self.info |= facts
        self._end("finished", "all steps are done")

    def _end(self, status: str, ended_by: str) -> None:
        if "status" in self.info:
            ended = {"status": status, "ended_by": ended_by, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            self.info |= ended
            self._write()

    def _write(self) -> None:
        self.info["seconds"] = self.before + time.monotonic() - self.clock
        write_atomically(self.path / "run.json", json.dumps(self.info, indent=1))

    def note(self, row: dict[str, Any]) -> None:
        """Append an evaluation, unless a run that had ended already is taken up once more."""
        if not any(old["step"] == row["step"] and old["split"] == row["split"] for old in self.evals.read()):
            self.evals.append(row)

    def seen(self, name: str, title: str) -> list[dict[str, Any]]:
        """The section of a picture that is there already."""
        words = "One episode, from left to right."
        return [{"title": title, "words": words, "image": name}] if (self.path / name).is_file() else []

    def show(self, sections: list[dict[str, Any]]) -> None:
        """What the report shows beside curves and tables: pictures and texts."""
        write_atomically(self.path / "shown.json", json.dumps(sections, ensure_ascii=False))

    # -------------------------------------------------------------- checkpoints

    def save(self, step: int, write: Any) -> None:
        """A checkpoint, whole or not at all; the one before it is deleted when the new one is there."""
        final = self.path / "checkpoints" / f"step-{step:09d}"
        unfinished = final.with_name(f".{final.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write(unfinished)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.replace(final)
        for old in checkpoints(self.path)[:-1]:
            shutil.rmtree(old)
        self._write()  # how long it has taken so far, for whoever finds it dead


def newest(folder: Path) -> Path | None:
    return (checkpoints(folder) or [None])[-1]
