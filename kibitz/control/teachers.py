"""Teachers of policies: a file of stable-baselines3, a run of kibitz, a function, a server. Answers are checked where they enter.

A teacher says which action it would take; where it knows them, also the deviation of its Gaussian (continuous) or the
log-probabilities of all actions (discrete). One that says actions only, and is asked for a distribution, is asked `samples` times
(RPD, 2503.05833).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kibitz.control.environments import Shape

SMALLEST_STD = 1e-2
"""Of a Gaussian fitted to a few answers: equal answers are no proof of certainty."""
MOST_KNOWN = 200_000
"""Observations whose answers are kept."""
ROUNDING = 1e-4
"""Of the range of an action: so far outside its bounds it still counts as inside."""


class TeacherError(ValueError):
    """A teacher failed, was too slow, or said what cannot be. The message names it."""


@dataclass(frozen=True)
class Answer:
    """What a teacher says of a batch. `action` is [B, A] or, discrete, [B]; `std_BA` or `logp_BK` where it knows them."""

    action: np.ndarray
    std_BA: np.ndarray | None = None
    logp_BK: np.ndarray | None = None


class Teacher(Protocol):
    """`flops` are those of one observation, 0 where nobody knows."""

    name: str
    flops: float

    def answer(self, observed_BO: np.ndarray) -> Answer: ...


def checked(name: str, answer: Answer, size: int, shape: Shape) -> Answer:
    """The answer in its types, with actions in their bounds; TeacherError for one that cannot be."""
    action = np.asarray(answer.action)
    if action.dtype.kind not in "iuf":
        raise TeacherError(
            f"{name} answered with {action.dtype} and not with numbers: its actions are {action.tolist()!r:.80}"
        )
    wanted = (size,) if shape.discrete else (size, len(shape.low_A))
    if action.shape != wanted and action.size == np.prod(wanted):
        action = action.reshape(wanted)
    if action.shape != wanted:
        raise TeacherError(
            f"{name} answered {size} observations with actions of shape {action.shape}: it must be {wanted}"
        )
    if not np.isfinite(action).all():
        raise TeacherError(f"{name} answered with an action that is not finite")
    if shape.discrete:
        whole = action.astype(np.int64)
        if (whole != action).any() or (whole < 0).any() or (whole >= shape.num_actions).any():
            raise TeacherError(
                f"{name} answered with {_odd(action, whole, shape)}: an action is 0 to {shape.num_actions - 1}"
            )
        return Answer(whole, None, answer.logp_BK)
    slack = ROUNDING * (shape.high_A - shape.low_A)
    outside = (action < shape.low_A - slack) | (action > shape.high_A + slack)
    if outside.any():
        raise TeacherError(
            f"{name} answered with {float(action[outside][0]):.4g}, out of the range "
            f"{shape.low_A.tolist()} to {shape.high_A.tolist()} of an action"
        )
    return Answer(np.clip(action.astype(np.float64), shape.low_A, shape.high_A), answer.std_BA, None)


def _odd(action: np.ndarray, whole: np.ndarray, shape: Shape) -> float:
    wrong = (whole != action) | (whole < 0) | (whole >= shape.num_actions)
    return float(action[wrong][0])


# ------------------------------------------------------------------ kinds


class FunctionTeacher:
    """A function from observations to actions. What it raises is a TeacherError."""

    flops = 0.0

    def __init__(self, name: str, function: Callable[[np.ndarray], Any], shape: Shape):
        self.name, self.function, self.shape = name, function, shape

    def answer(self, observed_BO: np.ndarray) -> Answer:
        try:
            action = self.function(observed_BO)
        except Exception as error:  # whatever somebody's function raises is its failure
            raise TeacherError(f"{self.name} failed: {type(error).__name__}: {error}") from error
        return checked(self.name, Answer(np.asarray(action)), len(observed_BO), self.shape)


class NetworkTeacher:
    """A policy of stable-baselines3, deterministic; of its actor-critic policies with the distribution."""

    def __init__(self, name: str, model: Any, shape: Shape):
        self.name, self.model, self.shape = name, model, shape
        self.flops = 2.0 * sum(p.numel() for p in model.policy.parameters() if p.dim() > 1)
        self.knows = hasattr(model.policy, "get_distribution")

    def answer(self, observed_BO: np.ndarray) -> Answer:
        import torch

        if not self.knows:
            action, _ = self.model.predict(observed_BO, deterministic=True)
            return checked(self.name, Answer(action), len(observed_BO), self.shape)
        with torch.no_grad():
            found = self.model.policy.get_distribution(self.model.policy.obs_to_tensor(observed_BO)[0]).distribution
        if self.shape.discrete:
            logp_BK = found.logits.double().cpu().numpy()
            return Answer(logp_BK.argmax(-1), None, logp_BK)
        action = found.mean.double().cpu().numpy().clip(self.shape.low_A, self.shape.high_A)
        return Answer(action, found.stddev.double().cpu().numpy(), None)


class NoisyTeacher:
    """A teacher whose actions are disturbed: Gaussian noise, or at that rate any action. To make a mediocre one."""

    def __init__(self, inner: Teacher, noise: float, seed: int, shape: Shape):
        self.inner, self.noise, self.shape = inner, noise, shape
        self.name, self.flops, self.rng = inner.name, inner.flops, np.random.default_rng(seed)

    def answer(self, observed_BO: np.ndarray) -> Answer:
        found = self.inner.answer(observed_BO)
        if self.shape.discrete:
            lost = self.rng.random(len(found.action)) < self.noise
            anyone = self.rng.integers(self.shape.num_actions, size=len(found.action))
            return Answer(np.where(lost, anyone, found.action))
        scale = self.noise * (self.shape.high_A - self.shape.low_A)
        action = found.action + scale * self.rng.standard_normal(found.action.shape)
        return Answer(action.clip(self.shape.low_A, self.shape.high_A))


def reseed(teacher: Any, seed: int) -> None:
    """Have a teacher's noise begin from a seed, so that a run that goes on hears what it would have heard."""
    if isinstance(teacher, NoisyTeacher):
        teacher.rng = np.random.default_rng(seed)
    if hasattr(teacher, "inner"):
        reseed(teacher.inner, seed)


class CachedTeacher:
    """Asks once for each observation, and forgets all when it knows too many. Of a teacher that answers with actions only."""

    def __init__(self, inner: Teacher):
        self.inner, self.name, self.flops = inner, inner.name, inner.flops
        self.known: dict[bytes, np.ndarray] = {}

    def answer(self, observed_BO: np.ndarray) -> Answer:
        if len(self.known) > MOST_KNOWN:
            self.known.clear()
        keys = [row.tobytes() for row in observed_BO]
        new = {key: place for place, key in enumerate(keys) if key not in self.known}
        if new:
            found = self.inner.answer(observed_BO[list(new.values())])
            self.known.update(zip(new, found.action, strict=True))
        return Answer(np.stack([self.known[key] for key in keys]))


class SampledTeacher:
    """Fits a distribution to several answers: a Gaussian of continuous actions, of discrete ones shares, one added to each."""

    def __init__(self, inner: Teacher, samples: int, shape: Shape):
        self.inner, self.samples, self.shape = inner, samples, shape
        self.name, self.flops = inner.name, samples * inner.flops

    def answer(self, observed_BO: np.ndarray) -> Answer:
        actions = np.stack([self.inner.answer(observed_BO).action for _ in range(self.samples)])
        if self.shape.discrete:
            counts_BK = np.eye(self.shape.num_actions)[actions].sum(0) + 1.0
            return Answer(counts_BK.argmax(-1), None, np.log(counts_BK / counts_BK.sum(-1, keepdims=True)))
        floor = SMALLEST_STD * (self.shape.high_A - self.shape.low_A)
        return Answer(actions.mean(0), np.maximum(actions.std(0, ddof=min(1, self.samples - 1)), floor), None)
