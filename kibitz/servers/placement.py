"""Which GPUs a role's servers run on, how many hold one copy of its model, and which share of their memory they take.

Nothing here asks a device: sizes are counted beforehand, so that a plan for eight GPUs can be made and tested without one.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from kibitz.config.servers import HostedConfig

ALONE = 0.9
"""vLLM's own share of the memory of a GPU that nobody else uses."""
TOGETHER = 0.92
"""What all users of one GPU may take together; the rest goes to contexts and graphs."""
KEYS_AND_VALUES = 0.2
"""Share of a shared GPU's memory that a server gets beside its weights, where there is room for it."""
LEAST_KEYS_AND_VALUES = 0.05
FITS = 0.5
"""Weights fit on GPUs if they take so much of their memory at the most: keys and values want the other half."""


@dataclass(frozen=True)
class Role:
    """A role whose servers are started: `bytes_of_weights` of one copy, and the work of a step, in FLOPs or what takes as long.
    `spread`: several copies can share its work."""

    name: str
    asked: HostedConfig
    bytes_of_weights: float
    work: float
    spread: bool = True


@dataclass(frozen=True)
class Place:
    """The GPUs of one server, numbered as the trainer sees them; none on a CPU. `shared`: others use them, too."""

    gpus: tuple[int, ...] = ()
    memory: float | None = None
    shared: bool = False


def place(
    roles: Sequence[Role], bytes_of_gpus: Sequence[float], trainer: Collection[int], bytes_of_trainer: float
) -> dict[str, list[Place]]:
    """The servers of each role. `trainer` are the GPUs of the processes that train, which take `bytes_of_trainer` on each.

    Raises ValueError for what overlaps without need, or does not fit."""
    if not bytes_of_gpus:
        for role in roles:
            if role.asked.gpus or (role.asked.tensor_parallel or 1) > 1:
                raise ValueError(f"{_key(role)}.gpus: there is no GPU here: leave out gpus and tensor_parallel")
        return {role.name: [Place()] for role in roles}
    chosen = _chosen(roles, bytes_of_gpus, trainer)
    users = {gpu: [role.name for role in roles if gpu in chosen[role.name]] for gpu in range(len(bytes_of_gpus))}
    _refuse_overlaps(roles, users)
    places = {}
    for role in roles:
        gpus, size = chosen[role.name], _parallel(role, chosen[role.name], min(bytes_of_gpus))
        groups = [tuple(gpus[start : start + size]) for start in range(0, len(gpus), size)]
        places[role.name] = [
            Place(group, *_memory(role, group, bytes_of_gpus, trainer, users, bytes_of_trainer)) for group in groups
        ]
    _refuse_too_much(places, users, bytes_of_gpus, trainer, bytes_of_trainer)
    return places


def _key(role: Role) -> str:
    return "rollout.server" if role.name == "student" else "teacher"


def _chosen(roles: Sequence[Role], bytes_of_gpus: Sequence[float], trainer: Collection[int]) -> dict[str, list[int]]:
    """What the recipe asks for; the rest of the free GPUs split by work, and the trainer's own where none is free."""
    found: dict[str, list[int]] = {}
    for role in roles:
        wrong = [gpu for gpu in role.asked.gpus or [] if not 0 <= gpu < len(bytes_of_gpus)]
        if wrong:
            raise ValueError(
                f"{_key(role)}.gpus: there is no GPU {wrong[0]}: there are {len(bytes_of_gpus)}, from 0 on"
            )
        if role.asked.gpus is not None:
            found[role.name] = list(dict.fromkeys(role.asked.gpus))
    taken = {gpu for gpus in found.values() for gpu in gpus}
    free = [gpu for gpu in range(len(bytes_of_gpus)) if gpu not in trainer and gpu not in taken]
    rest = [role for role in roles if role.name not in found]
    least = {role.name: role.asked.tensor_parallel or _least(role, min(bytes_of_gpus)) for role in rest}
    if sum(least.values()) > len(free):  # not even one copy of each beside the trainer
        return found | {role.name: sorted(trainer)[: _whole(role, len(trainer), least[role.name])] for role in rest}
    counts = dict(least)
    while True:
        left = len(free) - sum(counts.values())
        able = [role for role in rest if role.spread and least[role.name] <= left]
        if not able:
            break
        busiest = max(able, key=lambda role: role.work / counts[role.name]).name
        counts[busiest] += least[busiest]
    for role in rest:
        found[role.name], free = free[: counts[role.name]], free[counts[role.name] :]
    return found


def _whole(role: Role, num: int, size: int) -> int:
    """How many of `num` GPUs whole copies of `size` take: all of them, or those of one copy where one is enough."""
    return min(num, size) if not role.spread else max(min(num, size), num // size * size)


def _least(role: Role, bytes_of_gpu: float) -> int:
    size = 1
    while role.bytes_of_weights > FITS * size * bytes_of_gpu:
        size *= 2
    return size


def _parallel(role: Role, gpus: Sequence[int], bytes_of_gpu: float) -> int:
    """The GPUs of one copy. Where the recipe names GPUs for a role that has one server, it takes them all."""
    asked = role.asked.tensor_parallel
    size = asked or (len(gpus) if not role.spread else min(len(gpus), _least(role, bytes_of_gpu)))
    if len(gpus) % size:
        raise ValueError(
            f"{_key(role)}.tensor_parallel: copies on {size} GPUs each do not fill {len(gpus)}: write a divisor, or other gpus"
        )
    if not role.spread and len(gpus) != size:
        raise ValueError(f"{_key(role)}.tensor_parallel: this role has one server, on {len(gpus)} GPUs: write as many")
    return size


def _refuse_overlaps(roles: Sequence[Role], users: Mapping[int, Sequence[str]]) -> None:
    """Two roles on one GPU is what a recipe must say for both, with the memory that each takes; by default they never meet but
    where there is no other GPU."""
    asked = {role.name: role for role in roles if role.asked.gpus is not None}
    for gpu, names in users.items():
        if len(names) > 1 and any(name in asked and asked[name].asked.memory is None for name in names):
            raise ValueError(
                f"rollout.server.gpus and teacher.gpus: both name GPU {gpu}: give each role GPUs of its own, or say by "
                "memory which share of it each takes"
            )


def _memory(
    role: Role,
    group: Sequence[int],
    bytes_of_gpus: Sequence[float],
    trainer: Collection[int],
    users: Mapping[int, Sequence[str]],
    bytes_of_trainer: float,
) -> tuple[float, bool]:
    """The share of the memory, and whether others use it, too."""
    shared = any(gpu in trainer or len(users[gpu]) > 1 for gpu in group)
    if role.asked.memory is not None or not shared:
        return role.asked.memory or ALONE, shared
    size = min(bytes_of_gpus[gpu] for gpu in group)
    weights = 1.05 * role.bytes_of_weights / len(group) / size
    most = max(len(users[gpu]) for gpu in group)
    held = bytes_of_trainer / size if any(gpu in trainer for gpu in group) else 0.0
    room = (TOGETHER - held) / most
    return round(max(weights + LEAST_KEYS_AND_VALUES, min(weights + KEYS_AND_VALUES, room)), 3), True


def _refuse_too_much(
    places: Mapping[str, Sequence[Place]],
    users: Mapping[int, Sequence[str]],
    bytes_of_gpus: Sequence[float],
    trainer: Collection[int],
    bytes_of_trainer: float,
) -> None:
    for gpu, size in enumerate(bytes_of_gpus):
        shares = {name: one.memory or 0.0 for name in users[gpu] for one in places[name] if gpu in one.gpus}
        held = bytes_of_trainer / size if gpu in trainer else 0.0
        if shares and held + sum(shares.values()) > 1.0:
            parts = [f"the {name}'s server takes {share:.0%}" for name, share in shares.items()]
            parts += [f"the trainer keeps {held:.0%}"] if held else []
            raise ValueError(
                f"GPU {gpu} has too little memory: {', '.join(parts)} of its {size / 2**30:.0f} GiB; lower "
                "rollout.server.memory or teacher.memory, train an adapter (student.lora), or use more GPUs"
            )
