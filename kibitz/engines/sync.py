"""The student's weights on its servers: carried there after each step, and looked at whether they arrived.

A server that took only a part of them answers as if nothing were wrong: vLLM 0.32 keeps the old output head of a model
with tied embeddings through a reload. So after each sync the server writes to a few prompts, the student scores the same
tokens, and the run stops where the two differ.
"""

import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from kibitz.batching import pack
from kibitz.config.servers import RolloutServerConfig
from kibitz.engines.completions import Held
from kibitz.engines.ipc import IPCTransfer, Preferred
from kibitz.engines.untied import add_head
from kibitz.logprobs import gather_tokens, log_probs
from kibitz.models import LanguageModel
from kibitz.servers import ServerError, served_model
from kibitz.servers.http import Refused, Server
from kibitz.signals import Scored
from kibitz.types import Rollout, is_gpu

ADAPTER = "kibitz"
"""Under which name the student's adapter is loaded."""


class Carrier(Protocol):
    """One way to bring weights to a server, called `way` in metrics. `publish` once for all of them, then `push` to each, to
    several at the same time."""

    @property
    def way(self) -> str: ...

    def meet(self, server: Server) -> None:
        """This is one of the servers."""
        ...

    def publish(self, student: LanguageModel, version: int) -> None: ...

    def push(self, server: Server) -> None: ...

    def model(self, base: str) -> str:
        """The name to ask for, where the server calls its own model `base`."""
        ...


class _Folder:
    """One folder of weights at a time; the version before goes when the new one is whole."""

    def __init__(self, root: Path):
        self.root, self.path = root.resolve(), root.resolve()

    def write(self, student: LanguageModel, version: int) -> None:
        path = self.root / f"version-{version:06d}"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        student.save(path)
        for old in self.root.glob("version-*"):
            if old != path:
                shutil.rmtree(old, ignore_errors=True)
        self.path = path


class LoraFolder:
    """The adapter as a folder that the server loads in place of the last one."""

    way = "lora"

    def __init__(self, root: Path):
        self.folder = _Folder(root)

    def meet(self, server: Server) -> None:
        """All read the same folder."""

    def publish(self, student: LanguageModel, version: int) -> None:
        self.folder.write(student, version)

    def push(self, server: Server) -> None:
        body = {"lora_name": ADAPTER, "lora_path": str(self.folder.path), "load_inplace": True}
        _call(server, "/v1/load_lora_adapter", body, "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")

    def model(self, base: str) -> str:
        return ADAPTER


class ReloadedFolder:
    """The whole model as a safetensors folder that the server reads again, with the output head in it also where it is tied."""

    way = "reload"

    def __init__(self, root: Path):
        self.folder = _Folder(root)

    def meet(self, server: Server) -> None:
        """All read the same folder."""

    def publish(self, student: LanguageModel, version: int) -> None:
        self.folder.write(student, version)
        if _is_tied(student):
            add_head(self.folder.path)

    def push(self, server: Server) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder.path)}}
        _call(server, "/collective_rpc", body, "VLLM_SERVER_DEV_MODE=1")

    def model(self, base: str) -> str:
        return base


def _call(server: Server, path: str, body: dict, needs: str) -> None:
    try:
        server.order(path, body)
    except Refused as error:
        if error.status not in (403, 404, 405):
            raise
        raise ServerError(
            f"{error}; it takes new weights only if it was started with {needs}: see `kibitz serve`"
        ) from None


def carrier(config: RolloutServerConfig, root: Path, student: LanguageModel) -> Carrier:
    """The way that the recipe names. `auto`: an adapter as such; a whole model by CUDA IPC to servers that the run has started on
    the student's own GPU, as long as they take it, else as a folder."""
    adapted = student.adapter is not None
    kind = config.sync if config.sync != "auto" else "lora" if adapted else "reload"
    if kind == "lora" and not adapted:
        raise ValueError("rollout.server.sync: lora carries an adapter, and every weight of this student learns: write "
                         "student.lora, or rollout.server.sync=reload")  # fmt: skip
    if kind != "lora" and adapted:
        raise ValueError(
            f"rollout.server.sync: {kind} carries whole models, and this student is an adapter: write lora"
        )
    if kind == "nccl":
        from kibitz.engines.transfer import NCCLTransfer

        return NCCLTransfer()
    if kind == "ipc":
        if isinstance(student, FSDPModule):
            raise ValueError(
                "rollout.server.sync: ipc shows servers a whole student: write nccl, or parallel.whole_copy=true"
            )
        if not is_gpu(student.device):
            raise ValueError("rollout.server.sync: ipc needs the student on a GPU: write rollout.server.sync=reload")
        return IPCTransfer()
    whole = not isinstance(student, FSDPModule)
    if kind == "reload" and config.sync == "auto" and whole and config.gpus == [student.device.index]:
        return Preferred(IPCTransfer(), ReloadedFolder(root))
    return LoraFolder(root) if kind == "lora" else ReloadedFolder(root)


@dataclass
class _Probed:
    """The last known state of a server: the version that it holds, how often it had been lost by then, and its answers to the
    probe, with the log-probabilities that the student gave them then."""

    version: int
    lost: int
    answers: Sequence[Rollout]
    ours_T: Tensor
    gap: float


class Weights:
    """Tracks which version of the weights every server holds. `ask(server)` lets it answer the probe. `ensure` may run for
    several servers at the same time."""

    def __init__(
        self,
        config: RolloutServerConfig,
        folder: Path,
        student: LanguageModel,
        ask: Callable[[Server], Sequence[Rollout]],
    ):
        self.config, self.student, self.ask = config, student, ask
        self.carrier = carrier(config, Path(config.folder) if config.folder else folder / "weights", student)
        self.version, self._published = 0, False
        self._base: dict[str, str] = {}
        self._held: dict[str, _Probed] = {}
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._seconds: dict[str, float] = defaultdict(float)

    def meet(self, server: Server) -> None:
        """Learn under which name a server knows the student."""
        self._base[server.url], _ = served_model(server, self.config.model, "rollout.server.model")
        self.carrier.meet(server)

    def model(self, server: Server) -> str:
        return self.carrier.model(self._base[server.url])

    def held(self, server: Server) -> Held:
        """How a server with the newest weights is asked."""
        return Held(self.model(server), f"kibitz-{self.version}-{server.lost}")

    def holds(self, server: Server) -> bool:
        """Whether the server has the newest weights, as far as is known here."""
        held = self._held.get(server.url)
        return held is not None and (held.version, held.lost) == (self.version, server.lost)

    def publish(self, student: LanguageModel) -> None:
        self.student = student
        self.version += 1
        with self._timed("publish"):
            self.carrier.publish(student, self.version)
        self._published = True

    def ensure(self, server: Server) -> None:
        """Let the server hold the newest weights: after a sync, and after it was lost, when it may have forgotten them."""
        with self._locks[server.url]:
            if self.holds(server):
                return
            held = self._held.get(server.url)
            with self._lock:
                if not self._published:
                    self.publish(self.student)
            lost = server.lost
            # Gathering a student in parts is a collective, as reading with it is: one of them at a time.
            gathers = isinstance(self.student, FSDPModule) and self.carrier.way == "nccl"
            with self._timed("push"), self._reading if gathers else nullcontext():
                self.carrier.push(server)
            before = held if held is not None and held.lost == lost else None
            with self._timed("probe"):
                self._held[server.url] = self._verified(server, lost, before)

    def forget(self, server: Server) -> None:
        """Do not believe any more that a server holds the weights: `ensure` brings them again."""
        self._held.pop(server.url, None)

    def gap(self, rollouts: Sequence[Rollout], temperature: float = 1.0) -> tuple[float, Tensor]:
        """The mean difference in nats between the log-probabilities that came with rollouts and the student's own, and those."""
        with self._reading:
            ours_T = score(self.student, rollouts, temperature)
        theirs_T = torch.cat([rollout.logp_T for rollout in rollouts])
        return (theirs_T - ours_T).abs().mean().item(), ours_T

    def metrics(self) -> dict[str, Any]:
        """How the weights went to the servers since the last call, and the seconds of each part: of several servers at the same
        time, of the slowest."""
        seconds = {f"{part}_seconds": round(took, 4) for part, took in self._seconds.items()}
        self._seconds.clear()
        why = getattr(self.carrier, "why", "")
        return {"sync": {"way": self.carrier.way, **({"why": why} if why else {}), **seconds}} if seconds else {}

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[part] = max(self._seconds[part], time.perf_counter() - start)

    def _verified(self, server: Server, lost: int, before: _Probed | None) -> _Probed:
        answers = self.ask(server)
        gap, ours_T = self.gap(answers)
        if not gap <= self.config.tolerance:
            raise ServerError(
                f"{server.name} does not hold the student's weights: after the sync their log-probabilities differ by {gap:.3g} "
                f"nats a token, and {self.config.tolerance:g} is allowed. {_tied(self.student)}Compare dtypes, or write another "
                "rollout.server.sync"
            )
        if before is not None and _same(before.answers, answers):
            moved = (ours_T - before.ours_T).abs().max().item()
            if moved > max(1e-4, 2 * before.gap):
                raise ServerError(
                    f"{server.name} kept its old weights: the student's log-probabilities moved by {moved:.3g} nats and the "
                    "server's not at all, though it said that it took the new ones"
                )
        return _Probed(self.version, lost, answers, ours_T, gap)


def _same(before: Sequence[Rollout], after: Sequence[Rollout]) -> bool:
    return all(
        a.response_ids == b.response_ids and torch.allclose(a.logp_T, b.logp_T, rtol=0, atol=1e-6)
        for a, b in zip(before, after, strict=True)
    )


def _is_tied(student: LanguageModel) -> bool:
    return bool(student.model.config.get_text_config().tie_word_embeddings)


def _tied(student: LanguageModel) -> str:
    if not _is_tied(student):
        return ""
    return (
        "The student's embeddings are tied, and vLLM keeps the old output head of such a model through a reload: leave out "
        "rollout.urls, so that kibitz starts it with a head of its own; or write student.lora. "
    )


@torch.no_grad()
def score(model: LanguageModel, rollouts: Sequence[Rollout], temperature: float = 1.0) -> Tensor:
    """The model's own log-probability of each response token, `[T]` over all rollouts; of its logits divided by `temperature`."""
    batch = pack([Scored(rollout, rollout.weight_T()) for rollout in rollouts], model.device)
    (logp_T,) = model(
        batch,
        lambda hidden_TD, head: (
            gather_tokens(log_probs(head(hidden_TD).float() / temperature), batch.tokens.token_T),
        ),
    )
    return logp_T.cpu()
