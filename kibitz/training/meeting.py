"""The processes of a run meet. What several cannot do is refused before weights load."""

from collections.abc import Sequence
from typing import cast

import torch

from kibitz.config import FrozenConfig, LocalTeacherConfig, Recipe, RecipeError, StudentTeacherConfig
from kibitz.models import quantized
from kibitz.models.load import pick_device
from kibitz.parallel import fsdp
from kibitz.parallel.ranks import Ranks, join
from kibitz.types import Prompt


def meet(recipe: Recipe, prompts: Sequence[Prompt]) -> tuple[Ranks, torch.device]:
    """The processes that torchrun started and this one's device. What several cannot do is refused before weights load."""
    ranks, device = join(recipe.parallel, pick_device(recipe.device))
    if ranks.size == 1:
        return ranks, device
    if recipe.optim.name != "adamw":
        raise RecipeError(
            f"optim.name: {recipe.optim.name} is for one process, and there are {ranks.size}: write optim.name=adamw"
        )
    quantized.refuse_several(recipe.student)
    if recipe.student.compile:
        raise RecipeError(
            "student.compile: sharded layers are not compiled: write student.compile=false, or start one process"
        )
    if any(isinstance(teacher, StudentTeacherConfig) and teacher.student != "start" for teacher in recipe.teachers):
        raise RecipeError(
            "teacher.student: several processes hold parts of the student, and no teacher can be made of one part: write "
            "teacher.student=start or teacher.model, or start one process"
        )
    if any(teacher.store is not None for teacher in recipe.teachers):
        raise RecipeError("teacher.store: one process fills a store: leave it out, or start one")
    if recipe.parallel.shard_teacher and [type(teacher) for teacher in recipe.teachers] != [LocalTeacherConfig]:
        raise RecipeError("parallel.shard_teacher: that is for one teacher.model in this process: leave it out")
    if recipe.parallel.shard_teacher and any(teacher.offload or teacher.quantize for teacher in recipe.teachers):
        raise RecipeError(
            "parallel.shard_teacher: its layers are split where they are: leave out teacher.offload and quantize"
        )
    if recipe.parallel.shard_teacher:
        fsdp.check_shardable(cast(LocalTeacherConfig, recipe.teacher), "teacher", fsdp.WHOLE_TEACHER)
    if recipe.method.needs().adversary:
        raise RecipeError(f"method {recipe.method.type} trains an opponent of the student in one process: start one")
    if not recipe.parallel.whole_copy:
        _check_parts(recipe)
    num = min(recipe.rollout.prompts_per_step, len({prompt.key for prompt in prompts}))
    if num < ranks.size:
        raise RecipeError(
            f"rollout.prompts_per_step: a step has {num} different prompt{'s' * (num != 1)} for {ranks.size} processes, and each "
            "needs one: "
            "write more, or start fewer processes"
        )
    return ranks, device


def _check_parts(recipe: Recipe) -> None:
    """Refuse what needs a whole student where each process holds a part of it."""
    fsdp.check_shardable(recipe.student, "student")
    if recipe.method.reference is not None and not kept_small(recipe.method.reference):
        fsdp.check_shardable(recipe.method.reference, "method.reference")
    if any(isinstance(teacher, StudentTeacherConfig) for teacher in recipe.teachers):
        raise RecipeError(
            "teacher.student: such a teacher would be whole in each process, and the student never is: write teacher.model, "
            "or parallel.whole_copy=true"
        )


def kept_small(config: FrozenConfig) -> bool:
    """Return whether a frozen model has another way to take little memory than to be sharded."""
    return config.offload is not None or config.quantize is not None
