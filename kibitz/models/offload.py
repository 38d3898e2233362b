"""Models that are only read, kept small: weights of 8 bits, and weights that are on the device only while they are needed.

Nothing that is read changes, so that weights which travel are never carried back: what came is dropped, and the module holds
the copy at home again. At home means in the CPU's memory, page-locked where the device is a GPU.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from kibitz.config import FrozenConfig
from kibitz.models import lora
from kibitz.models.language_model import LanguageModel
from kibitz.models.load import load_model, load_tokenizer, load_weights

Fetch = Callable[[Tensor], Tensor]


def require(config: FrozenConfig, role: str) -> None:
    """Raise ValueError, with what to do, before any weights load."""
    if config.quantize is None:
        return
    if missing := [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"{role}.quantize: int8 needs {' and '.join(missing)}: pip install 'kibitz[bitsandbytes]', or leave it out"
        )
    if lora.is_adapter(config.model):
        raise ValueError(
            f"{role}.quantize: {config.model} is an adapter, and a base of 8 bits takes no update: write a whole folder by "
            "`kibitz export FOLDER --merge --output NEW` and name that"
        )


def load_frozen(
    config: FrozenConfig, role: str, device: torch.device, tokenizer: PreTrainedTokenizerBase | None = None
) -> LanguageModel:
    """As `load_model`, as small as the recipe wants it."""
    if config.offload is None and config.quantize is None:
        return load_model(config, role, device, tokenizer)
    require(config, role)
    home = device if config.offload is None else torch.device("cpu")
    options: dict[str, Any] = {}
    if config.quantize == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for each product
        options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": home}}
    model = load_weights(config, role, device, **options).eval()
    if config.quantize is not None and home.type == "cpu":
        for tensor in [
            *model.parameters(),
            *model.buffers(),
        ]:  # what was not rounded is still a part of the mapped file
            tensor.data = tensor.data if tensor.dtype == torch.int8 else tensor.data.clone()
    tokenizer = tokenizer or load_tokenizer(config, role)
    if config.offload is not None:
        return offloaded(model, tokenizer, role, config.offload, device)
    return LanguageModel(model if options else model.to(device), tokenizer, role)


# ------------------------------------------------------------------ weights that travel


def offloaded(
    model: Any,
    tokenizer: Any,
    role: str,
    how: Literal["body", "layers"],
    device: torch.device,
    fetch: Fetch | None = None,
) -> LanguageModel:
    """A model whose weights come to `device` for as long as they are needed: all but the output head together, or of each
    decoder layer apart. What does not travel is there for good; `fetch` brings what does."""
    head = model.get_output_embeddings()
    stays = set() if head is None else {id(tensor) for tensor in head.parameters()}
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if how == "layers" and not layers:
        raise ValueError(
            f"{role}.offload: {type(model).__name__} has no layers that could be taken one by one: write offload=body"
        )
    fetch = fetch or partial(Tensor.to, device=device, non_blocking=True)
    modules = [model] if how == "body" else layers
    residencies = [Residency(module, stays, fetch, pinned=device.type == "cuda") for module in modules]
    travelling = {id(holder) for residency in residencies for holder, _, _ in residency.homes}
    for holder, name in _holders(model):
        if id(holder) not in travelling:
            setattr(holder, name, getattr(holder, name).to(device))
    if how == "layers":
        for residency, layer in zip(residencies, layers, strict=True):
            layer.register_forward_pre_hook(lambda *_, residency=residency: residency.fetch())
            layer.register_forward_hook(lambda *_, residency=residency: residency.evict(), always_call=True)
        return LanguageModel(model, tokenizer, role)
    with residencies[0].loaded():
        made = LanguageModel(model, tokenizer, role)  # tries its head, for which all must be in one place
    made.compute_device, made.loaded = device, residencies[0].loaded
    return made


class Residency:
    """The tensors of a module on their way to a device and back."""

    def __init__(self, module: nn.Module, stays: set[int], fetch: Fetch, pinned: bool):
        self.copy, self.num_visits = fetch, 0
        homes: dict[tuple, Tensor] = {}
        self.homes: list[tuple[Any, str, Tensor]] = []
        for holder, name in _holders(module):
            tensor = getattr(holder, name)
            if id(holder) not in stays:
                home = homes.setdefault(_place(tensor), tensor)
                self.homes.append((holder, name, home))
        if pinned:
            locked = {place: home.pin_memory() for place, home in homes.items()}
            self.homes = [(holder, name, locked[_place(home)]) for holder, name, home in self.homes]
        self.evict()

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Visits may be nested: a scorer holds the model for all micro-batches, each of which asks for it again."""
        self.num_visits += 1
        if self.num_visits == 1:
            self.fetch()
        try:
            yield
        finally:
            self.num_visits -= 1
            if self.num_visits == 0:
                self.evict()

    def fetch(self) -> None:
        fetched: dict[tuple, Tensor] = {}
        for holder, name, home in self.homes:
            if _place(home) not in fetched:
                fetched[_place(home)] = self.copy(home)
            setattr(holder, name, fetched[_place(home)])

    def evict(self) -> None:
        for holder, name, home in self.homes:
            setattr(holder, name, home)


def _place(tensor: Tensor) -> tuple:
    """Where a tensor lies: the same for two names of one."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _holders(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Who holds the numbers of a module, and by which attribute."""
    for part in module.modules():
        tensors: Sequence[Tensor | None] = [*part._parameters.values(), *part._buffers.values()]
        yield from ((tensor, "data") for tensor in tensors if tensor is not None)
        state = getattr(part, "state", None)  # of bitsandbytes: the weights once more, and their scales
        if hasattr(state, "SCB"):
            yield from ((state, name) for name in ("CB", "SCB") if getattr(state, name) is not None)
