"""The nouns of kibitz: what flows from the prompts to the loss.

Shape suffixes, used everywhere (after Shazeer):

    B  rows of a padded micro-batch          L  positions of a row (prompt + response)
    T  response tokens, of one rollout or of a whole micro-batch, in order
    C  the tokens of one chunk of T          V  vocabulary, cut to the tokenizer's size
    D  width of the hidden states            K  tokens of a truncated support
    S  support of a distribution: V, or K plus a tail bucket

`logp` is the natural logarithm of a probability, `logits` what comes before the softmax. Units are nats, tokens
and seconds. Position t of a sequence scores token t+1, so a rollout with P prompt and T response tokens is scored
by positions [P-1, P+T-1): `Batch.position_T` is the only place where that shift is written.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


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
    those who read it by another chat template. `route` names the teacher of this row, where the data does.
    """

    ids: tuple[int, ...]
    text: str
    key: str
    task: str = "default"
    answer: str | None = None
    response: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, str], ...] = ()
    route: str | None = None


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
    joins the method's own, such as a gold response beside them. The teacher wrote the first `num_seeded` tokens, and read
    no further to write them.
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
    num_seeded: int = 0
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
    """Of the response tokens, those that the teacher wrote. Under speculative KD that is the share of judged drafts that
    it rejected, 1 - accepted / judged: those behind a rejected one are thrown away unjudged and do not count."""
    written = sum(int((r.writer_T == Writer.TEACHER).sum()) for r in rollouts if r.writer_T is not None)
    return written / max(1, sum(r.num_tokens for r in rollouts))


@runtime_checkable
class Stateful(Protocol):
    """What changes from step to step and is no part of the student: an optimizer's moments, a discriminator, an average of
    the student. A run that goes on from a checkpoint needs it back."""

    def state(self) -> dict[str, Tensor]:
        """All of it, fit for safetensors: on the CPU, contiguous, no two tensors in the same memory."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


# ------------------------------------------------------------------ signals: what the teacher said about each token


@dataclass
class Dense:
    """The whole distribution, kept as the teacher's last hidden states and its output head, not as logits: the loss
    multiplies both heads chunk by chunk, so that exact full-vocabulary divergences cost the memory of one chunk."""

    hidden_TD: Tensor
    head: Callable[[Tensor], Tensor]  # [C, D] -> logits [C, V]


@dataclass
class TopK:
    """The teacher's log-probabilities of K tokens per position; what is left of 1 is the tail bucket.

    `temperature` is the one that the teacher's logits were divided by. `named`: who asked said which tokens (the
    student's likeliest), or agreed to the teacher's in their place."""

    ids_TK: Tensor
    logp_TK: Tensor
    temperature: float = 1.0
    named: bool = False


@dataclass
class Sampled:
    """The teacher's log-probability of the token that was sampled."""

    logp_T: Tensor


@dataclass
class FirstTokens:
    """At each token, the teacher's distribution over the *first* of its own tokens in the span, `dense`, and its
    log-probability of the later ones. `shared` are the ids, of the student and of the teacher, of tokens that mean the same."""

    dense: Dense
    rest_logp_T: Tensor
    shared: tuple[Tensor, Tensor]


@dataclass
class Spans:
    """From a teacher with another tokenizer. A span is a stretch of text that is whole tokens for both models (see
    `kibitz.teachers.alignment`); what is known of it stands at each of its tokens, so that any part of them will do.

    `student_logp_T` is as it was sampled, and both log-probabilities are of the whole span. `comparable_T` is 0 where the two
    cannot be compared, and the two are equal there."""

    span_T: Tensor  # which one, counted from 0 in a batch
    size_T: Tensor  # tokens of the student in it
    bytes_T: Tensor  # bytes of the text in it; 0: the end of the response
    teacher_logp_T: Tensor
    student_logp_T: Tensor
    comparable_T: Tensor
    first: FirstTokens | None = None


Signal = Dense | TopK | Sampled | Spans


def cat_signals(signals: list[Signal]) -> Signal:
    """The signals of several rollouts as one, in order. All of one kind; `Dense` ones share a head."""
    first = signals[0]
    assert all(type(s) is type(first) for s in signals), "signals of different kinds in one batch"
    match first:
        case Dense():
            assert all(s.head is first.head for s in signals), "Dense signals of different heads in one batch"
            return Dense(_cat([s.hidden_TD for s in signals]), first.head)
        case TopK():
            ids, logps = [s.ids_TK for s in signals], [s.logp_TK for s in signals]
            return TopK(torch.cat(ids), torch.cat(logps), first.temperature, first.named)
        case Sampled():
            return Sampled(torch.cat([s.logp_T for s in signals]))
        case Spans():
            return _cat_spans([s for s in signals if isinstance(s, Spans)])


def _cat(tensors: list[Tensor]) -> Tensor:
    """What was page-locked stays so: a GPU takes chunks of it while it computes."""
    shape, pinned = (sum(map(len, tensors)), *tensors[0].shape[1:]), tensors[0].is_pinned()
    return torch.cat(tensors, out=tensors[0].new_empty(shape, pin_memory=True) if pinned else None)


def slice_signal(signal: Signal, tokens: slice) -> Signal:
    """The part of a signal that belongs to some tokens."""
    match signal:
        case Dense(hidden_TD, head):
            return Dense(hidden_TD[tokens], head)
        case TopK(ids_TK, logp_TK, temperature, named):
            return TopK(ids_TK[tokens], logp_TK[tokens], temperature, named)
        case Sampled(logp_T):
            return Sampled(logp_T[tokens])
        case Spans(first=first):
            columns = {name: getattr(signal, name)[tokens] for name in SPAN_COLUMNS}
            if first is not None:
                dense = Dense(first.dense.hidden_TD[tokens], first.dense.head)
                first = FirstTokens(dense, first.rest_logp_T[tokens], first.shared)
            return Spans(**columns, first=first)


SPAN_COLUMNS = ("span_T", "size_T", "bytes_T", "teacher_logp_T", "student_logp_T", "comparable_T")


def _cat_spans(signals: list[Spans]) -> Spans:
    columns = {name: torch.cat([getattr(s, name) for s in signals]) for name in SPAN_COLUMNS}
    counts = [int(s.span_T[-1]) + 1 if len(s.span_T) else 0 for s in signals]
    parts = [s.span_T + sum(counts[:i]) for i, s in enumerate(signals)]
    first = None
    if (one := signals[0].first) is not None:
        dense = _cat([s.first.dense.hidden_TD for s in signals])
        rest = torch.cat([s.first.rest_logp_T for s in signals])
        first = FirstTokens(Dense(dense, one.dense.head), rest, one.shared)
    return Spans(**{**columns, "span_T": torch.cat(parts)}, first=first)


class Anchor(NamedTuple):
    """What holds the student back: `coefficient` times the KL to the model whose signal this is joins the loss."""

    signal: Signal
    coefficient: float


@dataclass
class Scored:
    """A rollout with all that the loss needs to know about it.

    `advantage_T` credits each sampled token (rewards, or the teacher's log-ratio); `weight_T` is 0 where nothing is
    to be learnt. Either a signal, or an advantage, or both, or neither (the tokens themselves are the target: SFT).
    `numbers` are what else a criterion wants to know of each token, by name, each `[T]`.

    A method that learns two things in one step names them by `objective`: a micro-batch holds one of them, each is the
    mean over its own tokens, and the loss is their sum.
    """

    rollout: Rollout
    weight_T: Tensor
    signal: Signal | None = None
    advantage_T: Tensor | None = None
    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    anchor: Anchor | None = None
    objective: str = ""

    @classmethod
    def from_signal(cls, rollout: Rollout, signal: Signal) -> "Scored":
        """By the teacher, at every token that the student wrote and that the teacher could hear."""
        weight_T = rollout.weight_T()
        if isinstance(signal, Spans):
            weight_T = weight_T * signal.comparable_T.to(weight_T)
        return cls(rollout, weight_T, signal)


@dataclass
class Tokens:
    """The learnable side of a micro-batch, or of one chunk of it: one entry per response token."""

    token_T: Tensor  # the token that was written
    weight_T: Tensor
    logp_T: Tensor  # its log-probability when it was sampled
    signal: Signal | None = None
    advantage_T: Tensor | None = None
    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    anchor: Anchor | None = None

    def __getitem__(self, tokens: slice) -> "Tokens":
        return Tokens(
            self.token_T[tokens],
            self.weight_T[tokens],
            self.logp_T[tokens],
            None if self.signal is None else slice_signal(self.signal, tokens),
            None if self.advantage_T is None else self.advantage_T[tokens],
            {name: number_T[tokens] for name, number_T in self.numbers.items()},
            None if self.anchor is None else Anchor(slice_signal(self.anchor.signal, tokens), self.anchor.coefficient),
        )


@dataclass
class Batch:
    """A micro-batch: right-padded rows for the forward pass, and what to learn at which positions.

    Padding stands on the right of causal models, so it needs no attention mask and changes no response position.
    """

    ids_BL: Tensor
    length_B: Tensor  # positions of each row that are not padding
    position_T: Tensor  # index into the flattened [B*L] of the position that scores each response token
    tokens: Tokens
    objective: str = ""
