"""vLLM's own weight transfer: the trainer broadcasts to the server's GPUs over NCCL, and no file is written.

Written by vLLM's documentation ("Weight Transfer", 0.32 and 0.33) and not run yet: it needs GPUs on both sides, and vLLM
importable beside the trainer, whose half of the protocol it brings. Each server is a group of its own.
"""

import importlib
import socket
from typing import Any
from urllib.parse import urlsplit

import torch

from kibitz.models import LanguageModel
from kibitz.servers import ServerError
from kibitz.servers.http import Server

HOW = 'start the server with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config \'{"backend": "nccl"}\''


class _Routes:
    """The control routes of one server, as vLLM's trainer engine wants to call them."""

    def __init__(self, server: Server):
        self.server = server

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.server.order("/init_weight_transfer_engine", {"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        self.server.order("/shutdown_weight_transfer_engine", {})

    def start_weight_update(self) -> None:
        self.server.order("/start_weight_update", {})

    def update_weights(self, update_info: Any) -> None:
        self.server.order("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.server.order("/finish_weight_update", {} if weight_version is None else {"weight_version": weight_version})


class NCCLTransfer:
    """A `Carrier` that keeps a channel to each server open, and opens a new one to a server that was lost."""

    way = "nccl"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError(
                "rollout.server.sync: nccl needs a GPU on the trainer's side: write rollout.server.sync=reload"
            )
        try:
            self.vllm: Any = importlib.import_module("vllm.distributed.weight_transfer")
            self.nccl: Any = importlib.import_module("vllm.distributed.weight_transfer.nccl_engine")
        except ImportError:
            raise ValueError(
                "rollout.server.sync: nccl needs vLLM 0.29 or newer installed beside kibitz, whose trainer half it uses: "
                "install it, or write rollout.server.sync=reload"
            ) from None
        self.student: LanguageModel | None = None
        self._channels: dict[str, tuple[int, Any]] = {}

    def publish(self, student: LanguageModel, version: int) -> None:
        self.student = student

    def push(self, server: Server) -> None:
        lost, channel = self._channels.get(server.url, (-1, None))
        if channel is None or lost != server.lost:
            self._channels[server.url] = (server.lost, channel := self._open(server))
        channel.send_weights()

    def model(self, base: str) -> str:
        return base

    def _open(self, server: Server) -> Any:
        assert self.student is not None, "nothing is published yet"
        answer = server.ask("/get_world_size")
        workers = answer.get("world_size") if isinstance(answer, dict) else None
        if not isinstance(workers, int) or workers < 1:
            raise ServerError(f"{server.name} does not say how many GPUs it has: {HOW}")
        address, port = _free_port(urlsplit(server.url).hostname or "localhost")
        info = self.nccl.NCCLTrainerInitInfo(
            rank=0, master_address=address, master_port=port, world_size=1 + workers, packed=True
        )
        source = self.vllm.ModuleSource(self.student.model)
        return self.vllm.WeightTransferTrainerFactory.trainer_init(info, client=_Routes(server), source=source)


def _free_port(towards: str) -> tuple[str, int]:
    """This machine's address as a server sees it, and a port to meet at."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))  # sends nothing: it only picks the way
        address = probe.getsockname()[0]
    with socket.socket() as holder:
        holder.bind((address, 0))
        return address, holder.getsockname()[1]
