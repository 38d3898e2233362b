"""vLLM's own weight transfer: the trainer broadcasts to the GPUs of all servers over one NCCL group, and no file is written.

Written by vLLM's source and documentation ("Weight Transfer", 0.32 and 0.33). What goes over HTTP, to whom and in which order,
and what is sent, by two processes with a part of the student each, is tested against servers of our own; the broadcast itself has
not been run: it needs GPUs on both sides, and vLLM importable beside the trainer, whose half of the protocol it brings.
"""

import importlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import torch

from kibitz.engines.untied import HEAD
from kibitz.models import LanguageModel
from kibitz.servers import ServerError
from kibitz.servers.http import Server

HOW = 'start the server with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config \'{"backend": "nccl"}\''


class Routes:
    """The control routes of several servers as those of one, as vLLM's trainer engine wants to call them: each call goes to all
    at the same time, because their workers meet inside it. `sizes` are their numbers of workers: the ranks of the second server's
    come behind those of the first."""

    def __init__(self, servers: Sequence[Server], sizes: Sequence[int]):
        self.servers = servers
        self.offsets = [sum(sizes[:place]) for place in range(len(sizes))]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        first = init_info["rank_offset"]
        self._all(
            "/init_weight_transfer_engine", lambda offset: {"init_info": init_info | {"rank_offset": first + offset}}
        )

    def shutdown_weight_transfer_engine(self) -> None:
        self._all("/shutdown_weight_transfer_engine", lambda _: {})

    def start_weight_update(self) -> None:
        self._all("/start_weight_update", lambda _: {})

    def update_weights(self, update_info: Any) -> None:
        self._all("/update_weights", lambda _: {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all(
            "/finish_weight_update", lambda _: {} if weight_version is None else {"weight_version": weight_version}
        )

    def _all(self, path: str, body: Callable[[int], dict[str, Any]]) -> None:
        with ThreadPoolExecutor(len(self.servers)) as threads:
            jobs = [
                threads.submit(server.order, path, body(offset))
                for server, offset in zip(self.servers, self.offsets, strict=True)
            ]
        for job in jobs:
            job.result()


class Weighed:
    """The student's parameters under the names of its files, as vLLM's `WeightSource` wants them: `metadata` says what iteration
    yields. The output head of a tied model comes last, under a name of its own. `meta(name, dtype, shape)` makes an entry. Of a
    student in parts each is gathered by all processes when its turn comes, so that no whole copy ever exists."""

    def __init__(self, student: LanguageModel, meta: Callable[[str, torch.dtype, tuple[int, ...]], Any]):
        self.student, self.meta = student, meta

    def metadata(self) -> list[Any]:
        model = self.student.model
        named = {name: (parameter.dtype, tuple(parameter.shape)) for name, parameter in model.named_parameters()}
        if self._tied:
            weight = model.get_output_embeddings().weight
            named[HEAD] = weight.dtype, tuple(weight.shape)
        return [self.meta(name, *about) for name, about in named.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        model, head = self.student.model, None
        shared = next(
            (name for name, one in model.named_parameters() if one is model.get_output_embeddings().weight), ""
        )
        for name, weight in self.student.weights():
            if name == shared and self._tied:
                head = weight
            yield name, weight
        if head is not None:
            yield HEAD, head

    def held_names(self) -> None:
        """All of them."""

    @property
    def _tied(self) -> bool:
        return all(name != HEAD for name, _ in self.student.model.named_parameters())


class NCCLTransfer:
    """A `Carrier` that keeps one channel to all servers open. A server that was lost and is back makes a new channel with those
    that the old one had."""

    way = "nccl"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError(
                "rollout.server.sync: nccl needs a GPU on the trainer's side: write rollout.server.sync=reload"
            )
        try:
            self.vllm: Any = importlib.import_module("vllm.distributed.weight_transfer")
            self.nccl: Any = importlib.import_module("vllm.distributed.weight_transfer.nccl_engine")
            self.base: Any = importlib.import_module("vllm.distributed.weight_transfer.base")
        except ImportError:
            raise ValueError(
                "rollout.server.sync: nccl needs vLLM 0.29 or newer installed beside kibitz, whose trainer half it uses: "
                "install it, or write rollout.server.sync=reload"
            ) from None
        self.student: LanguageModel | None = None
        self.version = 0
        self.group = Group(self._open)

    def meet(self, server: Server) -> None:
        self.group.join(server)

    def publish(self, student: LanguageModel, version: int) -> None:
        self.student, self.version = student, version

    def push(self, server: Server) -> None:
        self.group.send(server, self.version)

    def model(self, base: str) -> str:
        return base

    def _open(self, servers: Sequence[Server]) -> Callable[[], None]:
        assert self.student is not None, "nothing is published yet"
        sizes = [num_workers(server) for server in servers]
        address, port = _free_port(urlsplit(servers[0].url).hostname or "127.0.0.1")
        info = self.nccl.NCCLTrainerInitInfo(
            rank=0, master_address=address, master_port=port, world_size=1 + sum(sizes), packed=True
        )
        source = Weighed(self.student, self.base.ParamMeta)
        client = Routes(servers, sizes)
        return self.vllm.WeightTransferTrainerFactory.trainer_init(info, client=client, source=source).send_weights


class Group:
    """Which servers have been sent which version over one channel. `open(servers)` makes a channel and returns what sends."""

    def __init__(self, open: Callable[[Sequence[Server]], Callable[[], None]]):  # what it does
        self.open = open
        self._members: list[Server] = []
        self._channel: tuple[list[tuple[str, int]], Callable[[], None]] | None = None
        self._sent: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def join(self, server: Server) -> None:
        with self._lock:
            if server not in self._members:
                self._members.append(server)

    def send(self, server: Server, version: int) -> None:
        """Let this server have the version: with all others that are up, in one broadcast; the first that asks sends for all."""
        with self._lock:
            if self._sent.get(server.url) == (version, server.lost):
                return
            up = [one for one in self._members if one is server or one.down_until <= time.monotonic()]
            known = [(one.url, one.lost) for one in up]
            if self._channel is None or self._channel[0] != known:
                self._channel = known, self.open(up)
            try:
                self._channel[1]()
            except BaseException:
                self._channel = None  # of a broadcast that broke off nothing is usable
                raise
            self._sent |= {url: (version, lost) for url, lost in known}


def num_workers(server: Server) -> int:
    answer = server.ask("/get_world_size")
    workers = answer.get("world_size") if isinstance(answer, dict) else None
    if not isinstance(workers, int) or workers < 1:
        raise ServerError(f"{server.name} does not say how many GPUs it has: {HOW}")
    return workers


def _free_port(towards: str) -> tuple[str, int]:
    """This machine's address as a server sees it, and a port to meet at."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))  # sends nothing: it only picks the way
        address = probe.getsockname()[0]
    with socket.socket() as holder:
        holder.bind((address, 0))
        return address, holder.getsockname()[1]
