"""Saves a run: at once, or so that training goes on while the larger part of a checkpoint is written.

AdamW keeps 12 bytes for each parameter of 2, and all of it is written and hashed. In the background the weights are written at
once, what else is kept is copied to host memory, and a thread writes it, hashes the files and gives the folder its name
(`kibitz.training.checkpoint`). One checkpoint at a time is on its way. A process that is killed before it has its name goes on
from the one before; a run that ends in any other way waits for it.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kibitz.config import SaveConfig
from kibitz.models import LanguageModel
from kibitz.parallel.ranks import Ranks
from kibitz.training import checkpoint
from kibitz.types import Stateful, is_gpu

SMALL = 2**20
"""Bytes of a tensor that may be one of host memory all along, on a GPU too, such as a count of steps."""


@dataclass
class Saver:
    """Writes the checkpoints of `folder`. Of several processes, where all of them write, a save is done when it returns, whatever
    was asked for."""

    folder: Path
    config: SaveConfig
    ranks: Ranks
    _done: threading.Event | None = field(default=None, init=False)
    """Of the checkpoint on its way. A thread's own `join`, once interrupted, takes the thread for ended."""
    _errors: list[BaseException] = field(default_factory=list, init=False)

    def save(
        self, step: int, student: LanguageModel, stateful: Mapping[str, Stateful], state: dict[str, Any], last: bool
    ) -> None:
        """Save a step. When this returns the folder is whole if it is the `last`; otherwise it may be on its way."""
        self.wait()
        states, keep = {name: kept.state() for name, kept in stateful.items()}, self.config.keep
        wanted = is_gpu(student.device) if self.config.background is None else self.config.background
        behind = wanted and not last and self.ranks.size == 1
        if behind:
            states = {name: _held(kept, student.device) for name, kept in states.items()}
        finish = checkpoint.begin_to_save(self.folder, step, student, states, state, keep, self.ranks)
        if not behind:
            finish()
            return
        self._done = threading.Event()
        threading.Thread(target=self._run, args=(finish, self._done), name="checkpoint", daemon=True).start()

    def check(self) -> None:
        """Raise what went wrong in the background, if that is known already."""
        if self._done is not None and self._done.is_set():
            self.wait()

    def wait(self) -> None:
        """Return when no checkpoint is on its way; raise what went wrong with it."""
        if self._done is None:
            return
        self._done.wait()
        self._done = None
        if self._errors:
            raise self._errors.pop()

    def _run(self, finish: Callable[[], None], done: threading.Event) -> None:
        try:
            finish()
        except BaseException as error:  # noqa: BLE001 - the trainer raises it
            self._errors.append(error)
        finally:
            done.set()


def _held(state: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A state that no step changes. What was on a GPU is a copy in host memory already."""
    return {
        name: tensor if is_gpu(device) and tensor.nbytes > SMALL else tensor.clone() for name, tensor in state.items()
    }
