"""Tensors that several processes hold in parts, in files: each writes and reads its own parts and nobody the whole.

By `torch.distributed.checkpoint` in its safetensors format: a folder of files, one of each process, which say where in the
whole tensor their parts belong, so that any number of processes can read them. No pickle is written or read.
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
    """Whether one of them is sharded."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def write(tensors: dict[str, Tensor], folder: Path) -> None:
    """All processes at one time. What is not sharded is equal in all, and one of them writes it."""
    _whatever_fails(lambda: save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True)))


def read(path: Path, room: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """A folder that several processes wrote, or a file of whole tensors: each tensor into the `room` made for it, of which
    a sharded one takes this process's part. All processes that hold parts read at one time."""
    if path.is_dir():
        reader = HuggingFaceStorageReader(str(path))
        tensors = {name: room(name) for name in sorted(reader.read_metadata().state_dict_metadata)}
        with warnings.catch_warnings():  # a single process is told that it is one
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            _whatever_fails(lambda: load(tensors, storage_reader=reader, no_dist=not dist.is_initialized()))
        return tensors
    with safe_open(path, framework="pt") as file:
        tensors = {name: room(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        for name, tensor in tensors.items():
            fill(tensor, file.get_slice(name))
    return tensors


@torch.no_grad()
def fill(tensor: Tensor, stored: Any) -> None:
    """From a slice of a safetensors file, of which no more is read than belongs here."""
    if tuple(stored.get_shape()) != tuple(tensor.shape):
        raise ValueError(
            f"a tensor of shape {tuple(stored.get_shape())} is stored where {tuple(tensor.shape)} is wanted"
        )
    if not isinstance(tensor, DTensor):
        tensor.copy_(stored[:] if tensor.ndim else stored[()])
        return
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if 0 not in shape:
        place = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        tensor.to_local().copy_(stored[place])


def write_whole(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """The weights of a Hugging Face folder, in files of at most FILE_BYTES, or of one tensor: as much is in memory."""
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


def _whatever_fails(work: Callable[[], Any]) -> None:
    """What fails in any process is raised in all, but by a class of its own, which is no Exception."""
    try:
        work()
    except CheckpointException as error:
        _, (first, _) = min(error.failures.items())
        raise OSError(f"{type(first).__name__}: {first}") from error
