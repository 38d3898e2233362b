"""Teachers turn rollouts into signals: scores of each token.

A `Teacher` is a value. One file here makes each kind of it from its section of the recipe, and what several kinds have
in common is put around it, as `replace(teacher, scorer=...)` does. From the outside in:

    several teachers      who scores which rollout, and how several signals become one
    context               what this teacher's prompt has and the student's has not
    a store of signals    of one teacher, so that a change of one leaves the others' stored; found by what it read
    another tokenizer     the response's tokens become the teacher's, and their scores go back to the student's
    the model or server

The outer ones see the student's rollouts. Context comes before the tokenizer, because each teacher's prompt is rendered
by its own chat template, and before the store, because two rows may differ in nothing else; from there on inwards,
`prompt.ids` are the teacher's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from kibitz.config import SignalKind
from kibitz.engines import Engine, OnReady, nobody_waits
from kibitz.ledger import Count, uncounted
from kibitz.models import LanguageModel
from kibitz.signals import Deferred, Signal
from kibitz.types import Prompt, Rollout, Stateful


@dataclass(frozen=True)
class ScoreRequest:
    """The signal that a teacher is asked for. `top_k` belongs to the signal of that name; `temperature` divides the teacher's
    logits in all but a dense one, which has no temperature yet. `tokens_per_micro_batch` is the asker's own, so that a
    teacher that equals its student reads the same micro-batches and gives bit-equal numbers. `hidden_states` is where those
    of a dense signal wait until they are used. `count` is called with each text that a model reads for it."""

    kind: SignalKind = "dense"
    top_k: int = 64
    temperature: float = 1.0
    tokens_per_micro_batch: int = 16384
    hidden_states: Literal["auto", "device", "cpu"] = "device"
    candidates: Callable[[Sequence[Rollout]], list[Tensor]] | None = None  # of "named": ids [T, K] of each rollout
    candidates_hold: bool = False  # they may be named when a rollout is finished, before all of them are
    count: Count = uncounted


class Scorer(Protocol):
    def score(self, rollouts: Sequence[Rollout]) -> list[Signal]:
        """One signal per rollout, in order, an entry for each response token."""
        ...


@dataclass(frozen=True)
class Late:
    """A scorer of one micro-batch after another, each just before its loss, so that the signals of a step never exist
    together."""

    scorer: Scorer

    def score(self, rollouts: Sequence[Rollout]) -> list[Deferred]:
        return [Deferred(self.scorer.score)] * len(rollouts)


@runtime_checkable
class Prefetching(Protocol):
    """A scorer that can begin before it is asked."""

    def prefetch(self, rollouts: Sequence[Rollout]) -> None:
        """Begin to score these rollouts, which are written while others are not; `score` will ask for them."""
        ...


def prefetch(scorer: Scorer | Late) -> OnReady:
    """Return what an engine calls with finished rollouts: a scorer behind a server begins with them, others wait for all."""
    return scorer.prefetch if isinstance(scorer, Prefetching) else nobody_waits


MakeEngine = Callable[[LanguageModel], Engine]
"""How the method that asks for text would drive a model in this process."""

MakeScorer = Callable[[ScoreRequest], Scorer]


class Voice(NamedTuple):
    """One of several teachers, as a heat-map shows it beside the others. Its `weight` is 0 if it is none of a prompt's
    teachers and can score it all the same."""

    name: str
    weight: float
    teacher: "Teacher"


def _nothing(*_: object) -> None:
    """Do nothing: the default for teachers that need no call."""


def _only_one(_: Prompt) -> Sequence[Voice]:
    return ()


@dataclass(frozen=True)
class Teacher:
    """All that a run knows of its teacher. `kinds` are the signals that it can give, the most telling first.

    `scorer(request)` scores for training. `examiner(request)` scores for evaluations and heat-maps, and fills no store;
    None where these do without the teacher: it is behind a server, or knows certain rollouts only. `voices(prompt)`:
    several teachers one by one.

    `writer(make)`: an engine that writes as this teacher; a model in this process is driven by what `make` makes of it,
    and who cannot do that raises ValueError. `check(prompts, max_tokens)` raises ValueError where the longest do not fit.
    `sync(student)`: the student has learnt, after each step. `metrics()`: numbers of the step since the last call.
    `close()`: nobody asks any more. `models`: those of this process that it reads rollouts with, the student's own left
    out. `stateful`: what changes from step to step, by the names of its files in a checkpoint. `served`: of each server
    that is asked, its name and that of its model."""

    kinds: tuple[SignalKind, ...]
    scorer: MakeScorer
    examiner: MakeScorer | None
    writer: Callable[[MakeEngine], Engine]
    num_parameters: int
    check: Callable[[Sequence[Prompt], int], None] = _nothing
    sync: Callable[[LanguageModel], None] = _nothing
    metrics: Callable[[], dict[str, float]] = dict
    close: Callable[[], None] = _nothing
    models: Sequence[LanguageModel] = ()
    stateful: Mapping[str, Stateful] = field(default_factory=dict)
    voices: Callable[[Prompt], Sequence[Voice]] = _only_one
    served: Sequence[tuple[str, str]] = ()

    def score(self, rollouts: Sequence[Rollout], tokens_per_micro_batch: int = 16384) -> list[Signal]:
        """The most telling signals that it has, at temperature 1: for evaluation, the heat-map and checks."""
        scorer = self.examiner or self.scorer
        return scorer(ScoreRequest(self.kinds[0], tokens_per_micro_batch=tokens_per_micro_batch)).score(rollouts)
