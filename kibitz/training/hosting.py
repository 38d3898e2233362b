"""The servers that a run starts itself: which ones its recipe needs, where they run, and the recipe with their addresses."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch

from kibitz.config import LocalTeacherConfig, Recipe, RecipeError
from kibitz.config.teachers import HostedTeacherConfig
from kibitz.engines.untied import untied_start
from kibitz.models.load import without_weights
from kibitz.parallel.ranks import Ranks
from kibitz.servers import commands, own
from kibitz.servers.placement import Place, Role, place
from kibitz.servers.processes import Hosted, Told
from kibitz.types import is_gpu

log = logging.getLogger(__name__)

BYTES_LEARNT = 16
"""Of a parameter that learns: bfloat16 weight and gradient, a float32 master copy, and two moments of Adam."""
RIDGE = 295.0
"""FLOPs that an H100 does while it reads one byte: what turns the bytes of decoding into work that compares with a prefill's."""
ROWS = 256  # that vLLM decodes side by side by default


def require(recipe: Recipe) -> None:
    """Raise ValueError if the recipe wants servers started and there is no vLLM to start them with."""
    if _needed(recipe):
        commands.program()


@dataclass(frozen=True)
class Served:
    """The recipe with the addresses of the servers in it. `hosted` is where they run, None in processes that have not started
    them and in runs that have none."""

    recipe: Recipe
    hosted: Hosted | None = None

    def close(self) -> None:
        if self.hosted is not None:
            self.hosted.close()


def serve(recipe: Recipe, device: torch.device, folder: Path, ranks: Ranks, told: Told) -> Served:
    """Start the servers that the recipe names without an address, and wait for them. The first process does it for all."""
    if not _needed(recipe):
        return Served(recipe)
    if int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size)) != ranks.size:
        raise RecipeError(
            "rollout.engine: a run on several machines has no servers of its own: start them with `kibitz serve`, and write "
            "rollout.urls and teacher.url"
        )
    made: list[Hosted] = []
    known = ranks.first(lambda: _start(recipe, device, folder, ranks.size, told, made))
    if not ranks.is_main:
        for one in known:
            own.know(one.url, own.Own(one.label, one.key))
    return Served(_located(recipe, known), made[0] if made else None)


@dataclass(frozen=True)
class _Known:
    """What every process must know of a server."""

    role: str
    url: str
    label: str
    key: str
    sleeps: bool
    gpus: tuple[int, ...] = ()


def _needed(recipe: Recipe) -> bool:
    return _writes(recipe) or any(isinstance(one, HostedTeacherConfig) for one in recipe.teachers)


def _writes(recipe: Recipe) -> bool:
    return recipe.rollout.engine == "vllm" and not recipe.rollout.urls


def _teachers(recipe: Recipe) -> dict[str, HostedTeacherConfig]:
    """The teachers whose servers are started, by the names of their servers."""
    several = len(recipe.teachers) > 1
    return {
        f"teacher-{number}" if several else "teacher": one
        for number, one in enumerate(recipe.teachers)
        if isinstance(one, HostedTeacherConfig)
    }


def _start(
    recipe: Recipe, device: torch.device, folder: Path, num_processes: int, told: Told, made: list[Hosted]
) -> list[_Known]:
    program, on_gpu = commands.program(), is_gpu(device)
    places = _places(recipe, num_processes if on_gpu else 0)
    if recipe.rollout.max_staleness and any(spot.shared for spot in places.get("student", ())):
        raise RecipeError(
            "rollout.max_staleness: 1 keeps the student's servers busy while it learns, and here they share its GPU: write 0, "
            "or give them GPUs of their own by rollout.server.gpus"
        )
    hosted = Hosted(program, folder / "servers", told)
    try:
        found = _commands(recipe, hosted, places, folder, cpu=not on_gpu)
        sections = [*([recipe.rollout.server] if _writes(recipe) else []), *_teachers(recipe).values()]
        timeout, restarts = (max(getattr(one, name) for one in sections) for name in ("start_timeout", "restarts"))
        hosted.start(found, timeout, restarts)
    except BaseException:
        hosted.close()
        raise
    made.append(hosted)
    spots = {f"student-{number}": spot.gpus for number, spot in enumerate(places.get("student", ()))}
    return [
        _Known(
            one.command.name, one.command.url, one.own.name, one.own.key, "--enable-sleep-mode" in one.command.arguments,
            spots.get(one.command.name, ()),
        )
        for one in hosted.processes
    ]  # fmt: skip


def _commands(
    recipe: Recipe, hosted: Hosted, places: dict[str, list[Place]], folder: Path, cpu: bool
) -> list[commands.Command]:
    found = []
    if _writes(recipe):
        start = None if recipe.student.lora is not None else untied_start(recipe.student, folder / "weights")
        for number, spot in enumerate(places["student"]):
            name = f"student-{number}"
            found.append(commands.student(recipe, hosted.address(name), cpu, spot, name, start))
    for name, section in _teachers(recipe).items():
        found.append(commands.teacher(recipe, section, hosted.address(name), cpu, places[name][0], name))
    return found


def _located(recipe: Recipe, known: Sequence[_Known]) -> Recipe:
    writers = [one for one in known if one.role.startswith("student")]
    changed = {}
    if writers:
        gpus = [gpu for one in writers for gpu in one.gpus]
        asked = {"model": "student", "sleep": any(one.sleeps for one in writers), "gpus": gpus or None}
        server = recipe.rollout.server.model_copy(update=asked)
        urls = [one.url for one in writers]
        changed["rollout"] = recipe.rollout.model_copy(update={"urls": urls, "server": server})
    if names := _teachers(recipe):
        at = {id(names[one.role]): names[one.role].at(one.url, one.sleeps) for one in known if one.role in names}
        several = [at.get(id(one), one) for one in recipe.teachers]
        changed["teacher"] = several if isinstance(recipe.teacher, list) else several[0]
    return recipe.model_copy(update=changed)


# ------------------------------------------------------------------ sizes, counted


def _places(recipe: Recipe, num_processes: int) -> dict[str, list[Place]]:
    """`num_processes`: of the trainer, one on each of the first GPUs; 0 on a CPU."""
    if num_processes == 0:
        return place(_roles(recipe, counted=False), [], (), 0.0)
    gpus = [float(torch.cuda.get_device_properties(i).total_memory) for i in range(torch.cuda.device_count())]
    return place(_roles(recipe, counted=True), gpus, range(num_processes), _trained(recipe) / num_processes)


def _roles(recipe: Recipe, counted: bool) -> list[Role]:
    rollout, roles = recipe.rollout, []
    rows = rollout.prompts_per_step * rollout.samples_per_prompt
    if _writes(recipe):
        size = 2.0 * num_parameters(recipe.student.model, recipe.student.trust_remote_code) if counted else 0.0
        roles.append(Role("student", rollout.server, size, ceil(rows / ROWS) * rollout.max_tokens * size * RIDGE))
    for name, section in _teachers(recipe).items():
        num = num_parameters(section.model) if counted else 0
        roles.append(Role(name, section, 2.0 * num, 2.0 * num * rows * rollout.max_tokens, spread=False))
    return roles


def _trained(recipe: Recipe) -> float:
    """Bytes that training keeps while servers write: the student's, with its optimizer, and those of a teacher beside it."""
    num = num_parameters(recipe.student.model, recipe.student.trust_remote_code)
    beside = sum(
        num_parameters(one.model, one.trust_remote_code)
        for one in recipe.teachers
        if isinstance(one, LocalTeacherConfig) and not one.offload
    )
    return (2 if recipe.student.lora is not None else BYTES_LEARNT) * num + 2 * beside


def num_parameters(model: str, trust_remote_code: bool = False) -> int:
    """The parameters of a model, counted by its configuration alone."""
    return sum(parameter.numel() for parameter in without_weights(model, None, trust_remote_code).parameters())
