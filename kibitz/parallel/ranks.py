"""Several processes that train one student, started by torchrun; of a single one, everything here is trivial.

All processes run one and the same loop. Each writes, grades, scores and learns its share of a step's prompts, and all know
every rollout of the step, so that what is counted is counted alike everywhere. How they hold the student between them,
`kibitz.parallel.fsdp` says.
"""

import atexit
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from kibitz.config import ParallelConfig
from kibitz.parallel.lockstep import Lockstep
from kibitz.types import Rollout, Scored

T = TypeVar("T")
U = TypeVar("U")
PATIENCE = timedelta(hours=1)
"""How long a process waits for the others: as long as the slowest save takes."""


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, as one of them sees it."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    lockstep: Lockstep = field(default_factory=Lockstep, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order, known to all. Until the last has come, nobody goes on."""
        if self.size == 1:
            return [value]
        self.lockstep.wait()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first(self, make: Callable[[], T]) -> T:
        """What the first process makes, on all of them, in whose company it is meanwhile. What goes wrong there is raised by
        all, so that nobody waits."""
        if self.size == 1:
            return make()
        made: list[Any] = [None, None]
        if self.is_main:
            try:
                made[0] = make()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is raised below
                made[1] = error
        self.lockstep.wait()
        dist.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def part(self, items: Sequence[T]) -> list[T]:
        """This process's share of a list, which the processes hold one after another."""
        start, stop = (len(items) * place // self.size for place in (self.rank, self.rank + 1))
        return list(items[start:stop])

    def share(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The rollouts of this process's prompts: all of one prompt are together, because rewards are compared there."""
        if self.size == 1:
            return rollouts
        keys = list(dict.fromkeys(rollout.prompt.key for rollout in rollouts))
        if len(keys) < self.size:
            raise ValueError(
                f"this step has rollouts of {len(keys)} prompts for {self.size} processes, and each needs one: raise "
                "rollout.prompts_per_step, or start fewer processes"
            )
        mine = set(self.part(keys))
        return [rollout for rollout in rollouts if rollout.prompt.key in mine]

    def in_shares(self, work: Callable[[list[T]], list[U]], items: Sequence[T]) -> list[U]:
        """`work` on all items, each process on its part; the results of all, in order."""
        if self.size == 1:
            return work(list(items))
        return [result for part in self.gather(work(self.part(items))) for result in part]

    def with_all(self, work: Callable[[list[T]], list[U]], mine: list[T]) -> list[U]:
        """`work` on the lists of all processes as one, one result for each entry; those of `mine`."""
        parts = self.gather(mine)
        start = sum(map(len, parts[: self.rank]))
        return work([item for part in parts for item in part])[start : start + len(mine)]

    def add(self, sums: Mapping[str, Counter[str]]) -> dict[str, Counter[str]]:
        """Sums by two names, of all processes together."""
        total: dict[str, Counter[str]] = {}
        for part in self.gather(dict(sums)):
            for name, counter in part.items():
                total.setdefault(name, Counter()).update(counter)
        return total

    def in_step(self, batches: list[list[Scored]]) -> Iterator[tuple[list[Scored], bool]]:
        """The micro-batches, and whether one is the last. A forward pass of the learner is one of all processes, so who
        has fewer learns nothing from some more."""
        num = max(self.gather(len(batches)))
        together = batches + batches[-1:] * (num - len(batches))
        idle = [replace(one, weight_T=torch.zeros_like(one.weight_T)) for one in together[-1]] if together else []
        for number, batch in enumerate(together, 1):
            yield batch if number <= len(batches) else idle, number == len(together)


ALONE = Ranks()


def join(config: ParallelConfig, device: torch.device) -> tuple[Ranks, torch.device]:
    """Meet the other processes that torchrun started, if it did; and the device that is this one's."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if (config.shard is not None and config.shard * config.replicate != size) or size % config.replicate:
        raise ValueError(
            f"parallel: shard={config.shard} times replicate={config.replicate} is not the number of processes, {size}: "
            "their product must be, or leave shard out"
        )
    if size == 1:
        return ALONE, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)
    whole = config.replicate == 1
    shape = (size,) if whole else (config.replicate, size // config.replicate)
    names = ("shard",) if whole else ("replicate", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return Ranks(dist.get_rank(), size, mesh), device


# ------------------------------------------------------------------ tensors in parts


def plain(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_save(tensor: Tensor) -> Tensor:
    """A tensor as it goes into a file: whole and on the CPU, or this process's part of it."""
    return tensor.detach() if isinstance(tensor, DTensor) else tensor.detach().cpu().contiguous()


def shared_like(whole: Tensor, other: Tensor) -> Tensor:
    """A tensor that all processes have, or hold in parts already, on the device of another one and sharded as it is."""
    if isinstance(whole, DTensor):
        return whole
    if isinstance(other, DTensor):
        return distribute_tensor(whole.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
    return whole.to(other.device, copy=True)
