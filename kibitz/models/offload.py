"""Frozen models that take little device memory: quantized weights, and weights that are offloaded to host memory.

Offloaded weights are on the device only while a forward pass needs them. They are frozen, so an eviction copies nothing
back: the device copy is dropped and the module holds the host tensor again. Host memory is pinned where the device is a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kibitz.config import FrozenConfig
from kibitz.models import quantized
from kibitz.models.language_model import LanguageModel, Placement
from kibitz.models.layers import recomputable
from kibitz.models.load import load_model, load_tokenizer, load_weights, pick_dtype
from kibitz.models.streamed import Streamed
from kibitz.types import is_gpu

Fetch = Callable[[Tensor], Tensor]
"""Copies a host tensor to the device."""


def require(config: FrozenConfig, role: str) -> None:
    """Raise ValueError, before any weights load, if `config` asks for a quantization that cannot be done here."""
    quantized.require(config.quantize, config.model, role, config.trust_remote_code)


def load_frozen(
    config: FrozenConfig, role: str, device: torch.device, tokenizer: PreTrainedTokenizerBase | None = None
) -> LanguageModel:
    """The model of a section that is only read, quantized and offloaded as the section says."""
    if config.offload is None and config.quantize is None:
        return load_model(config, role, device, tokenizer)
    require(config, role)
    storage = device if config.offload is None else torch.device("cpu")
    options = quantized.loading(config.quantize, pick_dtype(config.dtype, device), storage)
    model = load_weights(config, role, device, **options).eval()
    if options:
        quantized.finish(model)
    tokenizer = tokenizer or load_tokenizer(config, role)
    if config.offload is not None:
        return offloaded(model, tokenizer, role, config.offload, device)
    return LanguageModel(model if options else model.to(device), tokenizer, role)


# ------------------------------------------------------------------ offloaded weights


def offloaded(
    model: Any,
    tokenizer: Any,
    role: str,
    how: Literal["body", "layers"],
    device: torch.device,
    fetch: Fetch | None = None,
) -> LanguageModel:
    """A model on `device` whose weights lie in host memory. `body`: everything but the output head is fetched together,
    for as long as the model is used; `layers`: each decoder layer for its own forward pass. The rest is always resident."""
    head = model.get_output_embeddings()
    resident = set() if head is None else {id(tensor) for tensor in head.parameters()}
    layers = recomputable(model)
    if how == "layers" and not layers:
        raise ValueError(
            f"{role}.offload: {type(model).__name__} has no layers that could be fetched one by one: write offload=body"
        )
    fetch = fetch or partial(Tensor.to, device=device, non_blocking=True)
    modules = [model] if how == "body" else layers
    residencies = [Residency(module, resident, fetch, pinned=is_gpu(device)) for module in modules]
    moved = {id(holder) for residency in residencies for holder, _, _ in residency.host}
    for holder, name in _holders(model):
        if id(holder) not in moved:
            setattr(holder, name, getattr(holder, name).to(device))
    if how == "body":
        return LanguageModel(model, tokenizer, role, placement=Placement(device, residencies[0].resident))
    streamed = Streamed([residency.host for residency in residencies], device) if is_gpu(device) else None
    for number, (residency, layer) in enumerate(zip(residencies, layers, strict=True)):
        fetch_layer, evict_layer = residency.fetch, residency.evict
        if streamed is not None:
            fetch_layer, evict_layer = partial(streamed.fetch, number), partial(streamed.evict, number)
        layer.register_forward_pre_hook(lambda *_, fetch=fetch_layer: fetch())
        layer.register_forward_hook(lambda *_, evict=evict_layer: evict(), always_call=True)
    return LanguageModel(model, tokenizer, role)


class Residency:
    """The tensors of a module, in host memory or on the device. Names that share a tensor share each copy of it."""

    def __init__(self, module: nn.Module, resident: set[int], fetch: Fetch, pinned: bool):
        self.copy, self.num_users = fetch, 0
        shared: dict[tuple, Tensor] = {}
        self.host: list[tuple[Any, str, Tensor]] = []
        for holder, name in _holders(module):
            tensor = getattr(holder, name)
            if id(holder) not in resident:
                self.host.append((holder, name, shared.setdefault(_place(tensor), tensor)))
        if pinned:
            locked = {place: tensor.pin_memory() for place, tensor in shared.items()}
            self.host = [(holder, name, locked[_place(tensor)]) for holder, name, tensor in self.host]
        self.evict()

    @contextmanager
    def resident(self) -> Iterator[None]:
        """A context inside which the tensors are on the device. Contexts nest: a scorer opens one around all
        micro-batches, each of which opens its own."""
        self.num_users += 1
        if self.num_users == 1:
            self.fetch()
        try:
            yield
        finally:
            self.num_users -= 1
            if self.num_users == 0:
                self.evict()

    def fetch(self) -> None:
        """Copy every tensor to the device, once."""
        fetched: dict[tuple, Tensor] = {}
        for holder, name, tensor in self.host:
            if _place(tensor) not in fetched:
                fetched[_place(tensor)] = self.copy(tensor)
            setattr(holder, name, fetched[_place(tensor)])

    def evict(self) -> None:
        """Drop the device copies: the module holds the host tensors again."""
        for holder, name, tensor in self.host:
            setattr(holder, name, tensor)


def _place(tensor: Tensor) -> tuple:
    """The memory that a tensor occupies and how it reads it: equal for two names of one tensor."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _holders(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Each object that holds a tensor of the module, and the attribute that holds it."""
    for part in module.modules():
        tensors: Sequence[Tensor | None] = [*part._parameters.values(), *part._buffers.values()]
        yield from ((tensor, "data") for tensor in tensors if tensor is not None)
        state = getattr(part, "state", None)  # bitsandbytes keeps weights of 8 bits here too, and their scales
        if hasattr(state, "SCB"):
            yield from ((state, name) for name in ("CB", "SCB") if getattr(state, name) is not None)
        scales = getattr(getattr(part, "weight", None), "quant_state", None)  # of 4 bits, and the scales of the scales
        for holder in (scales, getattr(scales, "state2", None)):
            names = ("absmax", "code", "offset")
            yield from ((holder, name) for name in names if isinstance(getattr(holder, name, None), Tensor))
