"""Who writes the tokens: each source turns the prompts of a step into rollouts, the same ones for the same seed."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from kibitz.engines import Engine
from kibitz.types import Prompt, Rollout, Sampling, Writer


class Source(Protocol):
    def rollout(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]: ...


@dataclass(frozen=True)
class Sampled:
    """An engine writes: the student's own, one in which the teacher takes part, or (`writer`) another model's."""

    engine: Engine
    sampling: Sampling
    writer: Writer = Writer.STUDENT

    def rollout(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]:
        rollouts = self.engine.generate(prompts, replace(self.sampling, seed=seed))
        return rollouts if self.writer == Writer.STUDENT else [_written_by(self.writer, r) for r in rollouts]


@dataclass(frozen=True)
class Demonstrations:
    """The data wrote: one rollout per prompt, which ends with EOS, and counts as certain when it was sampled."""

    encode_response: Callable[[str], list[int]]

    def rollout(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]:
        return [self._demonstration(prompt) for prompt in prompts]

    def _demonstration(self, prompt: Prompt) -> Rollout:
        assert prompt.response is not None
        ids = self.encode_response(prompt.response)
        rollout = Rollout(prompt, ids, torch.zeros(len(ids)), finished=True, text=prompt.response)
        return _written_by(Writer.DATASET, rollout)


@dataclass(frozen=True)
class Mix:
    """One source or the other, drawn anew for each step: `first` with probability `share` (GKD, 2306.13649, alg. 1)."""

    first: Source
    second: Source
    share: float

    def rollout(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]:
        source = self.first if random.Random(f"mix|{seed}").random() < self.share else self.second
        return source.rollout(prompts, seed)


def _written_by(writer: Writer, rollout: Rollout) -> Rollout:
    return replace(rollout, writer_T=torch.full((rollout.num_tokens,), writer, dtype=torch.uint8))
