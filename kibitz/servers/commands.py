"""The commands that start the vLLM servers of a recipe, and the vLLM that they are started with."""

import importlib.util
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from kibitz.config import Recipe
from kibitz.config.servers import HostedConfig
from kibitz.config.teachers import HostedTeacherConfig, RemoteTeacherConfig
from kibitz.servers import own
from kibitz.servers.connection import is_loopback
from kibitz.servers.placement import Place

MODULE = (
    "vllm.entrypoints.openai.api_server"  # `vllm serve` does not start in the CPU build, whose package has another name
)
PROGRAM = "KIBITZ_VLLM"
"""Environment variable: the Python that has vLLM, or the `vllm` program of its virtual environment."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1"}
IPC = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
"""Handles of another process's memory come pickled: a server reads them only if it is told to trust whoever can reach it."""
ANYWHERE = Place()


@dataclass(frozen=True)
class Command:
    role: str
    url: str
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    name: str = "server"
    """Of this server among those of a run: its socket and its log are called so."""

    def line(self, python: str = "python") -> str:
        """Return the command as a shell line. It names a key's variable, never the key."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        keys = ['VLLM_API_KEY="$KIBITZ_API_KEY"'] if os.environ.get("KIBITZ_API_KEY") else []
        return " ".join([*settings, *keys, shlex.join([python, "-m", MODULE, *self.arguments])])

    def warning(self) -> str | None:
        """Return a warning if other machines can reach the server and it asks for no key."""
        host = urlsplit(self.url).hostname or ""
        if is_loopback(host) or os.environ.get("KIBITZ_API_KEY", "").strip():
            return None
        may = " and replace its weights" if self.role == "student" else ""
        return (
            f"the {self.role} at {self.url} can be reached from other machines and asks for no key: anybody there may use it"
            f"{may}; set KIBITZ_API_KEY, here and where the command runs, or let it listen on 127.0.0.1 behind a tunnel"
        )


def commands(recipe: Recipe, cpu: bool) -> list[Command]:
    """One for each server that the recipe names by its address. `cpu`: for vLLM's CPU build."""
    places = [_asked(recipe.rollout.server, number, recipe.rollout.urls) for number in range(len(recipe.rollout.urls))]
    found = [student(recipe, url, cpu, spot) for url, spot in zip(recipe.rollout.urls, places, strict=True)]
    if isinstance(recipe.teacher, RemoteTeacherConfig):
        found.append(teacher(recipe, recipe.teacher, recipe.teacher.url, cpu, _asked(recipe.teacher, 0, [""])))
    found = [replace(one, name=f"{one.role}-{urlsplit(one.url).port or 8000}") for one in found]
    _refuse_one_gpu_for_two(found)
    if not found:
        raise ValueError(
            "the recipe names no server: write rollout.engine=vllm with rollout.urls, or teacher={url: ..., model: ...}; servers "
            "without an address are started and ended by `kibitz train` itself"
        )
    return found


def _asked(asked: HostedConfig, number: int, urls: Sequence[str]) -> Place:
    """The GPUs that a recipe names, in equal parts for the servers of a role."""
    gpus = asked.gpus or []
    size = len(gpus) // len(urls)
    if gpus and size * len(urls) != len(gpus):
        raise ValueError(f"rollout.server.gpus: {len(gpus)} GPUs for {len(urls)} servers: write a multiple")
    if not gpus and asked.tensor_parallel:
        gpus, size = (
            list(range(number * asked.tensor_parallel, (number + 1) * asked.tensor_parallel)),
            asked.tensor_parallel,
        )
        return Place(tuple(gpus), asked.memory)
    return Place(tuple(gpus[number * size : (number + 1) * size]), asked.memory)


def _refuse_one_gpu_for_two(found: Sequence[Command]) -> None:
    """Two servers of this machine on one GPU fit only if both say how much of its memory they take."""
    users: dict[str, Command] = {}
    for one in found:
        for gpu in filter(None, one.environment.get("CUDA_VISIBLE_DEVICES", "").split(",")):
            other = users.setdefault(gpu, one)
            if other is one or _machine(other.url) != _machine(one.url):
                continue
            if not all("--gpu-memory-utilization" in command.arguments for command in (one, other)):
                raise ValueError(
                    f"rollout.server.gpus and teacher.gpus: {other.url} and {one.url} are both on GPU {gpu}: give each GPUs of "
                    "its own, or say by memory which share of it each takes"
                )


def _sleeping(place: Place, asked: HostedConfig) -> Place:
    """The place as one that is shared if its server is to sleep: always, never, or where others need the memory."""
    return place if asked.sleep == "auto" else replace(place, shared=bool(asked.sleep))


def _machine(url: str) -> str:
    host = urlsplit(url).hostname or ""
    return "here" if is_loopback(host) else host


def _common(recipe: Recipe, url: str, model: str, cpu: bool, place: Place) -> tuple[list[str], dict[str, str]]:
    length = recipe.data.max_prompt_tokens + recipe.rollout.max_tokens + 1
    arguments = [
        "--model",
        model,
        *_listening(url),
        "--max-model-len",
        str(length),
        *(["--enforce-eager"] if cpu else []),
    ]
    environment = dict(CPU) if cpu else {}
    if place.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible(place.gpus))
    if len(place.gpus) > 1:
        arguments += ["--tensor-parallel-size", str(len(place.gpus))]
    if place.memory is not None:
        arguments += ["--gpu-memory-utilization", str(place.memory)]
    if place.shared:
        arguments += ["--enable-sleep-mode"]
        environment["VLLM_SERVER_DEV_MODE"] = "1"
    return arguments, environment


def _listening(url: str) -> list[str]:
    if (path := own.socket_of(url)) is not None:
        return ["--uds", path]
    parts = urlsplit(url)
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname or ""
    return ["--host", host, "--port", str(parts.port or 8000)]


def visible(gpus: Sequence[int]) -> list[str]:
    """The trainer's own names of GPUs that it counts from 0, where CUDA_VISIBLE_DEVICES shows it some of them only."""
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return [named[gpu] if named else str(gpu) for gpu in gpus]


def student(
    recipe: Recipe, url: str, cpu: bool, place: Place = ANYWHERE, name: str = "student", model: str | None = None
) -> Command:
    """A server of the student. `model`: the folder that it starts with, if that is not the recipe's."""
    section, rollout = recipe.student, recipe.rollout
    arguments, environment = _common(recipe, url, model or section.model, cpu, _sleeping(place, rollout.server))
    if own.socket_of(url) is not None or rollout.server.model is not None:
        arguments += ["--served-model-name", rollout.server.model or "student"]
    if section.dtype != "auto" or cpu:
        arguments += ["--dtype", "float32" if section.dtype == "auto" else section.dtype]
    if rollout.truncated or rollout.temperature != 1:
        arguments += ["--logprobs-mode", "processed_logprobs"]
    if section.lora is not None:
        rank = next((rank for rank in RANKS if rank >= section.lora.rank), section.lora.rank)
        arguments += ["--enable-lora", "--max-lora-rank", str(rank)]
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    else:
        environment["VLLM_SERVER_DEV_MODE"] = "1"
        private = own.socket_of(url) is not None
        if rollout.server.sync == "ipc" and not private:
            raise ValueError(
                "rollout.server.sync: ipc makes a server unpickle what it is sent, so it is for servers that the run starts on a "
                "private socket: leave out rollout.urls, or write rollout.server.sync=reload"
            )
        if rollout.server.sync == "nccl":
            arguments += transfer("nccl")
        elif rollout.server.sync == "ipc" or (
            rollout.server.sync == "auto" and place.shared and private and len(place.gpus) == 1
        ):
            arguments, environment = [*arguments, *transfer("ipc")], environment | IPC
    return Command("student", url, tuple(arguments), environment, name)


def transfer(backend: str) -> list[str]:
    """The arguments with which a server takes weights from another process's GPU memory."""
    return ["--weight-transfer-config", json.dumps({"backend": backend})]


def teacher(
    recipe: Recipe,
    section: RemoteTeacherConfig | HostedTeacherConfig,
    url: str,
    cpu: bool,
    place: Place = ANYWHERE,
    name: str = "teacher",
) -> Command:
    """A server that scores for a teacher."""
    if section.model is None:
        raise ValueError("teacher.model: a server needs the folder or name of its model: write teacher.model")
    arguments, environment = _common(recipe, url, section.model, cpu, _sleeping(place, section))
    if own.socket_of(url) is not None:
        arguments += ["--served-model-name", "teacher"]
    dtype = section.dtype if isinstance(section, HostedTeacherConfig) else "auto"
    if dtype != "auto" or cpu:
        arguments += ["--dtype", "float32" if dtype == "auto" else dtype]
    arguments += ["--enable-scale-out"]
    needs = recipe.method.needs()
    if needs.top_k is not None:
        arguments += ["--max-logprobs", str(max(20, needs.top_k + 1))]
        if "named" in needs.signals and not cpu:
            environment["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    return Command("teacher", url, tuple(arguments), environment, name)


# ------------------------------------------------------------------ which vLLM


def program(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The command that starts a server of vLLM: by the Python that `KIBITZ_VLLM` names, of the `vllm` on the PATH, or this one.

    Raises ValueError where there is none."""
    named = environment.get(PROGRAM, "").strip()
    found = shutil.which(named or "vllm", path=environment.get("PATH"))
    if named and found is None:
        raise ValueError(
            f"{PROGRAM}: there is no program {named}: write the Python that has vLLM, or its `vllm` program"
        )
    if found is not None:
        return [_python_of(Path(found)), "-m", MODULE]
    if importlib.util.find_spec("vllm") is not None:
        return [sys.executable, "-m", MODULE]
    raise ValueError(
        "rollout.engine: vllm needs vLLM, and there is none beside kibitz nor on the PATH: install it into a virtual "
        "environment of its own (python -m venv .venv-vllm; .venv-vllm/bin/pip install vllm) and set "
        f"{PROGRAM}=.venv-vllm/bin/python; or name running servers by rollout.urls; or write rollout.engine=torch"
    )


def _python_of(path: Path) -> str:
    """The interpreter of a `vllm` program; a Python is its own."""
    if not path.name.startswith("vllm"):
        return str(path)
    beside = path.parent / "python"
    with path.open("rb") as file:
        first = file.readline(4096).decode(errors="replace").strip()
    return str(beside) if beside.exists() else first.removeprefix("#!").split()[-1]
