"""What a method is, and what it is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from kibitz.config import MethodConfig, PolicyGradientConfig, Recipe, SignalKind
from kibitz.engines import Engine
from kibitz.engines.torch import TorchEngine
from kibitz.losses.chunked import Criterion, over_chunks
from kibitz.losses.criteria import PolicyLoss
from kibitz.losses.joint import Sum, anchor_kl
from kibitz.losses.policy_gradient import POLICY_LOSSES
from kibitz.methods.candidates import student_top_k
from kibitz.models import LanguageModel
from kibitz.parallel.ranks import ALONE, Ranks
from kibitz.teachers import Early, MakeEngine, Scorer, ScoreRequest, Teacher
from kibitz.teachers.local import reduced
from kibitz.types import Batch, Dense, Prompt, Rollout, Sampled, Sampling, Scored, Signal, Stateful, Step

CHUNK_TOKENS = 256
"""Tokens whose logits exist at one time while a whole rollout's are looked through."""


class Method(Protocol):
    """Rewards, where there is a grader, stand in the rollouts before `signal` is called."""

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        """What is learnt from in one step, in the same order for the same seed; schedules follow `step.progress`."""
        ...

    def signal(self, rollouts: Sequence[Rollout], step: Step) -> list[Scored]:
        """What each token is told; one entry per rollout, in order. `step` is the one whose rollouts these are."""
        ...

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over the batch of weight x loss, not divided, and per-token values `[T]` to log."""
        ...


@dataclass(frozen=True)
class Notes:
    """What was done in a step beside the student, which the trainer cannot know of: FLOPs by phase, and numbers to log.
    The trainer writes them into the step's row and empties them."""

    flops: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def spend(self, phase: str, flops: float) -> None:
        self.flops[phase] = self.flops.get(phase, 0.0) + flops

    def clear(self) -> None:
        self.flops.clear()
        self.metrics.clear()


@dataclass(frozen=True)
class Parts:
    """What methods are made of. `divergence` is the user's own `(student_CS, teacher_CS) -> loss_C`, if one was passed;
    `mask_ids` are the tokens that nobody learns, `stored` the rollouts by prompt key that the method's section names,
    `reference` the frozen model that it compares the student with.

    Who has a state beyond the student's enters it in `stateful` while the method is built; a `Stateful` method is entered as
    "method". Checkpoints hold each as training/NAME.safetensors.

    Of several processes, each has its `rollout` and `signal` asked for the prompts of all and the rollouts of its own;
    what compares rollouts of different prompts does so through `ranks`."""

    recipe: Recipe
    student: LanguageModel
    engine: Engine
    teacher: Teacher | None
    sampling: Sampling
    encode_response: Callable[[str], list[int]]
    divergence: Callable[[Tensor, Tensor], Tensor] | None = None
    mask_ids: tuple[int, ...] = ()
    stored: Mapping[str, Sequence[Rollout]] | None = None
    reference: Teacher | None = None
    stateful: dict[str, Stateful] = field(default_factory=dict)
    notes: Notes = field(default_factory=Notes)
    hears: list[Callable[[Sequence[Rollout]], None]] = field(default_factory=list)  # of rollouts as they are written
    ranks: Ranks = ALONE


def training_request(parts: Parts, kind: SignalKind) -> ScoreRequest:
    """What is asked about a step's rollouts, by the settings of the optimizer."""
    optim = parts.recipe.optim
    return ScoreRequest(kind, tokens_per_micro_batch=optim.tokens_per_micro_batch, hidden_states=optim.hidden_states)


def scorer(parts: Parts, config: MethodConfig) -> Scorer:
    """Who scores for a method: its teacher, asked for the first of the signals it needs that it can give."""
    assert parts.teacher is not None
    needs = config.needs()
    kind: SignalKind = next(kind for kind in needs.signals if kind in parts.teacher.kinds)
    request = training_request(parts, kind)
    if needs.top_k is not None:
        candidates = partial(student_top_k, parts.student, needs.top_k, request.tokens_per_micro_batch)
        request = replace(request, top_k=needs.top_k, temperature=needs.temperature, candidates=candidates)
    made = parts.teacher.scorer(request)
    if isinstance(made, Early):
        parts.hears.append(made.expect)
    return made


def written_logp(rollouts: Sequence[Rollout], signals: Sequence[Signal]) -> list[Tensor]:
    """The log-probability of each written token, on the CPU, from signals that know it."""
    return [_written_logp(rollout, signal).cpu() for rollout, signal in zip(rollouts, signals, strict=True)]


def _written_logp(rollout: Rollout, signal: Signal) -> Tensor:
    if isinstance(signal, Dense):
        token_T = torch.tensor(rollout.response_ids, device=signal.hidden_TD.device)
        with torch.no_grad():
            signal = reduced(signal, token_T, ScoreRequest("sampled"), CHUNK_TOKENS)
    assert isinstance(signal, Sampled)
    return signal.logp_T


def teacher_engine(parts: Parts, make: MakeEngine | None = None) -> Engine:
    """Who writes as the teacher. `make` drives a teacher that is a model in this process; by default one that writes alone."""
    assert parts.teacher is not None
    engine = parts.teacher.writer(make or (lambda model: TorchEngine(model, parts.recipe.rollout.max_rows)))
    return parts.ranks.spread(engine)


def token_loss(
    student: LanguageModel, batch: Batch, criterion: Criterion, chunk_tokens: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """A criterion over all response tokens of a batch, inside the student's own forward pass. The `loss` among the values
    is weighted, so that what is logged is what is learnt; the metrics are not."""
    size = chunk_tokens or student.chunk_tokens
    if batch.tokens.anchor is not None:
        criterion = Sum(criterion, anchor_kl)
    total, values = student(batch, lambda hidden_TD, head: over_chunks(criterion, hidden_TD, head, batch.tokens, size))
    return total, values | {"loss": values["loss"] * batch.tokens.weight_T}


def policy_loss(config: PolicyGradientConfig) -> PolicyLoss:
    """The policy loss that a section names, with its bounds."""
    function = POLICY_LOSSES[config.policy_loss]
    match config.policy_loss:
        case "ppo_clip":
            return partial(function, low=config.clip_ratio, high=config.clip_ratio)
        case "truncated":
            return partial(function, cap=config.ratio_cap)
        case "banded":
            return partial(function, low=config.ratio_floor, high=config.ratio_cap)
        case "one_sided":
            return partial(function, drop=config.max_drop)
        case "sampled_token":
            return function
