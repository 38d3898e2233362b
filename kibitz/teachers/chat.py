"""A teacher of which only its text can be had: an OpenAI-compatible chat endpoint, without log-probabilities.

It cannot score. It writes what `sft` and `gad` learn from: each prompt's messages go out as they are, and what comes back is
cut into the student's tokens, with the student's EOS where the server says that the answer ended by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kibitz.config.teachers import ChatTeacherConfig
from kibitz.engines import OnReady, nobody_waits
from kibitz.engines.sampling import row_seed
from kibitz.ledger import Count, uncounted
from kibitz.servers import ServerError, served_model
from kibitz.servers.http import Server, Servers
from kibitz.teachers import Scorer, ScoreRequest, Teacher
from kibitz.types import Prompt, Rollout, Sampling

CHAT = "/v1/chat/completions"
SEEDS = 2**31


def chat_teacher(config: ChatTeacherConfig, tokenizer: Any) -> Teacher:
    """Meet the server and ask for its model, so that a wrong address or name is known before the student's weights load."""
    servers = Servers(config, [config.chat], "teacher")
    try:
        (model,) = servers.each(lambda server: served_model(server, config.model, "teacher.model")[0])
    except BaseException:
        servers.close()
        raise
    engine = ChatEngine(servers, model, tokenizer)
    return Teacher(
        kinds=(),
        scorer=_scores_nothing,
        examiner=None,
        writer=lambda make: engine,
        num_parameters=0,
        close=servers.close,
    )


def _scores_nothing(request: ScoreRequest) -> Scorer:
    raise ValueError(
        "a chat endpoint tells no log-probabilities: write method.type=sft or gad, or a teacher that scores"
    )


@dataclass(frozen=True)
class ChatEngine:
    servers: Servers
    model: str
    tokenizer: Any

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_ready: OnReady = nobody_waits, count: Count = uncounted
    ) -> list[Rollout]:
        """Nothing is counted: nobody knows the model."""
        asked = [(prompt, sample) for prompt in prompts for sample in range(sampling.num_samples)]

        def write(server: Server, prompt: Prompt, sample: int) -> Rollout:
            rollout = self._write(server, prompt, sample, sampling)
            on_ready([rollout])
            return rollout

        jobs = [
            self.servers.submit(lambda server, one=prompt, n=sample: write(server, one, n)) for prompt, sample in asked
        ]
        return self.servers.gather(jobs)

    def sync(self, student: Any) -> None:
        """It does not change."""

    def close(self) -> None:
        self.servers.close()

    def _write(self, server: Server, prompt: Prompt, sample: int, sampling: Sampling) -> Rollout:
        messages = prompt.messages or ({"role": "user", "content": prompt.text},)
        body = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": row_seed(sampling.seed, prompt.key, sample) % SEEDS,
        }
        text, ended = _answer(server, server.ask(CHAT, body))
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*ids, self.tokenizer.eos_token_id] if ended else ids
        if not ids:
            raise ServerError(f"{server.name} wrote nothing to {prompt.text[:80]!r}: raise rollout.max_tokens")
        finished, ids = ended and len(ids) <= sampling.max_tokens, ids[: sampling.max_tokens]
        # Nobody knows how likely it was: it counts as certain, as a demonstration does.
        return Rollout(prompt, ids, torch.zeros(len(ids)), finished, sample, text=text)


def _answer(server: Server, tree: Any) -> tuple[str, bool]:
    """The text, and whether it ended by itself."""
    try:
        choice = tree["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    except (TypeError, KeyError, IndexError):
        text = reason = None
    if not isinstance(text, str) or not isinstance(reason, str):
        raise ServerError(f"{server.name} sent an answer without choices[0].message.content and finish_reason")
    if reason not in ("stop", "length"):
        raise ServerError(f"{server.name} ended an answer for the reason {server.clean(reason)!r}, and not by itself")
    return text, reason == "stop"
