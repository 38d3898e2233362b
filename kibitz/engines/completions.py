"""Rollouts of one prompt from one vLLM server: token ids in and out of `/v1/completions`, and nothing else over HTTP.

A prompt is one request for all its samples. Its seed is that of the embedded engine's first sample, so that a prompt gives
the same rollouts whichever server it meets and whoever is asked beside it; the numbers drawn are vLLM's own, so that they
are others than the embedded engine's. What the server's folder says of sampling (penalties, other end tokens) is overruled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kibitz.engines.sampling import row_seed
from kibitz.servers import ServerError
from kibitz.servers.answers import Written, written
from kibitz.servers.http import Server
from kibitz.types import Prompt, Rollout, Sampling

COMPLETIONS = "/v1/completions"
SEEDS = 2**62  # vLLM adds the number of the sample to it, and takes 64 bits


@dataclass(frozen=True)
class Held:
    """How a server that holds certain weights is asked: by the name of its model, and with a salt for its prefix cache, whose
    keys and values belong to the weights that they were computed with."""

    model: str
    salt: str


class Completions:
    """Asks servers. `vocab_size` bounds the ids that they may answer."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self._processed: dict[str, bool] = {}

    def write(self, server: Server, held: Held, prompt: Prompt, sampling: Sampling) -> list[Rollout]:
        """The rollouts of a prompt."""
        if not sampling.greedy and (sampling.temperature != 1 or sampling.top_p < 1 or sampling.top_k > 0):
            self._check_mode(server, held)
        return [
            _rollout(server.name, prompt, sample, response, sampling)
            for sample, response in enumerate(self.ask(server, held, prompt.ids, prompt.key, sampling))
        ]

    def ask(self, server: Server, held: Held, ids: Sequence[int], key: str, sampling: Sampling) -> list[Written]:
        body = request(held.model, ids, row_seed(sampling.seed, key, 0) % SEEDS, sampling)
        answer = server.ask(COMPLETIONS, body | {"cache_salt": held.salt})
        return written(server.name, answer, held.model, sampling.num_samples, self.vocab_size, sampling.max_tokens)

    def _check_mode(self, server: Server, held: Held) -> None:
        """Log-probabilities must be those of the distribution that was sampled from. Of the likeliest token alone, that is 0,
        and nothing that an unprepared model says to a senseless prompt is as certain."""
        if server.url not in self._processed:
            senseless = [i * self.vocab_size // 9 for i in range(1, 9)]
            (one,) = self.ask(server, held, senseless, "mode", Sampling(max_tokens=16, top_k=1))
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
