"""Weights by CUDA IPC: a server on the trainer's own GPU reads the student's parameters where they lie. Nothing is gathered,
copied or written; a request carries handles only.

The server's half is vLLM's `ipc` weight transfer (0.32 and 0.33). Its trainer's half wants vLLM in the trainer's process, where
kibitz need not have it, and is a few lines: they are written here, to the wire format of `IPCWeightTransferUpdateInfo`. What is
sent was read by vLLM's own classes on a CPU, with handles that stand for a GPU's; on a GPU it has not been run. vLLM's CPU server
agrees to the first two requests and fails at the handles, after which it takes the folder.
"""

import base64
import logging
import pickle
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kibitz.engines.transfer import Weighed
from kibitz.models import LanguageModel
from kibitz.servers import ServerError
from kibitz.servers.commands import IPC, transfer
from kibitz.servers.http import Passing, Refused, Server

log = logging.getLogger(__name__)

HOW = f"{' '.join(f'{name}={value}' for name, value in IPC.items())} and {' '.join(transfer('ipc'))}"

Handle = tuple[str, tuple[Any, ...]]
"""The UUID of a GPU, and what another process rebuilds the tensor from, as `torch.multiprocessing` has it."""


def handle_of(tensor: Tensor) -> Handle:
    """A new handle of a tensor on a GPU, for one reader: each has a count of its own. The tensor must live until it is read."""
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(tensor)
    return str(torch.cuda.get_device_properties(tensor.device).uuid), arguments


class IPCTransfer:
    """A `Carrier` whose servers read the student's own parameters. `handle` makes the handle of one."""

    way = "ipc"

    def __init__(self, handle: Callable[[Tensor], Handle] = handle_of):
        self.handle = handle
        self.student: LanguageModel | None = None
        self._met: dict[str, int] = {}

    def meet(self, server: Server) -> None:
        try:
            server.order("/init_weight_transfer_engine", {"init_info": {"packed": False}})
        except Refused as error:
            raise Refused(f"{error}; weights by CUDA IPC need a server started with {HOW}", error.status) from None
        self._met[server.url] = server.lost

    def publish(self, student: LanguageModel, version: int) -> None:
        self.student = student

    def push(self, server: Server) -> None:
        assert self.student is not None, "nothing is published yet"
        if self._met.get(server.url) != server.lost:
            self.meet(server)  # it may have been started anew
        if self.student.device.type == "cuda":
            torch.cuda.synchronize(self.student.device)  # the step's last kernels have written
        tensors = [(name, tensor.contiguous()) for name, tensor in Weighed(self.student, _named)]
        handles = [self.handle(tensor) for _, tensor in tensors]
        update = {
            "names": [name for name, _ in tensors],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            "shapes": [list(tensor.shape) for _, tensor in tensors],
            "ipc_handles_pickled": base64.b64encode(pickle.dumps([dict([handle]) for handle in handles])).decode(),
        }
        server.order("/start_weight_update", {})
        server.order("/update_weights", {"update_info": update})
        server.order("/finish_weight_update", {})
        if self.student.device.type == "cuda":
            torch.cuda.ipc_collect()

    def model(self, base: str) -> str:
        return base


def _named(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return name


class Preferred:
    """A `Carrier` that tries the first of two ways, and goes over to the second for good where a server that is well does not
    take it. `why` says what it said."""

    def __init__(self, first: Any, second: Any):
        self.first, self.second = first, second
        self.why = ""
        self._newest: tuple[LanguageModel, int] | None = None
        self._lock = threading.Lock()

    @property
    def way(self) -> str:
        return self.second.way if self.why else self.first.way

    def meet(self, server: Server) -> None:
        if not self.why:
            self._attempt(self.first.meet, server)
        self.second.meet(server)

    def publish(self, student: LanguageModel, version: int) -> None:
        self._newest = student, version
        (self.second if self.why else self.first).publish(student, version)

    def push(self, server: Server) -> None:
        if self.why or not self._attempt(self.first.push, server):
            self.second.push(server)

    def model(self, base: str) -> str:
        return (self.second if self.why else self.first).model(base)

    def _attempt(self, work: Callable[[Server], None], server: Server) -> bool:
        """Whether it went well. A server that is down is no reason to go over to another way."""
        try:
            work(server)
        except (Passing, ServerError, RuntimeError, ValueError) as error:
            if isinstance(error, Passing):
                try:
                    server.order("/health")
                except Passing:
                    raise error from None
            self._give_up(str(error))
            return False
        return True

    def _give_up(self, why: str) -> None:
        with self._lock:
            if self.why:
                return
            if self._newest is not None:
                self.second.publish(*self._newest)
            self.why = why
        log.warning("%s; weights go by %s from now on", why, self.second.way)
