"""Whole Hugging Face folders of a model that no process holds whole."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kibitz.models import lora
from kibitz.parallel import sharded_files
from kibitz.parallel.lockstep import Lockstep
from kibitz.parallel.ranks import plain


class ShardedWriter:
    """Writes the folder that `save_pretrained` would write, from one process. Each parameter is gathered in a collective
    that the other processes join, and one file's worth of them is in memory at a time."""

    def __init__(self, bare: Any, adapter: lora.Adapter | None):
        self.bare, self.adapter = bare, adapter
        self.calls: dict[str, Callable[[], None]] = {}

    def register(self, lockstep: Lockstep) -> None:
        """Register a collective for each parameter, in the same order in all processes."""
        for name, _ in self.bare.named_parameters():
            self.calls[name] = lockstep.register(partial(self._gather, name))

    def __call__(self, folder: Path) -> None:
        bare = self.bare
        if self.adapter is not None:
            learnt = [name for name, parameter in bare.named_parameters() if parameter.requires_grad]
            self.adapter.save(folder, {f"base_model.model.{name}": self._weight(name).cpu() for name in learnt})
            return
        bare.config.update({"dtype": str(bare.dtype).removeprefix("torch."), "architectures": [type(bare).__name__]})
        bare.config.save_pretrained(folder)
        if bare.generation_config is not None:
            bare.generation_config.save_pretrained(folder)
        sharded_files.write_whole(self.weights(), folder)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole, one at a time, gathered by all processes. Asked for by one of them."""
        return ((name, self._weight(name)) for name in self.calls)

    def _weight(self, name: str) -> Tensor:
        self.calls[name]()
        return self._gather(name)

    @torch.no_grad()
    def _gather(self, name: str) -> Tensor:
        return plain(self.bare.get_parameter(name))
