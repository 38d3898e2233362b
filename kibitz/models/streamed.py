"""Offloaded layers on a GPU: while one is computed, the next is copied by a second stream into the other of two buffers.

The buffers are as large as the largest layer and exist during a forward pass only. They are allocated in the stream that
computes, which waits for each copy before it reads; a copy waits until the layer that was in its buffer has been computed. So
never more than two layers are on the device, however far the host runs ahead, and the allocator may have the memory back at once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ALIGNED = 256
"""Bytes at whose multiples a tensor begins in a buffer, as torch's allocator has it."""

Host = Sequence[tuple[Any, str, Tensor]]
"""The objects that hold a layer's tensors, by which attribute, and the tensors in host memory."""


class Streamed:
    """The layers of a model, which are computed in order."""

    def __init__(self, layers: Sequence[Host], device: torch.device):
        self.layers, self.device = layers, device
        self.module = torch.get_device_module(device)
        self.copies = self.module.Stream(device)
        self.places = [_places(layer) for layer in layers]
        self.size = max(size for _, size in self.places)
        self.buffers: list[Tensor] = []
        self.inside = [-1, -1]
        """The layer in each buffer, or on its way there."""
        self.arrived: list[Any] = [None, None]
        self.computed: list[Any] = [None, None]

    def fetch(self, number: int) -> None:
        """Let a layer hold its tensors on the device, and send the next one on its way."""
        if not self.buffers:
            self.buffers = [torch.empty(self.size, dtype=torch.uint8, device=self.device) for _ in range(2)]
            self.inside, self.computed = [-1, -1], [None, None]
            self.copies.wait_stream(self._stream())  # which may still use what was at the same addresses
        if self.inside[number % 2] != number:
            self._send(number)
        self._stream().wait_event(self.arrived[number % 2])
        for (holder, name, tensor), (start, end) in zip(self.layers[number], self.places[number][0], strict=True):
            setattr(holder, name, _view(self.buffers[number % 2][start:end], tensor))
        if number + 1 < len(self.layers):
            self._send(number + 1)

    def evict(self, number: int) -> None:
        """Let a layer hold its host tensors again."""
        for holder, name, tensor in self.layers[number]:
            setattr(holder, name, tensor)
        self.computed[number % 2] = self._stream().record_event()
        if number + 1 == len(self.layers):
            self.buffers = []

    def _send(self, number: int) -> None:
        buffer, computed = self.buffers[number % 2], self.computed[number % 2]
        if computed is not None:
            self.copies.wait_event(computed)
        with self.module.stream(self.copies):
            sent = set()
            for (_, _, tensor), (start, end) in zip(self.layers[number], self.places[number][0], strict=True):
                if start not in sent:
                    _view(buffer[start:end], tensor).copy_(tensor, non_blocking=True)
                    sent.add(start)
        self.arrived[number % 2], self.inside[number % 2] = self.copies.record_event(), number

    def _stream(self) -> Any:
        """The stream that computes."""
        return self.module.current_stream(self.device)


def _places(layer: Host) -> tuple[list[tuple[int, int]], int]:
    """Where in a buffer each tensor begins and ends, names that share one in the same place; and the bytes of all."""
    places, found, size = {}, [], 0
    for _, _, tensor in layer:
        if id(tensor) not in places:
            places[id(tensor)] = size, size + tensor.nbytes
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        found.append(places[id(tensor)])
    return found, size


def _view(memory_N: Tensor, like: Tensor) -> Tensor:
    return memory_N.view(like.dtype).view(like.shape)
