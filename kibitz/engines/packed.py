"""Matrices in a kernel's own layout, for a decoder on a CPU: a step multiplies few rows by every matrix of the model.

Libraries lay a matrix out anew at each product, which for a few dozen rows costs as much as the product does. Here it is
done once in a `generate`: the weights have not changed in it, and cannot be stale. Which library does it better is
measured, for each shape, on some rows of the matrix itself: MKL is faster on some processors, oneDNN on others, and a
plain product where neither pays. A layout holds for a number of rows; fewer are filled up with zeros.

Only speed is measured, never the numbers: a product that rounds otherwise than the plain one is no candidate, so that a run
that is continued, or repeated on a busier machine, has the same bits whatever it chose. That is looked at for each shape and
each number of rows when they are first met. MKL's packed product is the plain one to the bit wherever both were compared;
oneDNN's sums in another order.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kibitz.engines.cache import Decoder
from kibitz.losses import products

LEAST_NUMBERS = 2**16
"""A smaller matrix stays in the cache, where laying it out costs nothing."""
LEAST_ROWS = 3
"""Fewer rows are read from memory by a plain product as fast as that goes."""
ROWS = 16
"""Layouts are made for multiples of it: what a kernel computes at one time."""
MEASURED_NUMBERS = 2**20
"""A product is timed on no more numbers of the matrix than these: a fraction of a millisecond."""
SHARE = 0.9
"""Of a plain product's time: what a packed one may take."""

Product = Callable[[Tensor], Tensor]


def _mkl(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), rows)
    return lambda x_ND: torch.ops.mkl._mkl_linear(x_ND, packed, weight, bias, rows)


def _onednn(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return lambda x_ND: torch.ops.mkldnn._linear_pointwise(x_ND, packed, bias, "none", [], "")


KINDS: dict[str, Callable[[Tensor, Tensor | None, int], Product]] = {}
if torch.backends.mkl.is_available():
    KINDS["mkl"] = _mkl
if torch.backends.mkldnn.is_available():
    KINDS["onednn"] = _onednn

_chosen: dict[tuple[int, int, int, int], str | None] = {}
_same: dict[tuple[Any, ...], bool] = {}
"""Whether the product of a kind, for a number of rows, has the bits of the plain one."""


def choose(weight: Tensor, rows: int) -> str | None:
    """The kind of product that is fastest for `rows` rows of a matrix of this shape, None for a plain one: measured once in a
    process. A kind that gives other bits, or none, is no candidate."""
    key = _key(weight, rows)
    if key not in _chosen:
        _chosen[key] = _measure(weight[: max(ROWS, MEASURED_NUMBERS // weight.shape[1])].detach().contiguous(), rows)
    return _chosen[key]


def _key(weight: Tensor, rows: int) -> tuple[int, int, int, int]:
    return rows, weight.shape[0], weight.shape[1], torch.get_num_threads()


def _measure(weight: Tensor, rows: int) -> str | None:
    x_ND = torch.linspace(-1, 1, rows * weight.shape[1]).sin().view(rows, -1)
    want = products.linear(x_ND, weight)
    candidates: dict[str | None, Product] = {None: lambda x_ND: products.linear(x_ND, weight)}
    for name, pack in KINDS.items():
        try:
            product = pack(weight, None, rows)
            got = product(x_ND)
        except (RuntimeError, AttributeError, NotImplementedError):  # this build of torch has none
            continue
        if torch.equal(got, want):
            candidates[name] = product
    least = dict.fromkeys(candidates, float("inf"))
    for _ in range(5):
        for name, product in candidates.items():
            start = time.perf_counter()
            product(x_ND)
            least[name] = min(least[name], time.perf_counter() - start)
    worth = [name for name in candidates if name is None or least[name] <= SHARE * least[None]]
    return min(worth, key=lambda name: least[name])


class Replaced:
    """A forward pass in place of a linear layer's own, which is `plain`, until it is given back."""

    def __init__(self, module: nn.Linear):
        self.module, self.plain, self.own = module, module.forward, vars(module).get("forward")
        vars(module)["forward"] = self

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def restore(self) -> None:
        if self.own is None:
            del vars(self.module)["forward"]
        else:
            vars(self.module)["forward"] = self.own


class _Linear(Replaced):
    """The forward pass of a linear layer that multiplies `live` rows by its packed matrix, and all others as it did."""

    def __init__(self, module: nn.Linear):
        super().__init__(module)
        self.live, self.rows = 0, 0
        self.product: Product | None = None
        self.key: tuple[Any, ...] = ()

    def pack(self, rows: int) -> None:
        weight, self.rows, self.product = self.module.weight, rows, None  # the old layout goes first
        kind = choose(weight, rows)
        self.key = (kind, *_key(weight, rows))
        if kind is not None:
            self.product = KINDS[kind](weight, self.module.bias, rows)

    def __call__(self, x: Tensor) -> Tensor:
        if self.product is None or x.numel() != self.live * x.shape[-1] or torch.is_grad_enabled():
            return self.plain(x)
        same = _same.get((*self.key, self.live))
        if same is False:
            return self.plain(x)
        x_ND = x.reshape(self.live, -1)
        if self.live < self.rows:
            x_ND = F.pad(x_ND, (0, 0, 0, self.rows - self.live))
        found = self.product(x_ND)[: self.live].view(*x.shape[:-1], -1)
        if same is None:
            plain = self.plain(x)
            _same[(*self.key, self.live)] = torch.equal(found, plain)
            return plain
        return found


class PackedDecoder:
    """A decoder whose matrices are packed from its first step to its end. `linears()` are those that it multiplies by."""

    def __init__(self, decoder: Decoder, linears: Callable[[], Iterator[nn.Linear]]):
        self.decoder, self.linears = decoder, linears
        self.packed: list[_Linear] = []
        self.rows = 0

    def start(self, num_rows: int, num_slots: int) -> None:
        self.decoder.start(num_rows, num_slots)
        self.packed, self.rows = [_Linear(linear) for linear in self.linears()], 0

    def prefill(self, ids_GP: Tensor, prompt_R: Tensor, row_R: Tensor) -> None:
        self.decoder.prefill(ids_GP, prompt_R, row_R)

    def step(self, token_N: Tensor, position_N: Tensor, num_slots: int) -> Tensor:
        live = len(token_N)
        rows = -(-live // ROWS) * ROWS
        if live >= LEAST_ROWS and not 0.75 * self.rows < rows <= self.rows:
            self.rows = rows
            for linear in self.packed:
                linear.pack(rows)
        for linear in self.packed:
            linear.live = live if live >= LEAST_ROWS else 0
        return self.decoder.step(token_N, position_N, num_slots)

    def move(self, source_M: Tensor, target_M: Tensor) -> None:
        self.decoder.move(source_M, target_M)

    def stop(self) -> None:
        for linear in self.packed:
            linear.restore()
        self.packed = []
        self.decoder.stop()


def packable(modules: Any) -> Iterator[nn.Linear]:
    """The plain linear layers among some modules that a CPU multiplies by in float32, and that are large enough."""
    for module in modules:
        weight = module.weight if type(module) is nn.Linear else None
        if type(weight) is not nn.Parameter or weight.device.type != "cpu" or weight.dtype != torch.float32:
            continue
        if weight.numel() >= LEAST_NUMBERS:
            yield module
