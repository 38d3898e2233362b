"""Teachers made of the student: as it began, its average over time, its base without the adapter, or itself."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kibitz.config import ModelConfig, StudentTeacherConfig
from kibitz.engines import Engine, OnReady, nobody_waits
from kibitz.engines.torch import TorchEngine
from kibitz.ledger import Count, uncounted
from kibitz.models import LanguageModel
from kibitz.models.load import load_model
from kibitz.signals import Signal
from kibitz.teachers import MakeEngine, ScoreRequest, Teacher
from kibitz.teachers.local import KINDS, LocalScorer, local_teacher
from kibitz.types import Prompt, Rollout, Sampling


def own_teacher(config: StudentTeacherConfig, start: ModelConfig, student: LanguageModel) -> Teacher:
    """`start` is the recipe's student, as it was before any training, and before the checkpoint of a run that goes on."""
    match config.student:
        case "start" if student.adapter is None:
            return local_teacher(load_model(start, "teacher", student.device, student.tokenizer))
        case "start" | "base":  # a new adapter changes nothing, so that the base is what an adapted student begins as
            return base_teacher(student)
        case "current":
            return _live(student, adapted=True)
        case "ema":
            average = Average(student, config.decay)
            return replace(local_teacher(average.model), sync=average.follow, stateful={"teacher": average})


def base_teacher(student: LanguageModel) -> Teacher:
    """The base that a student's adapter stands on, in the student's own memory. A run always begins with a new adapter, which
    changes nothing: this is the student before its first step, also where the run goes on from a checkpoint."""
    return _live(student, adapted=False)


def _live(student: LanguageModel, adapted: bool) -> Teacher:
    """The student's own weights, read without gradients."""
    scorer = partial(LocalScorer if adapted else WithoutAdapter, student)
    return Teacher(
        kinds=KINDS,
        scorer=scorer,
        examiner=scorer,
        writer=lambda make: make(student) if adapted else _base_engine(student, make),
        num_parameters=student.num_parameters,
        check=student.check_lengths,
    )


@dataclass(frozen=True)
class WithoutAdapter:
    """Scores with the base that the student's adapter stands on, in the same memory."""

    student: LanguageModel
    request: ScoreRequest

    def score(self, rollouts: Sequence[Rollout]) -> list[Signal]:
        with self.student.adapter_off():
            return LocalScorer(self.student, self.request).score(rollouts)


class BaseEngine:
    """Writes with the adapter switched off."""

    def __init__(self, engine: Engine, student: LanguageModel):
        self.engine, self.student = engine, student

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, on_ready: OnReady = nobody_waits, count: Count = uncounted
    ) -> list[Rollout]:
        with self.student.adapter_off():
            return self.engine.generate(prompts, sampling, on_ready, count)

    def sync(self, student: LanguageModel) -> None:
        self.engine.sync(student)

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.engine.close()


def _base_engine(student: LanguageModel, make: MakeEngine) -> Engine:
    engine = make(student)
    if not isinstance(engine, TorchEngine):
        raise ValueError(
            "a student and its base cannot write one text together, because they are one model: write a teacher of its own "
            "as teacher.model"
        )
    return BaseEngine(engine, student)


class Average:
    """The exponential moving average of what the student learns: a <- decay a + (1 - decay) s after each step, in float32.

    What does not learn is the student's own tensor, so that an adapter's average takes the memory of the adapter."""

    def __init__(self, student: LanguageModel, decay: float):
        self.decay = decay
        shared = [student.tokenizer, *(p for p in student.parameters() if not p.requires_grad)]
        self.model: LanguageModel = copy.deepcopy(student, {id(one): one for one in shared})
        self.model.name = "teacher"
        self.learnt = {name: p for name, p in student.model.named_parameters() if p.requires_grad}
        copies = dict(self.model.model.named_parameters())
        self.copies = {name: copies[name].requires_grad_(False) for name in self.learnt}
        self.average = {name: p.detach().clone().float() for name, p in self.learnt.items()}

    @torch.no_grad()
    def follow(self, student: LanguageModel) -> None:
        for name, average in self.average.items():
            average.lerp_(self.learnt[name].detach().float(), 1.0 - self.decay)
            self.copies[name].copy_(average)

    def state(self) -> dict[str, Tensor]:
        return {name: average.cpu().contiguous() for name, average in self.average.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, average in self.average.items():
            average.copy_(state[name])
            self.copies[name].copy_(average)
