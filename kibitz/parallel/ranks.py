"""The processes that train one student together, started by torchrun. With a single process every method is trivial.

All processes run the same loop. Each generates, grades, scores and trains on its share of a step's prompts, and all gather
every rollout of the step, so that all count the same numbers. `kibitz.parallel.fsdp` shards the student over them.
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
from kibitz.signals import Scored
from kibitz.types import Rollout, is_gpu

T = TypeVar("T")
U = TypeVar("U")
PATIENCE = timedelta(hours=1)
"""The timeout of a collective, which must exceed the time of the slowest save."""


@dataclass(frozen=True)
class Ranks:
    """The group of processes, seen from one: its rank, their number, and the device mesh that FSDP shards over."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    lockstep: Lockstep = field(default_factory=Lockstep, compare=False)

    @property
    def is_main(self) -> bool:
        """True on rank 0, the only process that writes files and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order of rank (all-gather), once every process has called this."""
        if self.size == 1:
            return [value]
        self.lockstep.wait()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first(self, make: Callable[[], T]) -> T:
        """The result of `make`, called on rank 0 and broadcast; the others join its collectives meanwhile. An exception there
        is raised in all processes, so that none hangs."""
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
        """This process's share of a list: consecutive items, in order of rank."""
        start, stop = (len(items) * place // self.size for place in (self.rank, self.rank + 1))
        return list(items[start:stop])

    def share(self, rollouts: list[Rollout]) -> list[Rollout]:
        """This process's share of the rollouts. Those of one prompt stay together, because advantages compare them."""
        if self.size == 1:
            return rollouts
        return [rollouts[place] for place in self.places([rollout.prompt.key for rollout in rollouts])[self.rank]]

    def places(self, keys: Sequence[str]) -> list[list[int]]:
        """The places of each process's share of a list whose entries have these keys: those of one key stay together."""
        different = list(dict.fromkeys(keys))
        if len(different) < self.size:
            raise ValueError(
                f"this step has rollouts of {len(different)} prompts for {self.size} processes, and each needs one: raise "
                "rollout.prompts_per_step, or start fewer processes"
            )
        owner = {key: rank for rank in range(self.size) for key in replace(self, rank=rank).part(different)}
        shares: list[list[int]] = [[] for _ in range(self.size)]
        for place, key in enumerate(keys):
            shares[owner[key]].append(place)
        return shares

    def in_shares(self, work: Callable[[list[T]], list[U]], items: Sequence[T]) -> list[U]:
        """The results of `work` on all items, in order; each process works on its share, and all gather the results."""
        if self.size == 1:
            return work(list(items))
        return [result for part in self.gather(work(self.part(items))) for result in part]

    def with_all(self, work: Callable[[list[T]], list[U]], mine: list[T]) -> list[U]:
        """The results of `work` for the entries of `mine`, where `work` sees the lists of all processes concatenated and
        returns one result for each entry."""
        parts = self.gather(mine)
        start = sum(map(len, parts[: self.rank]))
        return work([item for part in parts for item in part])[start : start + len(mine)]

    def add(self, sums: Mapping[str, Counter[str]]) -> dict[str, Counter[str]]:
        """The sums by two names, added up over all processes (all-reduce)."""
        total: dict[str, Counter[str]] = {}
        for part in self.gather(dict(sums)):
            for name, counter in part.items():
                total.setdefault(name, Counter()).update(counter)
        return total

    def in_step(
        self, batches: list[list[Scored]], ready: Callable[[list[Scored]], list[Scored]] = list
    ) -> Iterator[tuple[list[Scored], bool]]:
        """The micro-batches, each with whether it is the last; `ready` has the last word on each of this process's. A forward
        pass of the learner is a collective, so a process with fewer micro-batches than another repeats its last one with zero
        weights; passes that one alone needs to make its own ready are joined by the others."""
        num, batch = max(self.gather(len(batches))), []
        for number in range(num if batches else 0):
            if number < len(batches):
                batch = ready(batches[number])
            else:
                batch = [replace(one, weight_T=torch.zeros_like(one.weight_T)) for one in batch]
            self.lockstep.wait()
            yield batch, number == num - 1


ALONE = Ranks()


def join(config: ParallelConfig, device: torch.device) -> tuple[Ranks, torch.device]:
    """The ranks that torchrun started (one without torchrun), in an initialized process group, and this rank's device."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if (config.shard is not None and config.shard * config.replicate != size) or size % config.replicate:
        raise ValueError(
            f"parallel: shard={config.shard} times replicate={config.replicate} is not the number of processes, {size}: "
            "their product must be, or leave shard out"
        )
    if size == 1:
        return ALONE, device
    if is_gpu(device):
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        torch.get_device_module(device).set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        atexit.register(dist.destroy_process_group)
    whole = config.replicate == 1
    shape = (size,) if whole else (config.replicate, size // config.replicate)
    names = ("shard",) if whole else ("replicate", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return Ranks(dist.get_rank(), size, mesh), device


# ------------------------------------------------------------------ sharded tensors


def plain(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one, gathered in every process (a collective); others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def to_save(tensor: Tensor) -> Tensor:
    """A tensor detached for writing: sharded as it is, or else contiguous and on the CPU."""
    return tensor.detach() if isinstance(tensor, DTensor) else tensor.detach().cpu().contiguous()


def shared_like(whole: Tensor, other: Tensor) -> Tensor:
    """`whole`, equal in all processes, on the device of `other` and sharded like it. A sharded `whole` is returned as it
    is."""
    if isinstance(whole, DTensor):
        return whole
    if isinstance(other, DTensor):
        return distribute_tensor(whole.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
    return whole.to(other.device, copy=True)
