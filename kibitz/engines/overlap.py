"""Servers write while the student learns: each process has its share of a step's prompts written, in a thread of its own.

That thread sends requests and does nothing else. All that processes do together (to bring weights to a server and look whether
they arrived, to compare what was written with a student of which each process may hold a part, to agree on what went wrong)
happens in `begin` and `settle`, which all processes call in the same order, outside of that thread. So a server that fails is
asked no more by whoever notices, the others do its work, and `settle` brings the weights to it again and has written what is
missing.
"""

import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any

from kibitz.config import RolloutConfig
from kibitz.engines import Engine, OnReady, Unfinished, nobody_waits
from kibitz.engines.completions import Completions, Held
from kibitz.engines.vllm import TRIES, VLLMEngine
from kibitz.ledger import Count, uncounted
from kibitz.models import LanguageModel
from kibitz.parallel.ranks import Ranks
from kibitz.servers import ServerError
from kibitz.servers.busy import Busy
from kibitz.servers.http import Server, Servers
from kibitz.types import Prompt, Rollout, Sampling


@dataclass(frozen=True)
class _Told:
    """What a process tells the first one. `last`: each server's last rollouts, and when they came, in seconds since all were told
    whom to ask, because the clocks of machines differ. `lost`: the servers that it could not reach. `missing`: whether
    anything is. The rest goes into the metrics."""

    last: Mapping[str, tuple[float, Sequence[Rollout]]]
    lost: Collection[str]
    missing: bool
    sampling: Sampling
    spans: Sequence[Sequence[float]]
    received: int
    num_tokens: int


class Overlapped:
    """An `Overlapping` engine. `engine` writes outside of the background, for an evaluation for example, and takes new weights;
    `first` is that of the first process, which alone brings weights to servers, and empty in the others."""

    def __init__(
        self, engine: Engine, first: Sequence[VLLMEngine], config: RolloutConfig, student: LanguageModel, ranks: Ranks
    ):
        self.engine, self.first, self.student, self.ranks = engine, first, student, ranks
        share = {"in_flight": ceil(config.server.in_flight / ranks.size)}
        self.servers = Servers(config.server.model_copy(update=share), config.urls, "student")
        self.completions = Completions(student.vocab_size)
        self._here = threading.local()
        # Of the servers to ask: how, and how often each had been lost by then.
        self._held: dict[str, tuple[Held, int]] = {}
        # What is written: by which server, by the prompt's key.
        self._kept: dict[str, tuple[str, list[Rollout]]] = {}
        self._last: dict[str, tuple[float, Sequence[Rollout]]] = {}
        self._count: Count = uncounted
        self._since = 0.0
        self._missing, self._sampling = False, Sampling(max_tokens=1)
        self._busy, self._num_tokens, self._lock = Busy(), 0, threading.Lock()
        self._strange, self._failing = 0, 0.0  # times that weights were others; since when something has been missing

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_ready: OnReady = nobody_waits, count: Count = uncounted
    ) -> list[Rollout]:
        if not getattr(self._here, "is_background", False):
            return self.engine.generate(prompts, sampling, on_ready, count)
        self._sampling, self._count = sampling, count
        wanted = [prompt for prompt in prompts if prompt.key not in self._kept]
        with self._busy.working():
            jobs = [
                self.servers.submit_among(
                    self._usable, lambda server, one=prompt: self._write(server, one, sampling, on_ready)
                )
                for prompt in wanted
            ]
            written = [rollouts for rollouts in self.servers.gather(jobs) if rollouts is not None]
        self._num_tokens += sum(rollout.num_tokens for rollouts in written for rollout in rollouts)
        self._missing = len(written) < len(wanted)
        if self._missing:
            raise Unfinished
        return [rollout for prompt in prompts for rollout in self._kept[prompt.key][1]]

    def sync(self, student: LanguageModel) -> None:
        self.engine.sync(student)

    def metrics(self) -> dict[str, Any]:
        return self.engine.metrics()

    def close(self) -> None:
        self.servers.close()
        self.engine.close()

    # -------------------------------------------------------------- beside the work of this process

    def begin(self) -> None:
        self._kept.clear()
        self._last.clear()
        self._missing, self._strange, self._failing = False, 0, 0.0
        self._ask(self.ranks.first(lambda: self.first[0].holding()))

    @contextmanager
    def in_background(self) -> Iterator[None]:
        self._here.is_background = True
        try:
            yield
        finally:
            self._here.is_background = False

    def settle(self) -> bool:
        told = self.ranks.gather(self._tell())
        whole, strangers, held = self.ranks.first(lambda: self._judged(told))
        self._kept = {key: kept for key, kept in self._kept.items() if kept[0] not in strangers}
        self._last.clear()
        self._ask(held)
        if whole:  # what was thrown away is not counted
            self._count(self.student, [rollout for _, rollouts in self._kept.values() for rollout in rollouts])
        return whole

    def _ask(self, held: Mapping[str, Held]) -> None:
        """Ask these servers from now on."""
        self._since = time.monotonic()
        self._held = {one.url: (held[one.url], one.lost) for one in self.servers.servers if one.url in held}

    def _usable(self, server: Server) -> bool:
        held = self._held.get(server.url)
        return held is not None and server.lost == held[1] and not server.gone

    def _write(self, server: Server, prompt: Prompt, sampling: Sampling, on_ready: OnReady) -> list[Rollout]:
        rollouts = self.completions.write(server, self._held[server.url][0], prompt, sampling)
        with self._lock:
            self._kept[prompt.key] = server.url, rollouts
            self._last[server.url] = time.monotonic() - self._since, rollouts[-1:]
        on_ready(rollouts)
        return rollouts

    def _tell(self) -> _Told:
        num_tokens, self._num_tokens = self._num_tokens, 0
        lost = [one.url for one in self.servers.servers if one.url in self._held and not self._usable(one)]
        spans, received = self._busy.take(), self.servers.take_received()
        return _Told(dict(self._last), lost, self._missing, self._sampling, spans, received, num_tokens)

    def _judged(self, told: Sequence[_Told]) -> tuple[bool, set[str], dict[str, Held]]:
        """Whether all is written by the student's weights; else what must be written again, by its servers, and who is asked.
        Called in the first process."""
        (first,) = self.first
        for one in told:
            first.enter(one.spans, one.received, one.num_tokens)
        first.lose({url for one in told for url in one.lost})
        newest: dict[str, tuple[float, Sequence[Rollout]]] = {}
        for url, last in (entry for one in told for entry in one.last.items()):
            newest[url] = max(newest.get(url, last), last, key=lambda entry: entry[0])
        strangers = first.strangers({url: rollouts for url, (_, rollouts) in newest.items()}, told[0].sampling)
        if not strangers and not any(one.missing for one in told):
            return True, strangers, {}
        self._strange += bool(strangers)
        if self._strange == TRIES:
            raise first.others_weights()
        self._failing = self._failing or time.monotonic()
        if time.monotonic() - self._failing > self.servers.config.patience:
            names = ", ".join(server.name for server in self.servers.servers)
            raise ServerError(
                f"{names} did not stay up until all rollouts of a step were written, for {self.servers.config.patience:g} "
                "seconds: look into the server's log, and continue with --resume"
            )
        return False, strangers, first.holding()
