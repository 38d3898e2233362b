"""Rollouts from vLLM servers of the student: token ids in and out over HTTP, to one server or to several in turn.

A prompt is one request for all its samples. Its seed is that of the embedded engine's first sample, so that a prompt gives
the same rollouts whichever server it meets and whoever is asked beside it; the numbers drawn are vLLM's own, so that they
are others than the embedded engine's. What the server's folder says of sampling (penalties, other end tokens) is overruled.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kibitz.config import RolloutConfig
from kibitz.engines import OnReady, nobody_waits
from kibitz.engines.sampling import row_seed
from kibitz.engines.sync import Weights
from kibitz.ledger import Count, uncounted
from kibitz.models import LanguageModel
from kibitz.servers import ServerError
from kibitz.servers.answers import Written, written
from kibitz.servers.busy import Busy
from kibitz.servers.http import Server, Servers
from kibitz.servers.sleep import Sleepers
from kibitz.types import Prompt, Rollout, Sampling

log = logging.getLogger(__name__)

COMPLETIONS = "/v1/completions"
TRIES = 3  # to get rollouts of the student's own weights
STRANGE = 4.0
"""A single rollout may differ from the student by so many times what the mean over the probe may."""
SEEDS = 2**62  # vLLM adds the number of the sample to it, and takes 64 bits


class VLLMEngine:
    """`probe` are the prompts on which servers and student are compared after each sync. The rollouts of a prompt are ready
    together, and are said so from another thread: a teacher need not wait for the slowest.

    With `server.sleep` the servers give their memory back when all is written, and are woken before new weights or prompts come.
    At the end of each `generate` one rollout of each server is compared with the student: a server that somebody started again
    meanwhile holds other weights, and what it wrote is written again."""

    def __init__(self, student: LanguageModel, config: RolloutConfig, folder: Path, probe: Sequence[Prompt]):
        self.student, self.config, self.at_once = student, config.server, config.max_staleness == 0
        self._busy, self._num_tokens = Busy(), 0
        self._unchecked: tuple[dict[Server, list[Rollout]], Sampling] = {}, Sampling(max_tokens=1)
        self.weights = Weights(config.server, folder, student, lambda server: self._answers(server, probe))
        self.servers = Servers(config.server, config.urls, "student", self._ready)
        self.sleepers = Sleepers(self.servers) if config.server.sleep is True else None
        try:
            self.servers.each(self.weights.meet)
        except BaseException:
            self.close()
            raise
        self._processed: dict[str, bool] = {}

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
            names = ", ".join(server.name for server in self.servers.servers)
            raise ServerError(
                f"what {names} wrote did not come from the student's weights, {TRIES} times in a row, though the probe after "
                "the sync did: look whether somebody else loads weights there, and continue with --resume"
            )
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
        size = {"rollout_bytes_per_token": self.servers.take_received() / num} if num else {}
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
        answers, last = self.servers.gather(jobs), dict[Server, list[Rollout]]()
        for server, rollouts in answers:
            last[server] = rollouts[-1:]
        strangers = self._strangers(last, sampling) if self.at_once else set()
        self._unchecked = last, sampling
        return {
            place: rollouts
            for place, (server, rollouts) in zip(places, answers, strict=True)
            if server not in strangers
        }

    def believed(self) -> bool:
        """Whether what was written last came from the student's weights as they are now. `generate` asks itself, unless the
        student learns meanwhile."""
        return not self._strangers(*self._unchecked)

    def _strangers(self, last: dict[Server, list[Rollout]], sampling: Sampling) -> set[Server]:
        return {server for server, rollouts in last.items() if not self._is_students(server, rollouts, sampling)}

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
        if not sampling.greedy and (sampling.temperature != 1 or sampling.top_p < 1 or sampling.top_k > 0):
            self._check_mode(server)
        rollouts = [
            _rollout(server.name, prompt, sample, response, sampling)
            for sample, response in enumerate(self._ask(server, prompt.ids, prompt.key, sampling))
        ]
        on_ready(rollouts)
        return rollouts

    def _ask(self, server: Server, ids: Sequence[int], key: str, sampling: Sampling) -> list[Written]:
        model = self.weights.model(server)
        body = request(model, ids, row_seed(sampling.seed, key, 0) % SEEDS, sampling)
        # Keys and values in the server's prefix cache belong to the weights that they were computed with.
        answer = server.ask(COMPLETIONS, body | {"cache_salt": self.weights.salt(server)})
        return written(server.name, answer, model, sampling.num_samples, self.student.vocab_size, sampling.max_tokens)

    def _answers(self, server: Server, probe: Sequence[Prompt]) -> list[Rollout]:
        """Return the server's responses to the probe, which is the same after each sync."""
        sampling = Sampling(max_tokens=16)
        return [
            Rollout(prompt, response.ids, response.logp_T, finished=False)
            for prompt in probe
            for response in self._ask(server, prompt.ids, "probe", sampling)
        ]

    def _check_mode(self, server: Server) -> None:
        """Log-probabilities must be those of the distribution that was sampled from. Of the likeliest token alone, that is 0,
        and nothing that an unprepared model says to a senseless prompt is as certain."""
        if server.url not in self._processed:
            senseless = [i * self.student.vocab_size // 9 for i in range(1, 9)]
            (one,) = self._ask(server, senseless, "mode", Sampling(max_tokens=16, top_k=1))
            self._processed[server.url] = bool((one.logp_T > -1e-5).all())
        if not self._processed[server.url]:
            raise ServerError(
                f"{server.name} returns log-probabilities from before temperature and truncation: start it with "
                "--logprobs-mode processed_logprobs, or write rollout.temperature=1 without top_p and top_k"
            )


def request(model: str, ids: Sequence[int], seed: int, sampling: Sampling) -> dict[str, Any]:
    """The body that asks `/v1/completions` for a prompt's samples."""
    return {
        "model": model,
        "prompt": list(ids),
        "n": sampling.num_samples,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": seed,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": True,  # whatever the server takes for one: `stop_ids` holds the student's
        "logprobs": 0,
        "return_token_ids": True,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_p": 0.0,
    }


def _rollout(name: str, prompt: Prompt, sample: int, response: Written, sampling: Sampling) -> Rollout:
    ids, finished = response.ids, response.ids[-1] in sampling.stop_ids
    if any(i in sampling.stop_ids for i in ids[:-1]):
        raise ServerError(f"{name} wrote on behind a stop token: it does not honour stop_token_ids")
    if not finished and len(ids) < sampling.max_tokens:
        raise ServerError(
            f"{name} stopped after {len(ids)} of {sampling.max_tokens} tokens without a stop token: start it with a longer "
            "--max-model-len"
        )
    return Rollout(prompt, ids, response.logp_T, finished, sample=sample)
