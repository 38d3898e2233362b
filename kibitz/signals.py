"""Signals: a teacher's scores of each response token, and what else the loss needs.

A signal consists of columns, tensors with one entry for each token of a rollout or of a batch. Joining, cutting, moving,
page-locking and measuring them is written once, on `Columns`. Who asks for a signal's kind does so because the
mathematics differs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from kibitz.types import Rollout, is_gpu


@dataclass
class Columns:
    """Every field that is a tensor is a column `[T, ...]`, and so is every field that consists of columns itself. What
    else there is (a head, a temperature) belongs to all tokens together.

    Like a tensor, it has `nbytes`, goes `to` a device, and is indexed by tokens."""

    def columns(self) -> dict[str, Any]:
        """The columns by the names of their fields: each a Tensor, or `Columns`."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor | Columns)}

    def __getitem__(self, tokens: slice | Tensor) -> Self:
        return self.each(lambda column: column[tokens])

    def to(self, device: torch.device | str) -> Self:
        return self.each(lambda column: column.to(device))

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self.columns().values())

    def each(self, change: Callable[[Any], Any]) -> Self:
        """The same of other columns: `change` gets each Tensor, and each `Columns` in it as a whole."""
        return replace(self, **{name: change(column) for name, column in self.columns().items()})


@dataclass
class Dense(Columns):
    """The whole distribution, kept as the teacher's last hidden states and its output head, not as logits: the loss
    multiplies both heads chunk by chunk, so that exact full-vocabulary divergences cost the memory of one chunk."""

    hidden_TD: Tensor
    head: Callable[[Tensor], Tensor]  # [C, D] -> logits [C, V]


@dataclass
class TopK(Columns):
    """The teacher's log-probabilities of K tokens per position; what is left of 1 is the tail bucket.

    `temperature` is the one that the teacher's logits were divided by. `named`: the asker chose the tokens (the
    student's likeliest), or accepted the teacher's in their place. `rest_logp_T` is the log-probability of all other tokens
    together, summed by who knows them; without it no tail below the precision of 1 can be told."""

    ids_TK: Tensor
    logp_TK: Tensor
    temperature: float = 1.0
    named: bool = False
    rest_logp_T: Tensor | None = None


@dataclass
class Sampled(Columns):
    """The teacher's log-probability of the token that was sampled."""

    logp_T: Tensor


@dataclass
class FirstTokens(Columns):
    """At each token, the teacher's distribution over the *first* of its own tokens in the span, `dense`, and its
    log-probability of the later ones. `shared` are the ids, of the student and of the teacher, of tokens that mean the same:
    no columns, and the same for all signals of one teacher."""

    dense: Dense
    rest_logp_T: Tensor
    shared: tuple[Tensor, Tensor] = field(compare=False)


@dataclass
class Spans(Columns):
    """The scores of a teacher with another tokenizer. A span is a stretch of text that is whole tokens for both models (see
    `kibitz.teachers.alignment`). Its numbers stand at each of its tokens, so that a batch may be cut anywhere.

    `student_logp_T` is as it was sampled, and both log-probabilities are of the whole span. `comparable_T` is 0 where the two
    cannot be compared, and the two are equal there."""

    span_T: Tensor  # which one, counted from 0 in a batch
    size_T: Tensor  # tokens of the student in it
    bytes_T: Tensor  # bytes of the text in it; 0: the end of the response
    teacher_logp_T: Tensor
    student_logp_T: Tensor
    comparable_T: Tensor
    first: FirstTokens | None = None

    @staticmethod
    def counted_on(signals: Sequence["Spans"]) -> list["Spans"]:
        """The same in one count of spans: each begins behind the last span of the one before."""
        counts = [int(s.span_T[-1]) + 1 if len(s.span_T) else 0 for s in signals]
        return [replace(s, span_T=s.span_T + sum(counts[:i])) for i, s in enumerate(signals)]


Signal = Dense | TopK | Sampled | Spans


@dataclass(frozen=True)
class Deferred:
    """A signal that does not exist yet: `score` makes those of a micro-batch, just before its loss."""

    score: Callable[[Sequence[Rollout]], list[Signal]]


Kind = TypeVar("Kind", bound=Columns)


def cat_signals(signals: Sequence[Kind]) -> Kind:
    """The signals of several rollouts as one, in order. All of one kind, and equal in what is no column: `Dense` ones
    share a head."""
    first, columns = signals[0], signals[0].columns()
    assert all(type(s) is type(first) for s in signals), "signals of different kinds in one batch"
    for name in (one.name for one in fields(first) if one.compare and one.name not in columns):
        same = all(getattr(s, name) == getattr(first, name) for s in signals)
        assert same, f"{type(first).__name__} signals of different {name} in one batch"
    parts = Spans.counted_on(signals) if isinstance(first, Spans) else signals  # type: ignore[arg-type]
    return replace(first, **{name: _cat([part.columns()[name] for part in parts]) for name in columns})


def _cat(columns: list[Any]) -> Any:
    """Join columns. Page-locked ones stay page-locked: a GPU takes chunks of them while it computes."""
    first = columns[0]
    if isinstance(first, Columns):
        return cat_signals(columns)
    shape = (sum(map(len, columns)), *first.shape[1:])
    return torch.cat(columns, out=first.new_empty(shape, pin_memory=True) if first.is_pinned() else None)


def locked(column: Any) -> Any:
    """A copy of a Tensor or `Columns` in the CPU's memory, page-locked where there is a GPU to carry it back to."""
    if isinstance(column, Columns):
        return column.each(locked)
    copy = torch.empty(column.shape, dtype=column.dtype, device="cpu", pin_memory=is_gpu(column.device))
    return copy.copy_(column)


def beside(column: Any, device: torch.device | str) -> Any:
    """A Tensor or `Columns` on a device, but for hidden states: those of a dense signal may wait in host memory until the head
    takes a chunk of them."""
    if isinstance(column, Dense):
        return column
    return column.each(lambda one: beside(one, device)) if isinstance(column, Columns) else column.to(device)


# ------------------------------------------------------------------ what the loss is given


@dataclass
class Anchor(Columns):
    """The pull that holds the student back: `coefficient` times the KL to the model whose signal this is joins the loss."""

    signal: Signal | Deferred
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
    signal: Signal | Deferred | None = None
    advantage_T: Tensor | None = None
    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    anchor: Anchor | None = None
    objective: str = ""

    @classmethod
    def from_signal(cls, rollout: Rollout, signal: Signal | Deferred) -> "Scored":
        """Score a rollout by a teacher's signal, at every token that the student wrote and that the teacher could score."""
        weight_T = rollout.weight_T()
        if isinstance(signal, Spans):
            weight_T = weight_T * signal.comparable_T.to(weight_T)
        return cls(rollout, weight_T, signal)

    @property
    def signal_bytes(self) -> int:
        """The bytes of the rollout's signals, as they wait for the loss."""
        return sum(part.nbytes for part in (self.signal, self.anchor) if isinstance(part, Columns))


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
            None if self.signal is None else self.signal[tokens],
            None if self.advantage_T is None else self.advantage_T[tokens],
            {name: number_T[tokens] for name, number_T in self.numbers.items()},
            None if self.anchor is None else self.anchor[tokens],
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
