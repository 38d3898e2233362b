"""Memory and cost of a recipe, from the shapes of its models: what each phase of a step holds, and what a run takes."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from kibitz.config import OptimConfig, Recipe
from kibitz.models import CHUNK_NUMBERS, forward_flops, pick_dtype
from kibitz.preflight.finding import Finding
from kibitz.preflight.shapes import Shape

GIB = 2**30
LOSS_TENSORS = 10  # float32 [chunk, V] tensors of an exact divergence with its metrics and gradient: losses/chunked.py
UTILISATION = 0.35
"""Share of the matrix speed that a step reaches; rollouts reach less, large models more. A plan, not a promise."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by phase; `held` is there all the time."""

    held: dict[str, float]
    phases: dict[str, dict[str, float]]

    @property
    def peak(self) -> float:
        return sum(self.held.values()) + max(sum(parts.values()) for parts in self.phases.values())

    def as_numbers(self) -> dict[str, dict[str, float]]:
        return {"held": self.held, **self.phases}


def memory(recipe: Recipe, student: Shape, teachers: Sequence[Shape], longest_prompt: int, devices: int = 1) -> Memory:
    """One step's memory on one of `devices`. As docs/machines.md says, each process holds a whole copy of the student; the
    teacher, whole if it is not sharded; its part of the float32 weights and moments; and gradients that are whole while
    micro-batches add up."""
    lora = recipe.student.lora
    trained = student.num_parameters if lora is None else student.lora_parameters(lora.rank, lora.targets)
    held = {"student weights": float(student.num_parameters * student.itemsize)}
    if teachers:
        shared_by = devices if recipe.parallel.shard_teacher else 1
        held["teacher weights"] = sum(t.num_parameters * t.itemsize for t in teachers) / shared_by
    held["moments of the optimizer"] = _bytes_of_moments(recipe.optim) * trained / devices
    if student.itemsize < 4 or devices > 1:
        held["float32 copy of what is trained"] = 4 * trained / devices
    rollout, optim = recipe.rollout, recipe.optim
    length = longest_prompt + rollout.max_tokens
    tokens = min(optim.tokens_per_micro_batch, rollout.prompts_per_step * rollout.samples_per_prompt * length)
    chunk = optim.chunk_tokens or max(16, CHUNK_NUMBERS // student.rows)
    logits = LOSS_TENSORS * 4.0 * min(chunk, tokens) * student.rows
    rows = min(rollout.max_rows, rollout.prompts_per_step * rollout.samples_per_prompt)
    step_tokens = rollout.prompts_per_step * rollout.samples_per_prompt * rollout.max_tokens
    width = sum(t.width * t.itemsize for t in teachers)
    kept = {"teacher's hidden states": step_tokens * width / devices} if teachers else {}
    per_token = student.activation_bytes_per_token
    if optim.checkpointing:
        per_token = student.num_layers * student.width * student.itemsize + per_token / student.num_layers
    phases = {
        "rollouts": {"keys and values": float(rows * length * student.cache_bytes_per_token)},
        "scoring": {
            "activations of two layers": 2 * tokens * student.activation_bytes_per_token / student.num_layers,
            **kept,
        },
        "training": {"activations": tokens * per_token, "logits": logits, "gradients": 4.0 * trained, **kept},
    }
    return Memory(held, phases)


def _bytes_of_moments(optim: OptimConfig) -> int:
    """For each number that is trained. Two moments, one, or none; in 8 bits or in float32."""
    match optim.name:
        case "adamw_8bit":
            return 2
        case "sgd":
            return 4 if optim.sgd_momentum else 0
        case _:
            return 8


def memory_finding(plan: Memory, room: float | None, what: str) -> Finding:
    """`room` in bytes of one device, if it is known."""
    phase = max(plan.phases, key=lambda name: sum(plan.phases[name].values()))
    text = f"about {plan.peak / GIB:.3g} GiB at the peak ({phase}), {sum(plan.held.values()) / GIB:.3g} of them all the time"
    numbers = {"peak": plan.peak, "room": room, "bytes": plan.as_numbers()}
    if room is None:
        return Finding("memory", "green", text, numbers)
    text += f"; {what} has {room / GIB:.3g}"
    if plan.peak <= 0.9 * room:
        return Finding("memory", "green", text, numbers)
    largest, size = max(plan.phases[phase].items(), key=lambda item: item[1])
    remedies = {
        "activations": "lower optim.tokens_per_micro_batch",
        "logits": "lower optim.chunk_tokens",
        "keys and values": "lower rollout.max_rows",
        "gradients": "train an adapter (student.lora), or divide the model over more devices",
    }
    remedy = remedies.get(largest, "lower rollout.prompts_per_step")
    if sum(plan.held.values()) > 0.9 * room:
        remedy = "weights and moments alone do not fit: take a smaller model, an adapter, bfloat16, or more devices"
    light = "red" if plan.peak > room else "amber"
    return Finding("memory", light, f"{text}; the largest part is {largest}, {size / GIB:.3g} GiB: {remedy}", numbers)


@dataclass(frozen=True)
class Cost:
    """Of a whole run."""

    tokens: float
    flops: dict[str, float]
    hours: float
    money: float | None


def cost(
    recipe: Recipe, student: Shape, teachers: Sequence[Shape], prompt_lengths: list[int], flops_per_second: float,
    price: float | None, devices: int = 1,
) -> Cost:  # fmt: skip
    """Tokens, floating-point operations, hours and money, if every response were as long as it may be. `price` is of one
    device for one hour."""
    rollouts = recipe.rollout.prompts_per_step * recipe.rollout.samples_per_prompt
    response = recipe.rollout.max_tokens
    length = fmean(prompt_lengths) + response

    def forward(shape: Shape) -> float:
        return recipe.steps * rollouts * forward_flops(shape.model, length, length**2, response)

    passes = 3 + recipe.method.scores_with_student()
    flops = {"student_sampling": forward(student), "student_training": passes * forward(student)}
    if teachers and recipe.method.scores_with_teacher():
        flops["teacher_scoring"] = sum(map(forward, teachers))
    hours = sum(flops.values()) / (flops_per_second * UTILISATION * devices) / 3600
    return Cost(
        float(recipe.steps * rollouts * response), flops, hours, None if price is None else hours * price * devices
    )


def cost_finding(estimate: Cost, flops_per_second: float) -> Finding:
    money = "" if estimate.money is None else f", {estimate.money:,.2f} in money"
    time = f"{estimate.hours:.3g} hours" if estimate.hours >= 0.1 else f"{estimate.hours * 60:.2g} minutes"
    text = (
        f"at most {estimate.tokens:.3g} response tokens, {sum(estimate.flops.values()):.3g} FLOPs, about {time}{money}, at "
        f"{UTILISATION:.0%} of {flops_per_second / 1e12:.3g} TFLOP/s"
    )
    numbers = {"tokens": estimate.tokens, "flops": estimate.flops, "hours": estimate.hours, "money": estimate.money}
    return Finding("cost", "green", text, numbers | {"flops_per_second": flops_per_second})


def device_room(device: torch.device) -> tuple[float | None, str]:
    """Bytes of the device, or of the machine where the device is the CPU, and what to call it."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory), torch.cuda.get_device_name(device)
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), "this machine"
    except (ValueError, OSError):  # not every system says
        return None, "this machine"


def matrix_speed(device: torch.device, size: int = 1024) -> float:
    """Floating-point operations per second of one large matrix product, in the type that models have on this device."""
    dtype = pick_dtype("auto", device)
    one = torch.ones(size, size, dtype=dtype, device=device)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        (one @ one)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
