"""A GPU that is not there: tensors that say they are on `gpu:0` and compute on the CPU.

An operation that mixes devices raises `WrongDevice` where CUDA would, and each wait of the host for the device, and each copy
there, is counted by the line of kibitz that caused it. Values, gradients and weights are those of the CPU, to the bit.
Streams that would race raise `support.streams.Race`. Not seen: kernels, collectives, and what other threads than the test's do.

    with pretended() as counts:
        kibitz.train({..., "device": DEVICE})

On a machine with a GPU `KIBITZ_TEST_DEVICE=cuda` runs the same tests on it, and nothing is pretended.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.streams import Stream, Streams
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "gpu"
DEVICE = os.environ.get("KIBITZ_TEST_DEVICE", NAME)
only_pretended = pytest.mark.skipif(DEVICE != NAME, reason="looks into the device that is pretended")
aten = torch.ops.aten
TAKES_CPU_INDICES = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
COPIES = {aten.copy_.default, aten._to_copy.default, aten.copy.default}
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.is_nonzero.default,
    aten.repeat_interleave.Tensor,
}
"""Operations whose result the host must know before it goes on."""


class WrongDevice(RuntimeError):
    """Tensors of two devices met in one operation."""


@dataclass
class Counts:
    """What a GPU would have been asked: `operations` by name, `waits` and `copies` (from the host) by the line of kibitz."""

    operations: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)

    def of(self, *files: str) -> int:
        """The waits of some files."""
        return sum(number for line, number in self.waits.items() if line.startswith(files))


class OnDevice(torch.Tensor):
    """`held` is the same tensor on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({self.held!r})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> "OnDevice":
        return OnDevice(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Device.current.run(func, args, kwargs or {})


def line_of_kibitz() -> str:
    """`room/file.py:line` of the innermost frame in kibitz."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/kibitz/" in name and "/site-packages/" not in name and "/tests/" not in name:
            return f"{name.rsplit('/kibitz/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class Device:
    """Runs operations on what the tensors hold, once their devices are found to agree."""

    current: "Device"

    def __init__(self) -> None:
        self.counts, self.streams = Counts(), Streams()
        self.pinned: dict[int, Tensor] = {}  # kept alive, so that no address comes twice

    def run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        tensors = [*_tensors(args), *_tensors(list(kwargs.values()))]
        there = [one for one in tensors if isinstance(one, OnDevice)]
        here = [one for one in tensors if not isinstance(one, OnDevice)]
        wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        to_device = wanted.type == NAME if wanted is not None else bool(there)
        if (done := self._pins(func, args, kwargs, there)) is not NotImplemented:
            return done
        if not there and not to_device:
            return func(*args, **kwargs)
        if func is aten._fused_sdp_choice.default:
            return 0  # the plain one, which every device has
        self._check(func, args, there, here)
        self._count(func, args, there, to_device)
        self._touch(func, args, kwargs, there)
        plain_args, plain_kwargs = _held(args), {name: _held(value) for name, value in kwargs.items()}
        if wanted is not None and wanted.type == NAME:
            plain_kwargs["device"] = torch.device("cpu")
        if "pin_memory" in plain_kwargs:
            plain_kwargs["pin_memory"] = False
        if func is aten.mm.dtype:  # which the CPU has not: the sum of the products before it is rounded
            func, plain_args = aten.mm.default, [one.to(plain_args[2]) for one in plain_args[:2]]
        out = func(*plain_args, **plain_kwargs)
        if func is aten._to_copy.default and out is plain_args[0]:
            out = out.clone()
        if (written := _written(func, args, kwargs)) is not None:
            assert all(one.held.shape == one.shape for one in there), f"{func} changed a shape"
            return written
        return _wrapped(out) if to_device else out

    def _check(self, func: Any, args: tuple, there: list[OnDevice], here: list[Tensor]) -> None:
        """Numbers of no dimension may come from the CPU, indices too, and copies go between devices; all else is refused."""
        if not there or not here or func in COPIES:
            return
        wrong = [one for one in here if one.dim() > 0 and one.device.type != "meta"]
        if func in TAKES_CPU_INDICES and isinstance(args[0], OnDevice):
            indices = [one for one in args[1] if one is not None]
            wrong = [one for one in wrong if not any(one is index for index in indices)]
        if "fused_" in str(func):  # torch's optimizers want even the count of steps beside the parameter
            wrong = here
        if wrong:
            shapes = ", ".join(str(tuple(one.shape)) for one in wrong)
            raise WrongDevice(f"{func} met {NAME}:0 and the CPU (shapes {shapes}) at {line_of_kibitz()}")

    def _count(self, func: Any, args: tuple, there: list[OnDevice], to_device: bool) -> None:
        self.counts.operations[func._schema.name.removeprefix("aten::")] += 1
        waits = func in WAITS and bool(there)
        if func in TAKES_CPU_INDICES and there:
            indices = [one for one in args[1] if one is not None]
            waits = any(one.dtype in (torch.bool, torch.uint8) for one in indices)
            if isinstance(args[0], OnDevice) and any(not isinstance(one, OnDevice) for one in indices):
                self.counts.copies[line_of_kibitz()] += 1
        if func is aten._to_copy.default:
            waits = bool(there) and not to_device
            if not there:
                self.counts.copies[line_of_kibitz()] += 1
        if func is aten.copy_.default and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
            waits = isinstance(args[1], OnDevice)
            if not waits:
                self.counts.copies[line_of_kibitz()] += 1
        if waits:
            self.counts.waits[line_of_kibitz()] += 1

    def _touch(self, func: Any, args: tuple, kwargs: dict[str, Any], there: list[OnDevice]) -> None:
        """What a stream does to memory, once there are two of them."""
        streams = self.streams
        if func.is_view or (streams.current is streams.main and not streams.main.knows):
            return
        written = _written(func, args, kwargs)
        targets = [one for one in _tensors([written]) if isinstance(one, OnDevice)] if written is not None else []
        places = [[one.held.untyped_storage().data_ptr() for one in some] for some in (there, targets)]
        copies = func is aten.copy_.default and not isinstance(args[1], OnDevice)
        streams.touch(*places, "copy" if copies else "compute")

    def _pins(self, func: Any, args: tuple, kwargs: dict[str, Any], there: list[OnDevice]) -> Any:
        """Page-locked memory is the CPU's, and knows that it is locked."""
        if func is aten.is_pinned.default:
            return not there and args[0].untyped_storage().data_ptr() in self.pinned
        if func is aten._pin_memory.default:
            assert not there, "only memory of the CPU is page-locked"
            return self._locked(args[0].clone())
        if kwargs.get("pin_memory") and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            device = {"device": torch.device("cpu")} if there else {}
            return self._locked(func(*_held(args), **{**kwargs, "pin_memory": False, **device}))
        return NotImplemented

    def _locked(self, tensor: Tensor) -> Tensor:
        self.pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor


def _tensors(values: Any) -> Iterator[Tensor]:
    for one in values:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, list | tuple):
            yield from _tensors(one)


def _held(tree: Any) -> Any:
    if isinstance(tree, list | tuple):
        return type(tree)(map(_held, tree))
    return tree.held if isinstance(tree, OnDevice) else tree


def _wrapped(tree: Any) -> Any:
    if isinstance(tree, list | tuple):
        return type(tree)(map(_wrapped, tree))
    return OnDevice(tree) if isinstance(tree, Tensor) and not isinstance(tree, OnDevice) else tree


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an operation that writes in place gives back: what came in. None for the others."""
    returns = func._schema.returns
    if not any(one.alias_info is not None and one.alias_info.is_write for one in returns):
        return None
    by_alias = {}
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            by_alias |= dict.fromkeys(argument.alias_info.before_set, value)
    found = tuple(by_alias[next(iter(one.alias_info.before_set))] for one in returns)
    return found[0] if len(found) == 1 else found


class _Dispatch(TorchDispatchMode):
    """Sees operations without a tensor of the device among their arguments, which may make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Device.current.run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Functions that reach into memory from C++ without an operation."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == NAME:
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(NAME)
        if func == torch.Tensor.data.__set__ and isinstance(first, OnDevice) != isinstance(args[1], OnDevice):
            return _move_into(first, args[1])
        if not isinstance(first, OnDevice):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "new_tensor":
            dtype = kwargs.get("dtype") or first.dtype
            return torch.tensor(args[1], dtype=dtype).to(kwargs.get("device") or NAME)
        if name == "tolist":
            Device.current.counts.waits[line_of_kibitz()] += 1
            return first.held.tolist()
        if name in ("data_ptr", "untyped_storage"):
            return func(first.held)
        if name in ("__getitem__", "__setitem__"):
            return func(first, _indices(args[1]), *args[2:])
        return func(*args, **kwargs)


def _move_into(tensor: Tensor, data: Tensor) -> None:
    """`tensor.data = data` from one device to the other, which torch allows between the CPU and CUDA."""
    new = torch.nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else data.detach()
    torch.utils.swap_tensors(tensor, new)


def _indices(index: Any) -> Any:
    if isinstance(index, list):
        return torch.tensor(index)
    return tuple(map(_indices, index)) if isinstance(index, tuple) else index


class Clock:
    """An event of the device, whose work is done as soon as it is asked for."""

    made = 0

    def __init__(self, enable_timing: bool = False):
        assert enable_timing, "an event without a time says nothing"
        self.at: float | None = None

    def record(self) -> None:
        Clock.made += 1
        self.at = float(Clock.made)

    def synchronize(self) -> None:
        assert self.at is not None, "nobody recorded this event"

    def elapsed_time(self, other: "Clock") -> float:
        assert self.at is not None and other.at is not None, "nobody recorded these events"
        return other.at - self.at


class Module(SimpleNamespace):
    """What torch.cuda is to CUDA: the functions that kibitz asks of a device's module."""

    Event = Clock
    Stream = Stream
    memory = (60 * 2**30, 80 * 2**30)

    def stream(self, one: Stream) -> Any:
        return Device.current.streams.stream(one)

    def current_stream(self, device: Any = None) -> Stream:
        return Device.current.streams.current

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None: ...

    def reset_peak_memory_stats(self, device: Any = None) -> None: ...

    def max_memory_allocated(self, device: Any = None) -> int:
        return 2**20

    def memory_reserved(self, device: Any = None) -> int:
        return 2**20

    def memory_allocated(self, device: Any = None) -> int:
        return 2**20

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return self.memory

    def synchronize(self, device: Any = None) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Recomputation asks for it. An exception inside a backward pass ends the process: torch's guard of a device that is
        written in Python cannot be unwound."""
        return [torch.bfloat16, torch.float16]


@cache
def register() -> Module:
    """Tell torch of the device, once in a process."""
    module = Module()
    _setup_privateuseone_for_python_backend(NAME, module)
    return module


def gpu() -> torch.device:
    register()
    return torch.device(NAME)


@contextmanager
def pretended() -> Iterator[Counts]:
    """A context inside which the device `DEVICE` is a GPU. The backward pass stays on this thread: torch starts one for each
    device, when the first backward pass of a process runs. So does loading: transformers has threads that copy weights to a
    device."""
    if DEVICE != NAME:
        yield Counts()
        return
    register()
    Device.current = Device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
        with torch.autograd.set_multithreading_enabled(False), _Functions(), _Dispatch():
            yield Device.current.counts
