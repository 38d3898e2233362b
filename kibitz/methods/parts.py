"""The interface of a method, and the parts that methods are made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from kibitz.config import MethodConfig, PolicyGradientConfig, Recipe, SignalKind
from kibitz.engines import Engine
from kibitz.engines.build import ENGINES
from kibitz.engines.spread import Counted, spread
from kibitz.engines.torch import TorchEngine
from kibitz.ledger import Ledger
from kibitz.losses.chunked import Criterion, over_chunks
from kibitz.losses.criteria import PolicyLoss
from kibitz.losses.joint import Sum, anchor_kl
from kibitz.losses.policy_gradient import POLICY_LOSSES
from kibitz.methods.candidates import student_top_k
from kibitz.models import LanguageModel
from kibitz.parallel.ranks import ALONE, Ranks
from kibitz.signals import Batch, Dense, Sampled, Scored, Signal
from kibitz.teachers import Late, MakeEngine, Scorer, ScoreRequest, Teacher
from kibitz.teachers.local import LocalScorer, reduced
from kibitz.types import Prompt, Rollout, Sampling, Stateful, Step


class Method(Protocol):
    """Rewards, where there is a grader, stand in the rollouts before `signal` is called."""

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        """Return the rollouts of one step, in the same order for the same seed; schedules follow `step.progress`."""
        ...

    def signal(self, rollouts: Sequence[Rollout], step: Step) -> list[Scored]:
        """Score the rollouts: one entry for each, in order. `step` is the one whose rollouts these are."""
        ...

    def loss(self, student: LanguageModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum over the batch of weight x loss, not divided, and per-token values `[T]` to log."""
        ...


@dataclass(frozen=True)
class Parts:
    """The parts that methods are made of. `divergence` is the user's own `(student_CS, teacher_CS) -> loss_C`, if one was
    passed; `mask_ids` are the tokens that are never learnt, `stored` the rollouts by prompt key that the method's section
    names, `reference` the frozen model that it compares the student with. The passes of `engine`, and of whatever the
    functions below make, enter themselves in the `ledger`. A method enters its other passes with `ledger.reading` or `spend`,
    in the process that runs them, and numbers for the step's row in `ledger.metrics`.

    A part with a state beyond the student's is entered in `stateful` while the method is built; a `Stateful` method is
    entered as "method". Checkpoints hold each as training/NAME.safetensors.

    With several processes, `rollout` gets the prompts of all, and `signal` the rollouts of its own process; what compares
    rollouts of different prompts does so through `ranks`."""

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
    ranks: Ranks = ALONE
    ledger: Ledger = field(default_factory=Ledger)
    stateful: dict[str, Stateful] = field(default_factory=dict)


def training_request(parts: Parts, kind: SignalKind, phase: str) -> ScoreRequest:
    """Return the request to score a step's rollouts, by the settings of the optimizer. The ledger counts it as `phase`."""
    optim = parts.recipe.optim
    return ScoreRequest(
        kind,
        tokens_per_micro_batch=optim.tokens_per_micro_batch,
        hidden_states=optim.hidden_states,
        count=parts.ledger.reading(phase),
    )


def scorer(parts: Parts, config: MethodConfig) -> Scorer:
    """Return the scorer of a method: its teacher's, for the first of the signals it needs that the teacher can give."""
    assert parts.teacher is not None
    needs = config.needs()
    kind: SignalKind = next(kind for kind in needs.signals if kind in parts.teacher.kinds)
    request = training_request(parts, kind, "teacher_scoring")
    if needs.top_k is not None:
        count, size = parts.ledger.reading("student_training"), request.tokens_per_micro_batch
        candidates = partial(student_top_k, parts.student, needs.top_k, size, count=count)
        rollout = parts.recipe.rollout  # one step ahead, the student moves between writing and scoring
        hold = parts.ranks.size == 1 and not ENGINES[rollout.engine].in_process and rollout.max_staleness == 0
        asked = {"top_k": needs.top_k, "temperature": needs.temperature}
        request = replace(request, **asked, candidates=candidates, candidates_hold=hold)
    return parts.teacher.scorer(request)


def late_scorer(parts: Parts, config: MethodConfig) -> Scorer | Late:
    """The same for a method that needs the scores in its loss alone: late, where the recipe allows it."""
    return Late(scorer(parts, config)) if parts.recipe.scores_late() else scorer(parts, config)


def student_scorer(parts: Parts) -> Scorer:
    """The student as it is now, on text that it has not written alone: one more pass of its training."""
    tokens, count = parts.recipe.optim.tokens_per_micro_batch, parts.ledger.reading("student_training")
    return LocalScorer(parts.student, ScoreRequest("sampled", tokens_per_micro_batch=tokens, count=count))


def written_logp(rollouts: Sequence[Rollout], signals: Sequence[Signal]) -> list[Tensor]:
    """The log-probability of each written token, on the CPU, from signals that know it."""
    return [_written_logp(rollout, signal).cpu() for rollout, signal in zip(rollouts, signals, strict=True)]


def _written_logp(rollout: Rollout, signal: Signal) -> Tensor:
    if isinstance(signal, Dense):
        token_T = torch.tensor(rollout.response_ids, device=signal.hidden_TD.device)
        with torch.no_grad():
            signal = reduced(signal, token_T, ScoreRequest("sampled"))
    assert isinstance(signal, Sampled)
    return signal.logp_T


def teacher_engine(parts: Parts) -> Engine:
    """Return the engine that writes as the teacher."""
    assert parts.teacher is not None
    engine = parts.teacher.writer(lambda model: TorchEngine(model, parts.recipe.rollout.max_rows))
    return Counted(spread(engine, parts.ranks), parts.ledger.reading("teacher_sampling"))


def joint_engine(parts: Parts, make: MakeEngine) -> Engine:
    """Return the engine that writes as student and teacher together: `make` builds it from the teacher's model."""
    assert parts.teacher is not None
    if not ENGINES[parts.recipe.rollout.engine].in_process:
        raise ValueError(
            f"{parts.recipe.method.type} writes with a student in this process: write rollout.engine: torch"
        )
    own, other = parts.ledger.reading("student_sampling"), parts.ledger.reading("teacher_sampling")

    def count(model: LanguageModel, rollouts: Sequence[Rollout]) -> None:
        (own if model is parts.student else other)(model, rollouts)

    return Counted(spread(parts.teacher.writer(make), parts.ranks), count)


def token_loss(
    student: LanguageModel, batch: Batch, criterion: Criterion, chunk_tokens: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """A criterion over all response tokens of a batch, inside the student's own forward pass. The `loss` among the values
    is weighted, so that what is logged is what is learnt; the metrics are not. The load-balancing loss of a mixture of experts,
    where its configuration asks for it, is a part of the loss of each token of a row."""
    size = chunk_tokens or student.chunk_tokens
    if batch.tokens.anchor is not None:
        criterion = Sum(criterion, anchor_kl)

    def use(hidden_TD: Tensor, head: nn.Module, balance_T: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        total, values = over_chunks(criterion, hidden_TD, head, batch.tokens, size)
        if balance_T is None:
            return total, values
        balanced = {"loss": values["loss"] + balance_T.detach(), "balance_loss": balance_T.detach()}
        return total + (balance_T * batch.tokens.weight_T).sum(), values | balanced

    total, values = student(batch, use, balanced=True)
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
