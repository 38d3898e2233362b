"""Rollouts from vLLM servers of the student, from one or from several in turn, and the student's weights on them."""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from kibitz.config import RolloutConfig
from kibitz.engines import OnReady, nobody_waits
from kibitz.engines.completions import Completions, Held
from kibitz.engines.sync import Weights
from kibitz.ledger import Count, uncounted
from kibitz.models import LanguageModel
from kibitz.servers import ServerError
from kibitz.servers.busy import Busy
from kibitz.servers.http import Server, Servers
from kibitz.servers.sleep import Sleepers
from kibitz.types import Prompt, Rollout, Sampling

log = logging.getLogger(__name__)

TRIES = 3  # to get rollouts of the student's own weights
STRANGE = 4.0
"""A single rollout may differ from the student by so many times what the mean over the probe may."""


class VLLMEngine:
    """`probe` are the prompts on which servers and student are compared after each sync. The rollouts of a prompt are ready
    together, and are said so from another thread: a teacher need not wait for the slowest.

    With `server.sleep` the servers give their memory back when all is written, and are woken before new weights or prompts come.
    At the end of each `generate` one rollout of each server is compared with the student: a server that somebody started again
    meanwhile holds other weights, and what it wrote is written again."""

    def __init__(self, student: LanguageModel, config: RolloutConfig, folder: Path, probe: Sequence[Prompt]):
        self.student, self.config = student, config.server
        self.completions = Completions(student.vocab_size)
        self._busy, self._num_tokens, self._received = Busy(), 0, 0
        self.weights = Weights(config.server, folder, student, lambda server: self._answers(server, probe))
        self.servers = Servers(config.server, config.urls, "student", self._ready)
        self.sleepers = Sleepers(self.servers) if config.server.sleep is True else None
        try:
            self.servers.each(self.weights.meet)
        except BaseException:
            self.close()
            raise

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_ready: OnReady = nobody_waits, count: Count = uncounted
    ) -> list[Rollout]:
        if sampling.epsilon:
            raise ValueError("vLLM draws no tokens uniformly: write rollout.engine=torch, or drop rollout.epsilon")
        found: dict[int, list[Rollout]] = {}
        for _ in range(TRIES):
            missing = [place for place in range(len(prompts)) if place not in found]
            if not missing:
                break
            with self._busy.working():
                found |= self._believed(missing, prompts, sampling, on_ready)
        if self.sleepers is not None:
            self.sleepers.sleep()
        if len(found) < len(prompts):
            raise self.others_weights()
        written = [rollout for place in range(len(prompts)) for rollout in found[place]]
        self._num_tokens += sum(rollout.num_tokens for rollout in written)
        count(self.student, written)
        return written

    def sync(self, student: LanguageModel) -> None:
        """Hand the new weights to every server that is up, to all at the same time, and look whether they arrived."""
        self.student = student
        self.weights.publish(student)
        self.servers.reach(self._ready)

    def metrics(self) -> dict[str, Any]:
        """How the weights went to the servers, when these wrote, and the bytes of their answers for each token of a response."""
        num, self._num_tokens = self._num_tokens, 0
        received, self._received = self.servers.take_received() + self._received, 0
        size = {"rollout_bytes_per_token": received / num} if num else {}
        return self.weights.metrics() | size | {"student_sampling_busy": self._busy.take()}

    def close(self) -> None:
        self.servers.close()

    def _ready(self, server: Server) -> None:
        if self.sleepers is not None:
            self.sleepers.wake(server)
        self.weights.ensure(server)

    def _believed(
        self, places: Sequence[int], prompts: Sequence[Prompt], sampling: Sampling, on_ready: OnReady
    ) -> dict[int, list[Rollout]]:
        """The rollouts of some prompts, but for those of servers that turn out not to have had the student's weights."""
        jobs = [
            self.servers.submit(
                lambda server, one=prompts[place]: (server, self._write(server, one, sampling, on_ready))
            )
            for place in places
        ]
        answers = self.servers.gather(jobs)
        strangers = self.strangers({server.url: rollouts[-1:] for server, rollouts in answers}, sampling)
        return {
            place: rollouts
            for place, (server, rollouts) in zip(places, answers, strict=True)
            if server.url not in strangers
        }

    def strangers(self, last: Mapping[str, Sequence[Rollout]], sampling: Sampling) -> set[str]:
        """The servers, by their addresses, of which the `last` rollouts did not come from the student's weights as they are now:
        they are believed no more."""
        of = {server.url: server for server in self.servers.servers}
        return {url for url, rollouts in last.items() if not self._is_students(of[url], rollouts, sampling)}

    def others_weights(self) -> ServerError:
        """Say that servers keep on writing with other weights than the student's."""
        names = ", ".join(server.name for server in self.servers.servers)
        return ServerError(
            f"what {names} wrote did not come from the student's weights, {TRIES} times in a row, though the probe after "
            "the sync did: look whether somebody else loads weights there, and continue with --resume"
        )

    def holding(self) -> dict[str, Held]:
        """How the servers that hold the newest weights are asked, by their addresses. Without any, wait for one, as long as for
        any answer."""
        servers = self.servers.servers
        if not any(map(self.weights.holds, servers)):
            self.servers.reach(self._ready)
        return {one.url: self.weights.held(one) for one in servers if self.weights.holds(one)}

    def lose(self, urls: Collection[str]) -> None:
        """Others could not reach these servers: what they held may be gone."""
        for server in self.servers.servers:
            if server.url in urls:
                self.weights.forget(server)

    def enter(self, spans: Sequence[Sequence[float]], received: int, num_tokens: int) -> None:
        """Count in the metrics what others had the servers write: when, in how many bytes, and how many tokens."""
        self._busy.add(spans)
        self._received += received
        self._num_tokens += num_tokens

    def _is_students(self, server: Server, rollouts: Sequence[Rollout], sampling: Sampling) -> bool:
        """Whether the student gives a server's tokens the same log-probabilities. Of a truncated distribution it does not know
        them, and believes."""
        if sampling.greedy or sampling.top_p < 1 or sampling.top_k > 0:
            return True
        gap, _ = self.weights.gap(rollouts, sampling.temperature)
        if gap <= STRANGE * self.config.tolerance:
            return True
        log.warning(
            "%s does not hold the student's weights any more: its rollouts differ by %.3g nats a token; they are written again",
            server.name, gap,
        )  # fmt: skip
        self.weights.forget(server)
        return False

    def _write(self, server: Server, prompt: Prompt, sampling: Sampling, on_ready: OnReady) -> list[Rollout]:
        rollouts = self.completions.write(server, self.weights.held(server), prompt, sampling)
        on_ready(rollouts)
        return rollouts

    def _answers(self, server: Server, probe: Sequence[Prompt]) -> list[Rollout]:
        """Return the server's responses to the probe, which is the same after each sync."""
        sampling, held = Sampling(max_tokens=16), self.weights.held(server)
        return [
            Rollout(prompt, response.ids, response.logp_T, finished=False)
            for prompt in probe
            for response in self.completions.ask(server, held, prompt.ids, "probe", sampling)
        ]
