"""A teacher of which only its text can be had: an OpenAI-compatible chat endpoint, without log-probabilities.

It cannot score. It writes what `sft` and `gad` learn from: each prompt's messages go out as they are, and what comes back is
cut into the student's tokens, with the student's EOS where the server reports that the answer ended by itself.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kibitz.config.teachers import ChatTeacherConfig
from kibitz.data import encode_text, turn_end
from kibitz.engines import OnReady, nobody_waits
from kibitz.engines.sampling import row_seed
from kibitz.ledger import Count, uncounted
from kibitz.servers import ServerError, served_model
from kibitz.servers.http import Server, Servers
from kibitz.servers.keys import shown
from kibitz.teachers import Scorer, ScoreRequest, Teacher
from kibitz.types import Prompt, Rollout, Sampling

CHAT = "/v1/chat/completions"
SEEDS = 2**31
DATE = r"(-\d{4}|-\d{8}|-\d{4}-\d{2}-\d{2})?"
"""What OpenAI's endpoints add to the name of the model that was asked for."""


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
        check=_check_no_tools,
        close=servers.close,
        served=((servers.servers[0].name, model),),
    )


def _check_no_tools(prompts: Sequence[Prompt], max_tokens: int) -> None:
    for prompt in prompts:
        if prompt.tools:
            raise ValueError(
                f"the row of the prompt {prompt.text[:80]!r} has tools, which a chat endpoint is not told of: leave out the "
                "column `tools`"
            )


def _scores_nothing(request: ScoreRequest) -> Scorer:
    raise ValueError(
        "a chat endpoint gives no log-probabilities: write method.type=sft or gad, or a teacher that scores"
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

    def metrics(self) -> dict[str, Any]:
        return {}

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
        text, ended = _answer(server, server.ask(CHAT, body), self.model)
        ids = as_text(server, text, self.tokenizer)
        ids = [*ids, turn_end(self.tokenizer)] if ended else ids
        if not ids:
            raise ServerError(f"{server.name} wrote nothing to {prompt.text[:80]!r}: raise rollout.max_tokens")
        finished, ids = ended and len(ids) <= sampling.max_tokens, ids[: sampling.max_tokens]
        # Nobody knows how likely it was: it counts as certain, as a demonstration does.
        return Rollout(prompt, ids, torch.zeros(len(ids)), finished, sample, text=text)


def _answer(server: Server, tree: Any, model: str) -> tuple[str, bool]:
    """The text, and whether it ended by itself."""
    try:
        (choice,) = tree["choices"]
        answered, message, reason = tree.get("model"), choice["message"], choice["finish_reason"]
        text, calls = message["content"], message.get("tool_calls")
    except (TypeError, KeyError, ValueError, AttributeError):
        answered = text = reason = calls = None
    if not isinstance(text, str) or not isinstance(reason, str):
        raise ServerError(
            f"{server.name} sent no answer with one of choices, its message.content and its finish_reason"
        )
    if not isinstance(answered, str) or not re.fullmatch(re.escape(model) + DATE, answered):
        theirs = f"as {shown(answered, 80)!r}" if isinstance(answered, str) else "without the name of a model"
        raise ServerError(
            f"{server.name} answered {theirs}, and {model!r} was asked: if that is the teacher that you want, write its name as "
            "teacher.model"
        )
    if reason not in ("stop", "length") or calls:
        why = shown(reason) if reason not in ("stop", "length") else "tool_calls"
        raise ServerError(f"{server.name} ended an answer for the reason {why!r}, and not by itself")
    return text, reason == "stop"


def as_text(server: Server, text: str, tokenizer: Any) -> list[int]:
    """The student's tokens. Where the text spells a control token, such as the end of a turn, it is spelt by others."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ServerError(f"{server.name} wrote a lone surrogate, half a character, which is no text") from None
    try:
        return encode_text(tokenizer, text, f"{server.name} wrote")
    except ValueError as error:
        raise ServerError(str(error)) from None
