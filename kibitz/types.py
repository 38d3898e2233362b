"""The data types of kibitz: what flows from the prompts to the loss.

Shape suffixes, used everywhere (after Shazeer):

    B  rows of a padded micro-batch          L  positions of a row (prompt + response)
    T  response tokens, of one rollout or of a whole micro-batch, in order
    C  the tokens of one chunk of T          V  vocabulary, cut to the tokenizer's size
    D  width of the hidden states            K  tokens of a truncated support
    S  support of a distribution: V, or K plus a tail bucket

`logp` is the natural logarithm of a probability, `logits` what comes before the softmax. Units are nats, tokens
and seconds. Position t of a sequence scores token t+1, so a rollout with P prompt and T response tokens is scored
by positions [P-1, P+T-1): `kibitz.signals.Batch.position_T` is the only place where that shift is written.
"""

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


def is_gpu(device: torch.device) -> bool:
    """Return whether a device has memory, streams and a clock of its own, of which `torch.get_device_module(device)` tells: CUDA
    (as which ROCm speaks), and backends that add themselves to torch."""
    return device.type in ("cuda", torch._C._get_privateuse1_backend_name())


def give_back_freed() -> None:
    """Give the system what the C library keeps of freed memory for later, where that library is glibc: large matrices that are
    made and freed once a step would otherwise stand beside whatever the rest of the step needs."""
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes of a GPU's memory that tensors can have: what is free, and what torch's allocator holds for them. None for
    a CPU, whose programs must not depend on what else the machine does."""
    if not is_gpu(device):
        return None
    module = torch.get_device_module(device)
    held = module.memory_reserved(device) - module.memory_allocated(device)
    return module.mem_get_info(device)[0] + held


class Writer(IntEnum):
    """The writer of a response token. What the environment wrote is never learnt."""

    STUDENT = 0
    TEACHER = 1
    DATASET = 2
    ENVIRONMENT = 3


@dataclass(frozen=True)
class Prompt:
    """One problem, rendered and tokenized for the student.

    `key` names the row for good: seeds are drawn from it, so a prompt gives the same rollout in any batch.
    `response` is the demonstration, where the data has one. `messages` is the conversation before it was rendered, for
    those who read it by another chat template, and `tools` are the functions that it tells of. `route` names the teacher of
    this row, where the data does.
    """

    ids: tuple[int, ...]
    text: str
    key: str
    task: str = "default"
    answer: str | None = None
    response: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, Any], ...] = ()
    route: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. `seed` and the prompt's key decide every token; there are `num_samples` rollouts per prompt.

    `epsilon` is the share of tokens drawn uniformly from the vocabulary; the log-probabilities are the mixture's."""

    max_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    epsilon: float = 0.0
    num_samples: int = 1
    stop_ids: tuple[int, ...] = ()
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True)
class Step:
    """The step of a run: `number` steps of `total` are done; `seed` decides all sampling of this one."""

    number: int
    total: int
    seed: int

    @property
    def progress(self) -> float:
        """0 at the first step of a run, 1 at its last: what schedules follow."""
        return min(1.0, self.number / max(1, self.total - 1))


@dataclass
class Rollout:
    """A response token by token.

    `logp_T` is the log-probability under the distribution that was really sampled from (temperature and truncation
    applied). `finished` means that the last id is a stop token; a rollout cut off at the limit has none, and none is
    invented for it. `shortened` means that it was stopped on purpose before that limit, and says nothing about how long
    the student would have gone on. `learn_T` is the weight of each token in the loss, as its source or a guard set it;
    None gives 1 to every token that the environment did not write. `objective` names what is learnt from a rollout that
    joins the method's own, such as a gold response beside them.
    """

    prompt: Prompt
    response_ids: list[int]
    logp_T: Tensor
    finished: bool
    sample: int = 0
    writer_T: Tensor | None = None  # uint8 of Writer; None: the student wrote all of it
    shortened: bool = False
    learn_T: Tensor | None = None
    objective: str = ""
    text: str = ""
    reward: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.response_ids)

    @property
    def cut_off(self) -> bool:
        """Return whether the response reached the limit before it ended."""
        return not self.finished and not self.shortened

    def has_tokens_of(self, writer: Writer) -> bool:
        if self.writer_T is None:
            return writer == Writer.STUDENT
        return bool((self.writer_T == writer).any())

    def weight_T(self) -> Tensor:
        """The weight of each token in the loss, [T]: `learn_T`, and 0 for every token that the environment wrote."""
        weight_T = torch.ones(self.num_tokens) if self.learn_T is None else self.learn_T
        return weight_T if self.writer_T is None else weight_T * (self.writer_T != Writer.ENVIRONMENT)


def share_of_teacher(rollouts: Sequence[Rollout]) -> float:
    """Return the share of the response tokens that the teacher wrote. Under speculative KD that is the share of judged drafts
    that it rejected, 1 - accepted / judged: those behind a rejected one are thrown away unjudged and do not count."""
    written = sum(int((r.writer_T == Writer.TEACHER).sum()) for r in rollouts if r.writer_T is not None)
    return written / max(1, sum(r.num_tokens for r in rollouts))


@runtime_checkable
class Stateful(Protocol):
    """A state that changes from step to step and is no part of the student: an optimizer's moments, a discriminator, an average
    of the student. A run that goes on from a checkpoint needs it back."""

    def state(self) -> dict[str, Tensor]:
        """All of it, fit for safetensors: on the CPU, contiguous, no two tensors in the same memory."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...
