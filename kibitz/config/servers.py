"""Servers in a recipe: their addresses, and how long to wait for them."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from kibitz.config.base import Section


def checked_url(url: str) -> str:
    """Return a server's address in its plain form. It must hold no secret, because recipes are written into run folders."""
    try:
        parts = urlsplit(url)
        bad = parts.scheme not in ("http", "https") or not parts.hostname or (parts.port or 1) < 1
    except ValueError:
        bad, parts = True, urlsplit("")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "an address holds no user, password or query: put the key into the environment, KIBITZ_API_KEY"
        )
    if bad or not url.isprintable() or " " in url:
        raise ValueError(f"{url!r:.100} is not the address of a server: write one such as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


ServerURL = Annotated[str, AfterValidator(checked_url)]


class ServerConfig(Section):
    """Requests to a server. These settings do not change a request's content."""

    timeout: float = Field(
        600.0, gt=0, description="Seconds for one request, its answer read to the end; a long one takes minutes."
    )
    patience: float = Field(
        600.0,
        ge=0,
        description="Seconds to wait for a server that is down before the run stops; a large model loads for minutes.",
    )
    in_flight: int = Field(
        64, ge=1, le=1024, description="Requests at one time to one server. vLLM's own batch limit is 256 or more."
    )


class HostedConfig(Section):
    """How a server of this machine is started: by the run, or by `kibitz serve`."""

    gpus: list[int] | None = Field(
        None,
        min_length=1,
        description="GPUs of the servers, numbered as the trainer sees them. null: those that the trainer leaves free, split "
        "between student and teacher by the work that is counted for each; the trainer's own if it leaves none.",
    )
    tensor_parallel: int | None = Field(
        None,
        ge=1,
        description="GPUs that hold one copy of the model together. null: the fewest (a power of 2) on which its weights "
        "fit twice.",
    )
    memory: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of each GPU's memory that a server takes (vLLM's gpu_memory_utilization). null: 0.9, vLLM's own, on "
        "GPUs that it has for itself; beside the trainer what its weights take and a fifth of the memory for keys and values.",
    )
    sleep: bool | Literal["auto"] = Field(
        "auto",
        description="Let a server give its memory back while others work (vLLM's sleep mode, level 1). auto: on GPUs that "
        "it shares.",
    )
    start_timeout: float = Field(
        900.0,
        gt=0,
        description="Seconds until a server must be ready. Loading and compiling a large model takes minutes.",
    )
    restarts: int = Field(
        3, ge=0, description="How often the run replaces a server of its own that died or hung, before it ends."
    )


class RolloutServerConfig(ServerConfig, HostedConfig):
    """vLLM servers that write the rollouts, and how they get the student's new weights after each step."""

    model: str | None = Field(
        None, description="Name under which the servers have the student. null: the only one served."
    )
    sync: Literal["auto", "lora", "reload", "nccl", "ipc"] = Field(
        "auto",
        description="lora: the adapter's folder is loaded; reload: a safetensors folder is; nccl: vLLM's weight transfer, "
        "GPUs only; ipc: servers on the trainer's own GPU read the student's memory (CUDA IPC). auto: lora for an adapter; ipc "
        "to servers that the run starts on its one GPU, or reload where they do not take it; else reload.",
    )
    folder: str | None = Field(
        None,
        description="Where lora and reload put weights: servers and trainer must see it. Default: weights/ of the run.",
    )
    tolerance: float = Field(
        0.05,
        gt=0,
        description="Mean difference in nats between server and student on a probe after each sync, above which the run stops. "
        "Measured: 1e-5 in float32, 0.02 in bfloat16, 0.7 where a server kept an old output head.",
    )
