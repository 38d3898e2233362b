"""Sources write the tokens: each turns the prompts of a step into rollouts, the same ones for the same step."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from kibitz.data import apart, joined
from kibitz.engines import Engine, OnReady, nobody_waits
from kibitz.types import Prompt, Rollout, Sampling, Step, Writer


class Source(Protocol):
    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]: ...


@dataclass(frozen=True)
class Linear:
    """A number that goes from `start` at a run's first step to `end` at its last."""

    start: float
    end: float

    def at(self, step: Step) -> float:
        return self.start + (self.end - self.start) * step.progress


@dataclass(frozen=True)
class Generated:
    """An engine writes: the student's own, one in which the teacher takes part, or (`writer`) another model's.

    `limit`, where there is one, stops the responses at so many tokens before `sampling.max_tokens` does (Fast OPD,
    2602.15260): a rollout that had not ended there is `shortened`, not cut off. `on_ready` gets each rollout as the engine
    wrote it, as soon as it is finished."""

    engine: Engine
    sampling: Sampling
    writer: Writer = Writer.STUDENT
    limit: Linear | None = None
    on_ready: OnReady = nobody_waits

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        return self.within(self.max_tokens(step), prompts, step)

    def max_tokens(self, step: Step) -> int:
        most = self.sampling.max_tokens
        return most if self.limit is None else min(most, round(self.limit.at(step)))

    def within(self, max_tokens: int, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        epsilon = self.sampling.epsilon if self.writer == Writer.STUDENT else 0.0  # nobody else explores
        sampling = replace(self.sampling, seed=step.seed, max_tokens=max_tokens, epsilon=epsilon)
        rollouts = joined(prompts, self.engine.generate(apart(prompts), sampling, self.on_ready))
        if max_tokens < self.sampling.max_tokens:
            rollouts = [replace(r, shortened=not r.finished) for r in rollouts]
        return rollouts if self.writer == Writer.STUDENT else [_written_by(self.writer, r) for r in rollouts]


@dataclass(frozen=True)
class Seeded:
    """The teacher writes the first `num_tokens` of each response, and the student goes on from there.

    The two together keep to the student's limit. Each token's log-probability is its own writer's. `learn`: whether
    the teacher's tokens have a loss, too, or are context only."""

    teacher: Generated
    student: Generated
    num_tokens: Linear
    learn: bool = False

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        most = self.student.max_tokens(step)
        num_seeded = min(most, round(self.num_tokens.at(step)))
        if num_seeded == 0:
            return self.student.rollout(prompts, step)
        seeds = self.teacher.within(num_seeded, prompts, step)
        open_seeds = [seed for seed in seeds if not seed.finished]
        if num_seeded == most:
            ends = open_seeds
        else:
            student = replace(self.student, sampling=replace(self.student.sampling, num_samples=1))
            starts = [_as_prompt(seed) for seed in open_seeds]
            rests = student.within(most - num_seeded, starts, step)
            ends = [_joined(*pair) for pair in zip(open_seeds, rests, strict=True)]
        whole = iter(ends)
        shortened = most < self.student.sampling.max_tokens
        return [self._marked(seed if seed.finished else next(whole), seed.num_tokens, shortened) for seed in seeds]

    def _marked(self, rollout: Rollout, num_seeded: int, shortened: bool) -> Rollout:
        shortened = shortened and not rollout.finished
        learn_T = None if self.learn else (torch.arange(rollout.num_tokens) >= num_seeded).float()
        return replace(rollout, learn_T=learn_T, shortened=shortened)


@dataclass(frozen=True)
class Demonstrations:
    """The data wrote: one rollout per prompt, which ends with EOS, and counts as certain when it was sampled."""

    encode_response: Callable[[str], list[int]]

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        return [self._demonstration(prompt) for prompt in prompts]

    def _demonstration(self, prompt: Prompt) -> Rollout:
        assert prompt.response is not None
        ids = self.encode_response(prompt.response)
        rollout = Rollout(prompt, ids, torch.zeros(len(ids)), finished=True, text=prompt.response)
        return _written_by(Writer.DATASET, rollout)


@dataclass(frozen=True)
class Stored:
    """Rollouts of earlier (Lightning OPD, 2604.13010): `num_samples` of each prompt, drawn anew for each step where there
    are more of them. What is learnt from them is off-policy as soon as the student has moved."""

    rollouts: Mapping[str, Sequence[Rollout]]  # by the prompt's key
    num_samples: int

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        return [rollout for prompt in prompts for rollout in self._of(prompt.key, step)]

    def _of(self, key: str, step: Step) -> list[Rollout]:
        held = self.rollouts[key]
        places = random.Random(f"stored|{step.seed}|{key}").sample(range(len(held)), self.num_samples)
        return [held[place] for place in sorted(places)]


@dataclass(frozen=True)
class Mix:
    """One source or the other, drawn anew for each step: `first` with probability `share` (GKD, 2306.13649, alg. 1)."""

    first: Source
    second: Source
    share: Linear

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        source = self.first if random.Random(f"mix|{step.seed}").random() < self.share.at(step) else self.second
        return source.rollout(prompts, step)


@dataclass(frozen=True)
class Split:
    """Both in each step: `first` answers a share of the prompts, `second` the others."""

    first: Source
    second: Source
    share: float

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        num = round(self.share * len(prompts))
        return [*self.first.rollout(prompts[:num], step), *self.second.rollout(prompts[num:], step)]


@dataclass(frozen=True)
class Filled:
    """The data's responses; another writes those that it lacks."""

    data: Source
    other: Source

    def rollout(self, prompts: Sequence[Prompt], step: Step) -> list[Rollout]:
        gaps = [prompt for prompt in prompts if prompt.response is None]
        told = [prompt for prompt in prompts if prompt.response is not None]
        return [*self.data.rollout(told, step), *self.other.rollout(gaps, step)]


def _written_by(writer: Writer, rollout: Rollout) -> Rollout:
    return replace(rollout, writer_T=torch.full((rollout.num_tokens,), writer, dtype=torch.uint8))


def _as_prompt(seed: Rollout) -> Prompt:
    """Return the prompt that the student continues. Its key differs, so that the student's draws never repeat the seed's."""
    key = f"{seed.prompt.key}|{seed.sample}|seeded"
    return replace(seed.prompt, ids=(*seed.prompt.ids, *seed.response_ids), key=key)


def _joined(seed: Rollout, rest: Rollout) -> Rollout:
    assert seed.writer_T is not None
    student_T = torch.full((rest.num_tokens,), Writer.STUDENT, dtype=torch.uint8)
    return replace(
        seed,
        response_ids=seed.response_ids + rest.response_ids,
        logp_T=torch.cat([seed.logp_T, rest.logp_T]),
        finished=rest.finished,
        writer_T=torch.cat([seed.writer_T, student_T]),
    )
