"""Wrappers of an engine: one spreads its work over several processes, one enters its cost in the ledger."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kibitz.engines import Engine, OnReady, nobody_waits
from kibitz.ledger import Count, uncounted
from kibitz.parallel.ranks import Ranks
from kibitz.types import Prompt, Rollout, Sampling


def spread(engine: Engine, ranks: Ranks) -> Engine:
    """The same engine, for which each process writes its share."""
    return engine if ranks.size == 1 else _Spread(engine, ranks)


def of_first(engines: Sequence[Engine], ranks: Ranks) -> Engine:
    """An engine that the first process alone has, and which writes for all: one that speaks to servers. `engines` is empty in
    the others."""
    return engines[0] if ranks.size == 1 else _OfFirst(engines, ranks)


@dataclass(frozen=True)
class Counted:
    """An engine that writes for training, where all it reads is counted. An evaluation asks the engine itself."""

    engine: Engine
    count: Count

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_ready: OnReady = nobody_waits, count: Count = uncounted
    ) -> list[Rollout]:
        def both(model: Any, rollouts: Sequence[Rollout]) -> None:
            self.count(model, rollouts)
            count(model, rollouts)

        return self.engine.generate(prompts, sampling, on_ready, both)

    def sync(self, student: Any) -> None:
        self.engine.sync(student)

    def metrics(self) -> dict[str, Any]:
        return self.engine.metrics()

    def close(self) -> None:
        self.engine.close()


@dataclass(frozen=True)
class _Spread:
    engine: Engine
    ranks: Ranks

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_ready: OnReady = nobody_waits, count: Count = uncounted
    ) -> list[Rollout]:
        return self.ranks.in_shares(lambda part: self.engine.generate(part, sampling, on_ready, count), prompts)

    def sync(self, student: Any) -> None:
        self.engine.sync(student)

    def metrics(self) -> dict[str, Any]:
        return self.engine.metrics()

    def close(self) -> None:
        self.engine.close()


@dataclass(frozen=True)
class _OfFirst:
    """The first process writes for all and reports no rollout early: each is scored in the process whose share it is."""

    engines: Sequence[Engine]  # one, or none
    ranks: Ranks

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_ready: OnReady = nobody_waits, count: Count = uncounted
    ) -> list[Rollout]:
        return self.ranks.first(lambda: self.engines[0].generate(prompts, sampling, count=count))

    def sync(self, student: Any) -> None:
        self.ranks.first(lambda: self.engines[0].sync(student))

    def metrics(self) -> dict[str, Any]:
        return {name: value for engine in self.engines for name, value in engine.metrics().items()}

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
