"""`kibitz check`: everything about a recipe that can be known before training, as lights with a sentence each.

First text and sizes, without weights: tokenizers, templates, ends, lengths, memory, cost. Then, with the models loaded, a
few rollouts: does the student read 0 against itself, do engine and trainer agree, how far is the teacher, is it better?
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from kibitz.config import LocalTeacherConfig, Recipe, StoredTeacherConfig
from kibitz.methods import teacher_engine
from kibitz.models.load import load_model, load_tokenizer, pick_device, pick_dtype
from kibitz.preflight import budget, fitting, measured, texts
from kibitz.preflight.finding import Finding, Light, worst
from kibitz.preflight.shapes import shape_of
from kibitz.preflight.speed import rounding, speed_of
from kibitz.signals import TopK
from kibitz.teachers import ScoreRequest, Teacher
from kibitz.teachers.local import LocalScorer
from kibitz.training.setup import Setup, prepare, training_prompts
from kibitz.types import Rollout, is_gpu

__all__ = ["REFUSED", "Finding", "Light", "Options", "check", "check_files", "worst"]


REFUSED = ("tokenizer", "lengths")
"""Findings that training refuses in a sentence of its own."""


@dataclass(frozen=True)
class Options:
    """The assumptions of a check. `price` is the price of one device for one hour; `teraflops` is the speed in TFLOP/s that a
    device reaches in matrix products (measured if None); `gibibytes` is a device's memory (read from it if None); `prompts`
    is the number of prompts that both models answer; `local_teacher` is a copy of the teacher to compare a server with."""

    price: float | None = None
    teraflops: float | None = None
    gibibytes: float | None = None
    devices: int = 1
    prompts: int = 32
    local_teacher: str | None = None


def check(recipe: Recipe, options: Options = Options()) -> Iterator[Finding]:
    """Yield all findings, each as soon as it is made. Mistakes in the recipe raise ValueError as in training."""
    findings = list(check_files(recipe, options))
    yield from findings
    if worst(findings) != "red":  # what is loaded now could not be trained
        yield from _measured(prepare(recipe, overwrite=True), options)


def check_files(recipe: Recipe, options: Options = Options()) -> Iterator[Finding]:
    """Yield the findings that need no weights. `kibitz train` prints them before it starts."""
    student = load_tokenizer(recipe.student, "student")
    prompts = training_prompts(recipe, student)
    for section in _models(recipe):
        teacher = load_tokenizer(section, "teacher")
        if section.tokenizer == "own":
            yield texts.aligned(student, teacher, prompts)
            continue
        yield texts.tokenizers(student, teacher)
        yield texts.first_token(student, teacher, prompts)
        yield texts.chat_template(recipe, student, teacher)
        stops = texts.stop_tokens(recipe.student, student, recipe.rollout.stop), texts.stop_tokens(section, teacher, [])
        yield texts.ends(student, teacher, *stops)
    yield texts.thinking(recipe, student)
    yield from _sizes(recipe, options, [len(prompt.ids) for prompt in prompts])


def _models(recipe: Recipe) -> list[LocalTeacherConfig]:
    """The teachers that are models of their own in this process."""
    return [section for section in recipe.teachers if isinstance(section, LocalTeacherConfig)]


def _sizes(recipe: Recipe, options: Options, prompt_lengths: list[int]) -> Iterator[Finding]:
    device, sections = pick_device(recipe.device), [recipe.student, *_models(recipe)]
    planned = (
        device if options.gibibytes is None else torch.device("cuda")
    )  # --memory is of a GPU, wherever it is asked
    try:
        shapes = [shape_of(section, pick_dtype(section.dtype, planned)) for section in sections]
        others = {key: shape_of(one, pick_dtype(one.dtype, planned)) for key, one in recipe.other_models().items()}
    except ValueError as error:
        yield Finding("sizes", "amber", f"{error}; lengths, memory and cost are not planned")
        return
    student, teachers = shapes[0], shapes[1:]
    yield texts.lengths(recipe, prompt_lengths, [shape.max_positions for shape in shapes])
    models = budget.Models(student, teachers, **others)
    room, what = (
        budget.device_room(device) if options.gibibytes is None else (options.gibibytes * budget.GIB, "the device")
    )
    on_gpu = room if is_gpu(planned) else None
    longest, program = max(prompt_lengths), budget.program_bytes(planned)
    plan = partial(
        budget.memory, models=models, longest_prompt=longest, devices=options.devices, room=on_gpu, program=program
    )
    lines = None if room is None else fitting.changes(recipe, plan, room)
    step = plan(recipe)
    yield budget.memory_finding(step, room, what, lines or ())
    if on_gpu is not None:
        yield from texts.attention([("student", student), *(("teacher", one) for one in teachers)])
    if planned.type == "cpu":
        yield from rounding(recipe, shapes)
    speed = speed_of(device, None if options.teraflops is None else options.teraflops * 1e12)
    yield budget.cost_finding(
        budget.cost(
            recipe, student, teachers, prompt_lengths, speed, options.price, options.devices, step.rows or None
        ),
        speed,
    )


def _measured(setup: Setup, options: Options) -> Iterator[Finding]:
    try:
        rollouts = measured.write(setup, options.prompts)
        yield measured.endings(rollouts, setup.parts.recipe.rollout.max_tokens)
        yield measured.itself(setup, rollouts)
        yield measured.engine_gap(setup, rollouts)
        if setup.parts.teacher is not None:
            yield from _of_teacher(setup, setup.parts.teacher, rollouts, options)
        written = None
        if (
            setup.parts.teacher is not None
            and setup.grader
            and all(section.writes() for section in setup.parts.recipe.teachers)
        ):
            written = measured.write_with(setup, teacher_engine(setup.parts), options.prompts)
        finding = measured.task(setup, written, rollouts)
        if finding is not None:
            yield finding
    finally:
        setup.engine.close()
        if setup.parts.teacher is not None:
            setup.parts.teacher.close()


def _of_teacher(setup: Setup, teacher: Teacher, rollouts: list[Rollout], options: Options) -> Iterator[Finding]:
    """Yield the findings about the teacher's scores of these rollouts. A chat endpoint scores nothing, and stored scores are of
    other rollouts: neither gives a finding."""
    if not teacher.kinds or any(isinstance(section, StoredTeacherConfig) for section in setup.parts.recipe.teachers):
        return
    signals = teacher.score(rollouts, setup.parts.recipe.optim.tokens_per_micro_batch)
    yield from measured.opinions(setup, rollouts, signals)
    if options.local_teacher is not None:
        if "sampled" not in teacher.kinds:
            raise ValueError("--local-teacher compares the written tokens' probabilities, and this teacher gives none")
        copy = load_model(LocalTeacherConfig(model=options.local_teacher), "teacher", setup.parts.student.device)
        both = [
            scorer.score(rollouts)
            for scorer in (teacher.scorer(ScoreRequest("sampled")), LocalScorer(copy, ScoreRequest("sampled")))
        ]
        yield measured.teacher_gap(*both)
    # A server gives its log-probabilities at temperature 1 only, and then refuses a recipe with another.
    if "dense" in teacher.kinds and "top_k" in teacher.kinds:
        first, second = (
            teacher.scorer(ScoreRequest("top_k", temperature=tau)).score(rollouts[:1])[0] for tau in (1.0, 2.0)
        )
        assert isinstance(first, TopK) and isinstance(second, TopK)
        yield measured.loss_temperature(first, second)
