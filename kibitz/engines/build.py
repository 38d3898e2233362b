"""Build the engine that the recipe's `rollout` names. To add one, enter it in `ENGINES` and in the section."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kibitz.config import RolloutConfig
from kibitz.engines import Engine
from kibitz.engines.overlap import Overlapped
from kibitz.engines.spread import of_first, spread
from kibitz.engines.torch import TorchEngine
from kibitz.engines.vllm import VLLMEngine
from kibitz.models import LanguageModel
from kibitz.parallel.ranks import Ranks
from kibitz.types import Prompt


@dataclass(frozen=True)
class Kind:
    """`make(config, student, folder, probe)` makes it: `folder` is the run's; on the prompts of `probe` servers are
    compared with the student. `in_process`: it writes with the student's weights in this process, so that each process
    writes its share, and a teacher can write along; the others the first process alone has, unless they write one step
    ahead."""

    make: Callable[[RolloutConfig, LanguageModel, Path, Sequence[Prompt]], Engine]
    in_process: bool


def _make_torch(config: RolloutConfig, student: LanguageModel, folder: Path, probe: Sequence[Prompt]) -> Engine:
    return TorchEngine(student, config.max_rows, rounded=config.dtype == "bfloat16")


def _make_vllm(config: RolloutConfig, student: LanguageModel, folder: Path, probe: Sequence[Prompt]) -> Engine:
    return VLLMEngine(student, config, folder, probe)


ENGINES: dict[str, Kind] = {
    "torch": Kind(_make_torch, in_process=True),
    "vllm": Kind(_make_vllm, in_process=False),
}


def make_engine(
    config: RolloutConfig, student: LanguageModel, folder: Path, probe: Sequence[Prompt], ranks: Ranks
) -> Engine:
    """The student's engine, for all processes."""
    kind = ENGINES[config.engine]
    make = partial(kind.make, config, student, folder, probe)
    if kind.in_process:
        return spread(make(), ranks)
    first: list[Any] = []
    ranks.first(lambda: first.append(make()))
    engine = of_first(first, ranks)
    return Overlapped(engine, first, config, student, ranks) if config.max_staleness else engine
