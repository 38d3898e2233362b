"""What a device is asked for, counted on tensors without numbers: kernels, bytes, FLOPs, waits; and rates that make it seconds.

Each operation that is no view is a kernel. It reads its arguments and writes its results, once each; products and attention
have FLOPs instead of bytes.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen3Config

from kibitz.models.kept import fused_attention

META = torch.device("meta")
FREE = {
    "empty",
    "empty_strided",
    "empty_like",
    "new_empty",
    "detach",
    "alias",
    "lift_fresh",
    "_unsafe_view",
    "promote_types",
}
ATTENTION = {"counted::attend", "counted::attend_backward"}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "linear"}


@dataclass(frozen=True)
class Card:
    """Rates of a device: bytes a second of its memory, FLOP/s that products reach, seconds to start a kernel, bytes a second to
    and from the host, of the disk beside it, and of SHA-256 on one core."""

    name: str
    bytes: float
    flops: float
    launch: float
    bus: float
    disk: float
    digest: float


H200 = Card("H200", 4.8e12, 700e12, 7e-6, 50e9, 2e9, 1.1e9)
"""4.8 TB/s by its data sheet. Assumed: 700 of 989 TFLOP/s, 7 microseconds a kernel, 50 of the 64 GB/s of PCIe 5, and a disk of
2 GB/s, which one NVMe drive keeps up and many a network folder does not. 1.1 GB/s is what `openssl speed sha256` found on a core
of a 2.8 GHz Xeon."""


@dataclass(frozen=True)
class Scale:
    """Shapes of student and teacher, and the sizes of a step. `scored` are the tokenizer's ids: logits beyond are cut off."""

    student: dict[str, Any]
    teacher: dict[str, Any]
    vocab: int = 151_936
    scored: int = 151_669
    rollouts: int = 256
    prompt: int = 200
    response: int = 1024
    micro_batch: int = 16_384

    @property
    def length(self) -> int:
        return self.prompt + self.response

    @property
    def rows(self) -> int:
        """Of a micro-batch."""
        return max(1, self.micro_batch // self.length)

    @property
    def micro_batches(self) -> float:
        """Of a step; the last one is a part of one."""
        return self.rollouts / self.rows


def shape(hidden: int, inner: int, layers: int, heads: int, kv: int = 8, dim: int = 128) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "head_dim": dim}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": kv}


FULL = Scale(shape(2048, 6144, 28, 16) | {"tie_word_embeddings": True}, shape(4096, 12288, 36, 32))
TINY = Scale(shape(64, 128, 4, 4, 2, 16), shape(128, 256, 4, 4, 2, 32), 1_000, 990, 8, 20, 40, 240)


@dataclass(frozen=True)
class Work:
    """What a device is asked for: `bytes` are those moved beside products and attention, `bus` those that cross to the host or
    back; at a `wait` the host waits until the device has nothing more to do."""

    kernels: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0
    waits: float = 0.0
    bus: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def times(self, factor: float) -> "Work":
        return Work(*(factor * getattr(self, one.name) for one in fields(self)))

    def seconds(self, card: Card) -> float:
        """The longer of two times: to start the kernels; or to move bytes and do products, and after each wait to start the
        kernel that the device then lacks."""
        computed = self.bytes / card.bytes + self.flops / card.flops + self.bus / card.bus
        return max(self.kernels * card.launch, computed + self.waits * card.launch)


class Counting(TorchDispatchMode):
    """Counts what the operations inside the context ask for, each a kernel of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name not in FREE and not func.is_view:
            self.names[name] += 1
            self.count(name, _tensors(args), _tensors(_listed(result)))
        return result

    def count(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        if name not in PRODUCTS:
            self.bytes += sum(tensor.nbytes for tensor in [*read, *written])

    @property
    def work(self) -> Work:
        return Work(float(sum(self.names.values())), self.bytes)


class Fused(Counting):
    """Counts as a compiler fuses at the least: all operations between two products, or attention, in the order that they stand
    in, are one kernel. It reads once what others wrote, and writes once what others read."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.is_open = 0, False
        self.made: dict[int, tuple[Tensor, int]] = {}
        """By storage: what was written last, which is kept alive so that no address comes twice, and by which kernel."""
        self.stored: set[int] = set()
        self.read: set[tuple[int, int]] = set()

    def count(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        alone = name in PRODUCTS | ATTENTION
        if alone or not self.is_open:
            self.kernels += 1
        self.is_open = not alone
        for tensor in read:
            self._read(tensor, name)
        for tensor in written:
            self.made[_key(tensor)] = (tensor, 0 if alone else self.kernels)
        if name in ATTENTION:
            self.bytes += sum(tensor.nbytes for tensor in written)

    def _read(self, tensor: Tensor, name: str) -> None:
        key = _key(tensor)
        made, by = self.made.get(key, (tensor, 0))
        if by == self.kernels or (key, self.kernels) in self.read:
            return
        if by and key not in self.stored:  # what a product writes has FLOPs instead
            self.stored.add(key)
            self.bytes += made.nbytes
        self.read.add((key, self.kernels))
        if name not in PRODUCTS:
            self.bytes += tensor.nbytes

    @property
    def work(self) -> Work:
        return Work(float(self.kernels), self.bytes)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, list | tuple) else [result]


def _tensors(values: Any) -> list[Tensor]:
    return [one for one in values if isinstance(one, Tensor)]


# ------------------------------------------------------------------ models


def model_of(sizes: dict[str, Any], vocab: int, layers: int | None = None) -> Any:
    settings = {**sizes, "vocab_size": vocab, **({} if layers is None else {"num_hidden_layers": layers})}
    with META:
        return AutoModelForCausalLM.from_config(Qwen3Config(**settings), dtype=torch.bfloat16).eval()


def of_all_layers(two: Work, three: Work, layers: int) -> Work:
    """What a model of `layers` asks for, from one of two layers and one of three."""
    return two + (three + two.times(-1.0)).times(layers - 2.0)


@torch.library.custom_op("counted::attend", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise AssertionError("tensors on meta have no numbers")


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("counted::attend_backward", mutates_args=())
def _attend_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    raise AssertionError("tensors on meta have no numbers")


@_attend_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


_attend.register_autograd(
    lambda ctx, grad: _attend_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@contextmanager
def kernels_of_attention() -> Iterator[None]:
    """A context inside which attention is one kernel forward and one backward, with heads that share keys: each reads its
    arguments and writes its results once, as flash kernels do."""
    with fused_attention(), patch.object(F, "scaled_dot_product_attention", lambda q, k, v, *_, **__: _attend(q, k, v)):
        yield
