"""Setup turns a recipe into everything that a run needs, cheapest first: what can be refused is refused before weights load."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from kibitz import config, graders, optim
from kibitz.config import DataConfig, FrozenConfig, LocalTeacherConfig, Recipe, RecipeError
from kibitz.data import PromptStream, encode_response, load_grader, load_prompts
from kibitz.engines import Engine
from kibitz.engines.build import make_engine
from kibitz.engines.spread import Counted
from kibitz.evaluate.evaluate import Evaluator
from kibitz.graders import Grader
from kibitz.ledger import Ledger
from kibitz.losses.products import onednn_is_faster
from kibitz.methods import Parts
from kibitz.methods.stored import load_rollouts
from kibitz.models import LanguageModel, lora, offload, quantized
from kibitz.models.language_model import num_ids
from kibitz.models.load import (
    check_same_tokenizer,
    load_model,
    load_student,
    load_tokenizer,
    position_limit,
    save_ends,
    share_vocabulary,
    single_tokens,
    stop_ids,
)
from kibitz.models.lora import allow_tf32
from kibitz.models.packing import pack_rows
from kibitz.models.rotary import rotations_vary
from kibitz.parallel import fsdp
from kibitz.parallel.ranks import Ranks
from kibitz.teachers import Teacher
from kibitz.teachers import build as teachers
from kibitz.teachers.local import local_teacher
from kibitz.teachers.own import base_teacher
from kibitz.training import hosting, trackers
from kibitz.training.folder import RunFolder, open_folder
from kibitz.training.hosting import Served
from kibitz.training.meeting import kept_small, meet
from kibitz.training.memory import Gauge, clock_of
from kibitz.training.room import fitted
from kibitz.training.same_run import Fingerprint, check_same, fingerprint, served, with_date
from kibitz.types import Prompt, Rollout, Sampling

log = logging.getLogger(__name__)


@dataclass
class Setup:
    """All that a run needs: what methods are made of, and what the loop has around them."""

    parts: Parts
    folder: RunFolder
    resumed_from: Path | None
    fingerprint: Fingerprint
    """Of what the run reads, for its checkpoints."""
    learner: LanguageModel
    """The student that is trained: the same, or beside a whole one in several processes its sharded copy."""
    engine: Engine
    """That of `parts`, whose passes nobody counts: for evaluation, and to hand it weights."""
    stream: PromptStream
    grader: Grader | None
    evaluator: Evaluator | None
    servers: Served
    """Those that the run has started."""
    put_back: Callable[[], None]
    """Puts back what torch may multiply float32 by, TF32 or not, which is one setting for the whole process."""

    def close(self) -> None:
        """Let go of servers and of what the teacher holds; end the servers that the run has started."""
        self.put_back()
        self.engine.close()
        if self.parts.teacher is not None:
            self.parts.teacher.close()
        self.servers.close()


def prepare(
    source: "str | Path | dict | Recipe",
    overrides: Sequence[str] = (),
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    grader: Grader | None = None,
    resume: bool = False,
    overwrite: bool = False,
    told: Callable[[str], object] = log.info,
) -> Setup:
    """Check a recipe against the world, start the servers that it wants, then load it. `told` hears how these come up."""
    if resume and overwrite:
        raise ValueError("resume continues a run and overwrite deletes it: choose one of them")
    recipe = config.load(source, list(overrides))
    if recipe.student.lora is not None:
        lora.require_peft()
    quantized.require(recipe.student.quantize, recipe.student.model, "student", recipe.student.trust_remote_code)
    optim.require(recipe.optim)
    trackers.require(recipe.track)
    hosting.require(recipe)
    tokenizer = load_tokenizer(recipe.student, "student")
    recipe = with_date(recipe, tokenizer, resume)
    _check_other_models(recipe, tokenizer)
    mask_ids = single_tokens(tokenizer, recipe.method.mask_tokens, "method.mask_tokens")
    prompts = training_prompts(recipe, tokenizer)
    held_out = _held_out(recipe, tokenizer)
    grader = grader or _grader(recipe, prompts, held_out)
    stored = _stored(recipe, prompts, num_ids(tokenizer))
    if grader is not None:
        graders.check(grader, held_out)
    teacher_tokenizers = teachers.check_all(recipe, tokenizer, [*prompts, *held_out])
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    onednn_is_faster()  # whose answer, or error about the environment, belongs before the weights
    ranks, device = meet(recipe, prompts)
    folder, resumed_from = open_folder(recipe, resume, overwrite, ranks)
    known = ranks.first(lambda: fingerprint(recipe, prompts, teacher_tokenizers))
    ranks.first(lambda: check_same(folder.path, resumed_from, known))
    servers = hosting.serve(recipe, device, folder.path, ranks, told)
    try:
        data = _Data(tokenizer, teacher_tokenizers, prompts, held_out, mask_ids, stored, grader)
        return _loaded(servers, data, folder, resumed_from, known, device, ranks, loss)
    except BaseException:
        servers.close()
        raise


@dataclass(frozen=True)
class _Data:
    """What a recipe names beside models."""

    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizers: list
    prompts: list[Prompt]
    held_out: list[Prompt]
    mask_ids: tuple[int, ...]
    stored: dict[str, list[Rollout]] | None
    grader: Grader | None


def _loaded(
    servers: Served,
    data: _Data,
    folder: RunFolder,
    resumed_from: Path | None,
    known: Fingerprint,
    device: torch.device,
    ranks: Ranks,
    loss: Callable[[Tensor, Tensor], Tensor] | None,
) -> Setup:
    """Load the models, and make everything that is made of them."""
    recipe, tokenizer, teacher_tokenizers = servers.recipe, data.tokenizer, data.teacher_tokenizers
    prompts, held_out, mask_ids, stored, grader = data.prompts, data.held_out, data.mask_ids, data.stored, data.grader
    student = _student(recipe, device, tokenizer, resumed_from, ranks)
    teacher = teachers.load_all(recipe, teacher_tokenizers, student, _teacher_loader(recipe, ranks))
    known |= served(teacher)
    ranks.first(lambda: check_same(folder.path, resumed_from, known))
    reference = _reference(recipe, student, ranks)
    _read_alike(recipe, student, teacher, reference)
    for check in [student.check_lengths, *(model.check for model in (teacher, reference) if model is not None)]:
        check([*prompts, *held_out], recipe.rollout.max_tokens)
    longest = max(len(prompt.ids) for prompt in prompts) + recipe.rollout.max_tokens
    recipe = fitted(recipe, _models(student, teacher, reference), longest, ranks)
    learner = fsdp.learner_of(student, ranks)
    encode = partial(encode_response, tokenizer)
    _hold_rotations(recipe, [*_models(student, teacher, reference), learner], [*prompts, *held_out], encode)
    engine = make_engine(recipe.rollout, student, folder.path, prompts[:2], ranks)
    sampling = _sampling(recipe, student)
    for model in (student, learner):
        save_ends(model, sampling.stop_ids)
    ledger = Ledger(watch=Gauge(student.device), clock=clock_of(student.device))
    counted = Counted(engine, ledger.reading("student_sampling"))
    parts = Parts(recipe, student, counted, teacher, sampling, encode, loss, mask_ids, stored, reference, ranks, ledger)
    parts.stateful.update({} if teacher is None else teacher.stateful)
    stream = PromptStream(prompts, recipe.seed, recipe.data.shuffle)
    looked_at = held_out or _some_to_show(recipe, prompts, ranks)
    evaluator = _evaluator(parts, engine, looked_at, grader, bool(held_out)) if looked_at else None
    dtypes = [model.model.dtype for model in _models(student, teacher, reference)]
    put_back = allow_tf32(student.adapter, dtypes)  # behind all that can fail
    return Setup(parts, folder, resumed_from, known, learner, engine, stream, grader, evaluator, servers, put_back)


def _grader(recipe: Recipe, prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> Grader | None:
    """The grader of the prompts; of those of the evaluation where only they have answers and no reward is trained on."""
    needed = recipe.method.needs().reward
    if not needed and recipe.data.world is None and not any(prompt.answer for prompt in prompts):
        prompts = held_out if any(prompt.answer for prompt in held_out) else prompts
    grader = load_grader(recipe.data, prompts, needed)
    if needed and grader is None:
        raise RecipeError(
            f"method {recipe.method.type} needs rewards: give rows an answer, name data.grader, or pass grader="
        )
    return grader


def _some_to_show(recipe: Recipe, prompts: Sequence[Prompt], ranks: Ranks) -> list[Prompt]:
    """The first prompts of training, for the heat-map of a run that has no others; each process gets one."""
    num = recipe.eval.heatmaps and max(recipe.eval.heatmaps, ranks.size)
    return list({prompt.key: prompt for prompt in prompts}.values())[:num]


def _evaluator(
    parts: Parts, engine: Engine, prompts: Sequence[Prompt], grader: Grader | None, held_out: bool
) -> Evaluator:
    """The evaluation of a run; a teacher that knows certain rollouts only has no part in it."""
    section, teacher = parts.recipe.eval, parts.teacher
    examiner = teacher if teacher is not None and teacher.examiner is not None else None
    sampling = replace(parts.sampling, num_samples=section.samples, seed=section.seed)
    split = section.split if held_out else parts.recipe.data.split
    return Evaluator(parts.student, engine, examiner, prompts, grader, sampling, split, parts.ranks, held_out)


def _read_alike(recipe: Recipe, student: LanguageModel, *teachers: Teacher | None) -> None:
    """Have all models of a run read the same tokens, with padding or without, and equal ones to the same bits."""
    models = _models(student, *teachers)
    share_vocabulary(models)
    pack_rows(models, recipe.optim.packing)
    if not isinstance(student, FSDPModule):  # whose teacher is sharded in another way
        for model in models[1:]:
            model.round_like(student)


def _models(student: LanguageModel, *teachers: Teacher | None) -> list[LanguageModel]:
    return [student, *(model for teacher in teachers if teacher is not None for model in teacher.models)]


def _hold_rotations(
    recipe: Recipe, models: Sequence[LanguageModel], prompts: Sequence[Prompt], encode: Callable[[str], list[int]]
) -> None:
    """Let models whose rotary factors depend on length read as if every text were as long as the run's longest. Where a
    teacher reads more than the student does, nobody here knows how long that is, and they go on as loaded: with the factors
    of the longest text that they can read."""
    varying = [model for model in models if rotations_vary(model.model)]
    if not varying or any(teacher.context is not None for teacher in recipe.teachers):
        return
    if any(isinstance(one, LocalTeacherConfig) and not _reads_alike(one) for one in recipe.teachers):
        return
    lengths = [len(prompt.ids) + recipe.rollout.max_tokens for prompt in prompts]
    if recipe.wants_demonstrations():
        lengths += [len(prompt.ids) + len(encode(prompt.response)) for prompt in prompts if prompt.response is not None]
    for model in varying:
        model.read_up_to(max(lengths))


def training_prompts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts of `data`; a demonstration is no longer than the models that read it allow."""
    told, gaps, room = recipe.wants_demonstrations(), recipe.may_have_gaps(), None
    if recipe.method.needs().responses or recipe.method.replay > 0:
        readers = [recipe.student, *recipe.other_models().values()]
        if recipe.method.needs().responses:  # replay is the student's alone
            readers += [one for one in recipe.teachers if isinstance(one, LocalTeacherConfig) and _reads_alike(one)]
        room = min((most for reader in readers if (most := position_limit(reader)) is not None), default=None)
    return load_prompts(recipe.data, tokenizer, recipe.seed, told, gaps, room)


def _reads_alike(teacher: LocalTeacherConfig) -> bool:
    """Whether a teacher reads the student's own tokens."""
    return teacher.tokenizer != "own" and teacher.context is None


def _check_other_models(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    for key, model in recipe.other_models().items():
        role = f"method.{key}"
        if isinstance(model, FrozenConfig):
            offload.require(model, role)
        if model is not recipe.student:
            check_same_tokenizer(tokenizer, load_tokenizer(model, role), role)


def _student(
    recipe: Recipe, device: torch.device, tokenizer: PreTrainedTokenizerBase, resumed_from: Path | None, ranks: Ranks
) -> LanguageModel:
    if ranks.size == 1 or recipe.parallel.whole_copy:
        return load_student(recipe.student, device, tokenizer, recipe.seed, resumed_from)
    return fsdp.load_sharded(recipe.student, device, tokenizer, recipe.seed, resumed_from, ranks)


def _teacher_loader(recipe: Recipe, ranks: Ranks) -> Callable[..., LanguageModel]:
    if ranks.size == 1 or not recipe.parallel.shard_teacher:
        return offload.load_frozen
    return partial(fsdp.load_frozen, ranks=ranks, instead=fsdp.WHOLE_TEACHER)


def _stored(recipe: Recipe, prompts: Sequence[Prompt], vocab_size: int) -> dict[str, list[Rollout]] | None:
    path, wanted = recipe.method.needs().rollouts, recipe.rollout
    if path is None:
        return None
    return load_rollouts(path, prompts, vocab_size, wanted.samples_per_prompt, wanted.max_tokens)


def _reference(recipe: Recipe, student: LanguageModel, ranks: Ranks) -> Teacher | None:
    """The model that a method holds its student to; never the checkpoint that a run goes on from. It is sharded if the
    student is, unless its section asks for another way to take little memory."""
    section, device = recipe.other_models().get("reference"), student.device
    if section is None:
        return None
    if section is recipe.student and student.adapter is not None:
        return base_teacher(student)
    if isinstance(section, FrozenConfig) and (kept_small(section) or recipe.parallel.whole_copy):
        return local_teacher(offload.load_frozen(section, "reference", device, student.tokenizer))
    if ranks.size == 1 or recipe.parallel.whole_copy:
        return local_teacher(load_model(section, "reference", device, student.tokenizer))
    return local_teacher(fsdp.load_frozen(section, "reference", device, ranks, fsdp.WHOLE_STUDENT))


def _held_out(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The evaluation's prompts: its own file, or the dev split of a world or a family of tasks; none otherwise."""
    if recipe.eval.prompts is None and recipe.data.prompts is not None:
        return []
    given = {"prompts": recipe.eval.prompts, "world": None, "reasoning_gym": None}
    options = {} if recipe.eval.prompts is None else given
    changes = {"split": recipe.eval.split, "limit": recipe.eval.num_prompts, "options": {}, **options}
    data = DataConfig.model_validate({**recipe.data.model_dump(), **changes})
    return load_prompts(data, tokenizer, recipe.eval.seed, recipe.teachers_need_responses())


def _sampling(recipe: Recipe, student: LanguageModel) -> Sampling:
    rollout = recipe.rollout
    return Sampling(
        max_tokens=rollout.max_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        epsilon=rollout.epsilon,
        num_samples=rollout.samples_per_prompt,
        stop_ids=stop_ids(student, rollout.stop),
    )
