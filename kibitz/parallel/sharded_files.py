"""Files of sharded tensors: each process writes and reads its own shards, and none gathers a tensor.

`torch.distributed.checkpoint` writes them in its safetensors format: a folder with one file for each process, which records
the offset of each shard, so that any number of processes can read it. No pickle is written or read.
"""

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

INDEX = "model.safetensors.index.json"
FILE_BYTES = 2**30


def are_in(tensors: Iterable[Any]) -> bool:
    """True if at least one of the tensors is sharded."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def write(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write tensors into a folder, as a collective. One process writes those that are not sharded, which are equal in
    all."""
    _as_oserror(lambda: save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True)))


def read(path: Path, room: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder that `write` wrote (a collective) or of a safetensors file, each read into the tensor that
    `room` allocates for its name; a sharded one takes this process's shard."""
    if path.is_dir():
        reader = HuggingFaceStorageReader(str(path))
        tensors = {name: room(name) for name in sorted(reader.read_metadata().state_dict_metadata)}
        with warnings.catch_warnings():  # torch warns when it loads in a single process
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            _as_oserror(lambda: load(tensors, storage_reader=reader, no_dist=not dist.is_initialized()))
        return tensors
    with safe_open(path, framework="pt") as file:
        tensors = {name: room(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        for name, tensor in tensors.items():
            fill(tensor, file.get_slice(name))
    return tensors


@torch.no_grad()
def fill(tensor: Tensor, stored: Any) -> None:
    """Copy `stored`, a slice of a safetensors file, into `tensor`; of a sharded one only this process's shard is read."""
    if tuple(stored.get_shape()) != tuple(tensor.shape):
        raise ValueError(
            f"a tensor of shape {tuple(stored.get_shape())} is stored where {tuple(tensor.shape)} is wanted"
        )
    if not isinstance(tensor, DTensor):
        tensor.copy_(stored[:] if tensor.ndim else stored[()])
        return
    if (part := own_part(tensor)) is not None:
        tensor.to_local().copy_(stored[part])


def own_part(tensor: DTensor) -> tuple[slice, ...] | None:
    """Where in the whole tensor this process's shard of it stands; None for an empty shard."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if 0 in shape:
        return None
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def write_whole(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write the weights of a Hugging Face folder, in files of at most FILE_BYTES or one tensor, one file in memory at a
    time."""
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}

    def close() -> None:
        save_file(held, folder / f"part-{len(files)}", metadata={"format": "pt"})
        files.append(list(held))
        held.clear()

    total = 0
    for name, tensor in tensors:
        if held and sum(one.nbytes for one in held.values()) + tensor.nbytes > FILE_BYTES:
            close()
        held[name] = tensor.cpu().contiguous()
        total += tensor.nbytes
    close()
    if len(files) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, names in enumerate(files):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / name)
        places |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _as_oserror(work: Callable[[], Any]) -> None:
    """Raise OSError in all processes if `work` fails in any: torch's CheckpointException is no Exception."""
    try:
        work()
    except CheckpointException as error:
        _, (first, _) = min(error.failures.items())
        raise OSError(f"{type(first).__name__}: {first}") from error
