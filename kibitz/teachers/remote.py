"""A teacher behind a server: vLLM's `prompt_logprobs` of the text with the response in it, one pass for each rollout.

    sampled    the written token's log-probability
    top_k      the teacher's K likeliest tokens, the written one, and what is left as the tail
    named      the tokens that the asker names at each position (the student's K likeliest, and the written one), through
               `prompt_logprob_token_ids`: the support on which the reverse KL is nearest to the full one. vLLM 0.32 has it,
               where its V2 model runner drives a GPU; another server's own K are taken instead, and the log says so.

Entry p of `prompt_logprobs` is about the token at p given those before it; the first has none. Both endpoints give the same
numbers: `/inference/v1/generate` quicker, where the server was started with --enable-scale-out.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kibitz.config import SignalKind
from kibitz.config.teachers import RemoteTeacherConfig
from kibitz.models.language_model import num_ids
from kibitz.servers import ServerError, served_model
from kibitz.servers.answers import named, said
from kibitz.servers.busy import Busy
from kibitz.servers.http import Refused, Server, Servers
from kibitz.servers.sleep import Sleepers
from kibitz.signals import Sampled, Signal, TopK
from kibitz.teachers import MakeEngine, ScoreRequest, Teacher
from kibitz.types import Prompt, Rollout

log = logging.getLogger(__name__)

COMPLETIONS, GENERATE = "/v1/completions", "/inference/v1/generate"
TRIED_ON = ("Compare: 1 + 2 = 3, don't!", "naïve Größe 東京 🙂\n\tx", "<|im_start|>user")


@dataclass(frozen=True)
class Served:
    """A model on a server, and what that server can do."""

    servers: Servers
    model: str
    vocab_size: int
    room: int | None  # its longest text in tokens, with the one token that it always writes
    path: str
    names: bool  # whether it scores tokens that it is asked about
    known_as: str = ""  # its name, and the folder or name that the server has it from
    sleepers: Sleepers | None = None  # between two scorings it gives its memory back

    @property
    def name(self) -> str:
        return self.servers.servers[0].name


def remote_teacher(config: RemoteTeacherConfig, tokenizer: Any) -> Teacher:
    """Meet the server: which models it has, whether its tokenizer is the student's, what it can be asked."""
    servers = Servers(
        config, [config.url], "teacher", lambda server: None if sleepers is None else sleepers.wake(server)
    )
    sleepers = Sleepers(servers) if config.sleep is True else None
    try:
        (served,) = servers.each(lambda server: _meet(server, servers, config, tokenizer))
    except BaseException:
        servers.close()
        raise
    tally = Tally(servers)
    kinds: tuple[SignalKind, ...] = ("top_k", "named", "sampled")
    if sleepers is not None:
        served = replace(served, sleepers=sleepers)
        sleepers.sleep()
    return Teacher(
        kinds=kinds,
        scorer=lambda request: RemoteScorer(served, _possible(served, request), tally),
        examiner=None,
        writer=partial(_writes_nothing, served),
        num_parameters=0,
        metrics=tally.take,
        check=partial(_check_lengths, served),
        close=servers.close,
        served=((served.name, served.known_as),),
    )


def _meet(server: Server, servers: Servers, config: RemoteTeacherConfig, tokenizer: Any) -> Served:
    model, row = served_model(server, config.model, "teacher.model")
    room = row.get("max_model_len")
    _check_tokenizer(server, model, tokenizer)
    path = (
        GENERATE
        if _takes(server, {"model": model, "token_ids": [0, 0], "sampling_params": {"max_tokens": 1}})
        else COMPLETIONS
    )
    asked = {"max_tokens": 1, "prompt_logprob_token_ids": [[0]], "prompt_logprob_start": 0}
    names = path == GENERATE and _takes(server, {"model": model, "token_ids": [0, 0], "sampling_params": asked})
    known_as = f"{model} of {row['root']}" if isinstance(row.get("root"), str) else model
    return Served(servers, model, num_ids(tokenizer), room if type(room) is int else None, path, names, known_as)


def _takes(server: Server, body: dict[str, Any]) -> bool:
    try:
        server.order(GENERATE, body)
    except Refused as error:
        if error.status in (400, 403, 404, 405, 422, 501):
            return False
        raise
    return True


def _check_tokenizer(server: Server, model: str, tokenizer: Any) -> None:
    """The server must read text as the student does; one that has no /tokenize is taken at its word."""
    for text in TRIED_ON:
        try:
            answer = server.ask("/tokenize", {"model": model, "prompt": text, "add_special_tokens": False})
        except Refused as error:
            if error.status in (404, 405):
                log.warning("%s has no /tokenize: whether its tokenizer is the student's cannot be seen", server.name)
                return
            raise
        theirs = answer.get("tokens") if isinstance(answer, dict) else None
        if theirs != tokenizer.encode(text, add_special_tokens=False):
            raise ServerError(
                f"{server.name} reads {text!r} as other tokens than the student does: choose a teacher of the student's family"
            )


def _possible(served: Served, request: ScoreRequest) -> ScoreRequest:
    if request.temperature != 1:
        raise ValueError(
            "a server gives log-probabilities at temperature 1: write method.temperature=1, or a teacher in this process"
        )
    if request.kind == "named" and not served.names:
        log.warning(
            "%s does not score tokens that it is asked about (vLLM 0.32 or newer on a GPU, with --enable-scale-out and "
            "VLLM_USE_V2_MODEL_RUNNER=1): its own %d likeliest take the place of the student's, as with "
            "method.top_k_of=teacher", served.name, request.top_k,
        )  # fmt: skip
    return request


def _writes_nothing(served: Served, make: MakeEngine) -> Any:
    raise ValueError(f"{served.name} scores tokens and writes none: choose a teacher.model in this process for that")


def _check_lengths(served: Served, prompts: Sequence[Prompt], max_tokens: int) -> None:
    longest = max(len(prompt.ids) for prompt in prompts)
    if served.room is not None and longest + max_tokens + 1 > served.room:
        raise ValueError(
            f"the longest prompt has {longest} tokens, responses up to {max_tokens}, and {served.name} takes {served.room - 1}: "
            "start it with a longer --max-model-len, or lower rollout.max_tokens"
        )


class Tally:
    """What the scoring of a step took: when the server was asked, and the bytes of its answers."""

    def __init__(self, servers: Servers):
        self.servers, self.busy, self.num_tokens = servers, Busy(), 0

    def take(self) -> dict[str, Any]:
        num, self.num_tokens = self.num_tokens, 0
        size = {"teacher_bytes_per_token": self.servers.take_received() / num} if num else {}
        return size | {"teacher_scoring_busy": self.busy.take()}


class RemoteScorer:
    """Asks for each rollout by itself, as soon as it is known."""

    def __init__(self, served: Served, request: ScoreRequest, tally: Tally | None = None):
        self.served, self.request, self.tally = served, request, tally or Tally(served.servers)
        self._early: dict[tuple, Future] = {}  # of rollouts that `score` has not been asked about yet
        self._before: set[tuple] = set()  # those of them that were there when it was last asked
        self._reading = threading.Lock()  # the student reads in one thread at a time

    def prefetch(self, rollouts: Sequence[Rollout]) -> None:
        """Begin with rollouts that `score` will be asked about, while others are still written: in this step or, one step
        ahead, in the next. The same numbers: a text is scored by itself. The student names its tokens in the thread that brings
        the rollouts, unless it learns meanwhile or its GPU belongs to servers now."""
        names = self.request.kind == "named" and self.served.names
        if names and (not self.request.candidates_hold or self.served.sleepers is not None):
            return
        self._early |= self._submitted(rollouts, self._early)

    def score(self, rollouts: Sequence[Rollout]) -> list[Signal]:
        texts = {_text(rollout) for rollout in rollouts}
        begun = {text: job for text in texts if (job := self._early.pop(text, None)) is not None}
        begun |= self._submitted(rollouts, begun)
        signals = self.served.servers.gather([begun[_text(rollout)] for rollout in rollouts])
        self.tally.num_tokens += sum(rollout.num_tokens for rollout in rollouts)
        for text in self._before:  # nobody has asked about them for a whole step: they were written and thrown away
            self._early.pop(text, None)
        self._before = set(self._early)
        if self.served.sleepers is not None:
            self.served.sleepers.sleep()
        return signals

    def _submitted(self, rollouts: Sequence[Rollout], begun: Mapping[tuple, Future]) -> dict[tuple, Future]:
        """Ask for those that are not begun, once for each text."""
        new = {_text(rollout): rollout for rollout in rollouts if _text(rollout) not in begun}
        named = self._candidates(list(new.values()))
        return {text: self._submit(one, ids_TK) for (text, one), ids_TK in zip(new.items(), named, strict=True)}

    def _candidates(self, rollouts: Sequence[Rollout]) -> Sequence[Tensor | None]:
        if self.request.kind != "named" or not self.served.names or not rollouts:
            return [None] * len(rollouts)
        assert self.request.candidates is not None, "a request for named tokens needs candidates"
        with self._reading:
            return self.request.candidates(rollouts)

    def _submit(self, rollout: Rollout, ids_TK: Tensor | None) -> Future:
        work = self._score if ids_TK is None else partial(self._name, ids_TK=ids_TK.cpu())

        def asked(server: Server) -> Signal:
            with self.tally.busy.working():
                return work(server, rollout)

        return self.served.servers.submit(asked)

    def _score(self, server: Server, rollout: Rollout) -> Signal:
        served, ids, start = self.served, [*rollout.prompt.ids, *rollout.response_ids], len(rollout.prompt.ids)
        top_k = 0 if self.request.kind == "sampled" else min(self.request.top_k, served.vocab_size)
        params = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": top_k}
        if served.path == GENERATE:
            body = {"model": served.model, "token_ids": ids, "sampling_params": params | {"detokenize": False}}
        else:
            body = {"model": served.model, "prompt": ids, **params}
        answer = said(server.name, server.ask(served.path, body), served.model, ids, start, top_k, served.vocab_size)
        if self.request.kind == "sampled":
            return Sampled(answer.logp_T)
        token_T = torch.tensor(rollout.response_ids)
        return TopK(
            torch.cat([answer.ids_TK, token_T[:, None]], dim=-1),
            torch.cat([answer.logp_TK, answer.logp_T[:, None]], dim=-1),
            named=self.request.kind == "named",
        )

    def _name(self, server: Server, rollout: Rollout, ids_TK: Tensor) -> Signal:
        served = self.served
        params = {
            "max_tokens": 1,
            "temperature": 1.0,
            "detokenize": False,
            "prompt_logprob_token_ids": ids_TK.tolist(),
            "prompt_logprob_start": len(rollout.prompt.ids) - 1,  # row i is about the token at start + i + 1
        }
        ids = [*rollout.prompt.ids, *rollout.response_ids]
        answer = server.ask(GENERATE, {"model": served.model, "token_ids": ids, "sampling_params": params})
        return TopK(ids_TK, named(server.name, answer, served.model, ids_TK), named=True)


def _text(rollout: Rollout) -> tuple:
    return rollout.prompt.ids, tuple(rollout.response_ids)
