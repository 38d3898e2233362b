"""From the recipe's `rollout` to the engine that it names."""

from collections.abc import Sequence
from pathlib import Path

from kibitz.config import RolloutConfig
from kibitz.engines import Engine
from kibitz.engines.torch import TorchEngine
from kibitz.engines.vllm import VLLMEngine
from kibitz.models import LanguageModel
from kibitz.types import Prompt


def make_engine(config: RolloutConfig, student: LanguageModel, folder: Path, probe: Sequence[Prompt]) -> Engine:
    """`folder` is the run's; on the prompts of `probe` servers are compared with the student."""
    if config.engine == "vllm":
        return VLLMEngine(student, config, folder, probe)
    return TorchEngine(student, config.max_rows)
