"""Memory and cost of a recipe, from the shapes of its models: what each phase of a step holds, and what a run takes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from kibitz.config import Recipe, StudentTeacherConfig
from kibitz.engines.cache import PREFILL_TOKENS
from kibitz.engines.room import BYTES_PER_LOGIT, SHARE, laid_out_bytes
from kibitz.losses.chunked import BLOCK_NUMBERS
from kibitz.models.flops import forward_flops
from kibitz.models.language_model import CHUNK_NUMBERS
from kibitz.optim import bytes_of_moments
from kibitz.preflight.finding import Finding
from kibitz.preflight.plan import Memory, Models
from kibitz.preflight.shapes import Shape
from kibitz.preflight.speed import Speed
from kibitz.training.room import (
    LOSS_TENSORS,
    Sizes,
    choices,
    read_bytes,
    recomputed_bytes,
    with_choice_of_cpu,
    with_choices,
)
from kibitz.types import is_gpu

GIB = 2**30
UTILISATION = 0.35
"""Share of the matrix speed, and of the memory's, that a step reaches; large models reach more. A plan, not a promise."""
WHOLE_TENSORS = 2
"""Float32 tensors [chunk, V] of a loss on a CPU, whose others are as large as a block; see `kibitz.losses.chunked`."""
LOADED = ("student weights", "teacher weights", "teacher made of the student", "reference weights")
"""What is on a device when a run looks how much of it is free."""


def memory(
    recipe: Recipe,
    models: Models,
    longest_prompt: int,
    devices: int = 1,
    room: float | None = None,
    program: float = 0.0,
) -> Memory:
    """Estimate the memory of one step on one of `devices`, in bytes. docs/machines.md says what each process holds. With
    `whole_copy` it holds a whole copy of the student, its shard of the float32 weights and moments, and whole gradients while
    micro-batches accumulate. Without, it holds its shard of all these, and of whole weights only the layer that is computed,
    the next one, and the weights outside the layers. On a GPU of `room` bytes what the recipe leaves open is as a run chooses it,
    and no more rows are written side by side than fit; of a CPU `program` is what a process takes without models."""
    student, rollout = models.student, recipe.rollout
    responses = -(-rollout.prompts_per_step * rollout.samples_per_prompt // devices)
    length = longest_prompt + rollout.max_tokens
    if room is not None:
        recipe = _settled(recipe, models, length, devices, room)
    elif program:
        sizes = (student.num_layers, student.width, student.itemsize)
        recipe = with_choice_of_cpu(recipe, *sizes, lambda: student.kept_per_token(length))
    tokens = min(max(recipe.optim.tokens_per_micro_batch, length), responses * length)  # a longer rollout stands alone
    scored = -(-tokens * rollout.max_tokens // length)
    gradients, together = _gradients(recipe, student, devices)
    held = ({"the program": program} if program else {}) | _held(recipe, models, devices) | together
    rows, writing = _writing(
        recipe, student, responses, longest_prompt, None if room is None else room - sum(held.values())
    )
    if program and rows and (laid_out := laid_out_bytes(student.model, recipe.student.lora is not None)):
        writing["matrices laid out"] = float(laid_out)
    late = recipe.scores_late()
    kept = _kept(recipe, models, scored if late else responses * rollout.max_tokens)
    visits = max(reader.visits for reader in models.readers)
    scoring = {
        "activations of two layers": tokens
        * max(read_bytes(s.num_layers, s.kept_per_token(length)) for s in models.readers),
        **({"weights that come to be read with": visits} if visits else {}),
        **kept,
        **_judging(models.discriminator, tokens),
        **({"gradients": gradients} if late else {}),  # of the micro-batches before
    }
    training = {
        **_learning(recipe, student, tokens, scored, length, on_cpu=program > 0),
        "gradients": gradients,
        **kept,
    }
    phases = {"rollouts": writing, "scoring": scoring, "training": training}
    return Memory(held, phases, rows, choices(recipe) if room is not None else {})


def _settled(recipe: Recipe, models: Models, length: int, devices: int, room: float) -> Recipe:
    """The recipe as a run has it when all models are loaded, before the optimizer has anything."""
    student, in_parts = models.student, devices > 1 and not recipe.parallel.whole_copy
    loaded = sum(size for name, size in _held(recipe, models, devices).items() if name in LOADED)
    read = max(read_bytes(one.num_layers, one.kept_per_token(length)) for one in models.readers)
    numbers = (_trained(recipe, student), student.num_parameters, student.itemsize, student.num_layers, student.width)
    sizes = Sizes(*numbers, student.rows, student.kept_per_token(length), read, in_parts)
    return with_choices(recipe, sizes, length, room - loaded, devices)


def _writing(
    recipe: Recipe, student: Shape, responses: int, longest_prompt: int, free: float | None
) -> tuple[int, dict[str, float]]:
    """Return how many rows the embedded engine writes side by side, and the bytes that they take; a server has its own device.
    `free` are the bytes that nothing else takes, if no more rows may be written than fit."""
    rollout = recipe.rollout
    if rollout.engine != "torch":
        return 0, {}
    prompts = -(-responses // rollout.samples_per_prompt)
    read = min(PREFILL_TOKENS, prompts * longest_prompt)
    prefill = 2 * read * student.kept_per_token(longest_prompt) / student.num_layers
    a_row = (longest_prompt + rollout.max_tokens) * student.cache_bytes_per_token
    drawn = BYTES_PER_LOGIT * student.rows
    rows = min(rollout.max_rows, responses)
    if free is not None:
        rows = max(1, min(rows, int(SHARE * free / (a_row + drawn))))
    return rows, {"keys and values": float(rows * a_row), "logits of a token": float(rows * drawn), "prompts": prefill}


def _learning(recipe: Recipe, student: Shape, tokens: int, scored: int, length: int, on_cpu: bool) -> dict[str, float]:
    """Return the bytes of a micro-batch of texts of this length, of which `scored` tokens have a loss. A CPU takes most of a
    loss block by block; a chunk is then its logits, in whose place the gradient is written, and the teacher's."""
    optim = recipe.optim
    chunk = min(optim.chunk_tokens or max(16, CHUNK_NUMBERS // student.rows), scored)
    per_token = student.kept_per_token(length)
    if optim.checkpointing:
        per_token = recomputed_bytes(student.num_layers, student.width, student.itemsize, per_token)
    head = student.rows * student.width if recipe.student.lora is None else 0
    block = min(chunk, max(1, BLOCK_NUMBERS // student.rows))
    in_loss = WHOLE_TENSORS * chunk + LOSS_TENSORS * block if on_cpu else LOSS_TENSORS * chunk
    return {
        "activations": tokens * per_token,
        "logits": 4.0 * in_loss * student.rows,
        "gradients of the head": (4.0 if student.itemsize == 4 else 8.0)
        * head,  # the sum, and of 16 bits that of one chunk
    }


def _kept(recipe: Recipe, models: Models, told: int) -> dict[str, float]:
    """Return the bytes of the hidden states of `told` tokens that wait for the loss."""
    if recipe.optim.hidden_states == "cpu":
        return {}
    kept = {"teacher's hidden states": float(told * sum(t.width * t.itemsize for t in models.teachers))}
    if models.reference is not None and recipe.method.reference_kl:
        kept["reference's hidden states"] = float(told * models.reference.width * models.reference.itemsize)
    return {name: size for name, size in kept.items() if size}


def _held(recipe: Recipe, models: Models, devices: int) -> dict[str, float]:
    """Return the bytes of weights and optimizer states, by name."""
    student, shards, parallel = models.student, _shards(recipe, devices), recipe.parallel
    trained, itemsize = _trained(recipe, student), student.itemsize
    in_parts = devices > 1 and not parallel.whole_copy
    held = {"student weights": student.bytes / (shards if in_parts else 1)}
    if models.teachers:
        held["teacher weights"] = sum(_frozen(t, shards if parallel.shard_teacher else 1) for t in models.teachers)
    if (own := _made_of_student(recipe, student)) > 0:
        held["teacher made of the student"] = own
    if models.reference is not None and (recipe.method.reference is not None or recipe.student.lora is None):
        held["reference weights"] = _frozen(models.reference, shards if in_parts else 1)
    if (judge := models.discriminator) is not None:
        held["judge weights"] = float(judge.num_parameters * judge.itemsize)
        held["judge's moments and masters"] = (8.0 + (4 if judge.itemsize < 4 else 0)) * judge.num_body
    held["moments of the optimizer"] = bytes_of_moments(recipe.optim) * trained / shards
    if devices > 1 and not in_parts:
        held["float32 copy that is trained"] = 4 * student.num_parameters / shards
    elif itemsize < 4:
        held["float32 copy of what is trained"] = 4 * trained / shards
    return held


def _frozen(shape: Shape, shards: float) -> float:
    """Return the bytes that a frozen model holds. Only its layers are sharded; offloaded layers are not held."""
    layers = 0.0 if shape.visits else shape.bytes_in_layers
    return layers / shards + shape.itemsize * shape.num_around


def _gradients(recipe: Recipe, student: Shape, devices: int) -> tuple[float, dict[str, float]]:
    """Return the bytes of the gradients and, for a sharded student, by name those of weights that are gathered while a layer is
    computed."""
    trained = _trained(recipe, student)
    if devices == 1 or recipe.parallel.whole_copy:
        reduced = devices > 1 and recipe.parallel.reduce_gradients == "micro_batch"
        return 4.0 * trained / (_shards(recipe, devices) if reduced else 1), {}
    at_once = student.num_around + 2 * student.num_in_layer
    share = trained / student.num_parameters
    return 4.0 * trained / _shards(recipe, devices) + 4.0 * share * at_once, {
        "layers that are together": float(at_once * student.itemsize)
    }


def _judging(judge: Shape | None, tokens: float) -> dict[str, float]:
    """Return the bytes of a training step of the discriminator, on micro-batches as long as the student's."""
    if judge is None:
        return {}
    return {
        "judge's activations": tokens * judge.activation_bytes_per_token,
        "judge's gradients": 4.0 * judge.num_body,
    }


def _shards(recipe: Recipe, devices: int) -> float:
    """Return the number of devices that share one copy of the weights. With replicas (HSDP) it is less than all devices."""
    return max(1, devices // recipe.parallel.replicate)


def _trained(recipe: Recipe, student: Shape) -> int:
    lora = recipe.student.lora
    return student.num_parameters if lora is None else student.lora_parameters(lora.rank, lora.targets)


def _made_of_student(recipe: Recipe, student: Shape) -> float:
    """Return the bytes of teachers made of the student. `start` is a second model, unless the adapter's base serves as it; `ema`
    is a second model with a float32 average beside it."""
    kinds = [section.student for section in recipe.teachers if isinstance(section, StudentTeacherConfig)]
    start = student.num_parameters * student.itemsize if recipe.student.lora is None else 0
    average = (student.itemsize + 4) * _trained(recipe, student)
    return float(kinds.count("start") * start + kinds.count("ema") * average)


def memory_finding(plan: Memory, room: float | None, what: str, lines: Sequence[str] = ()) -> Finding:
    """Compare a plan with the memory of one device: `room` in bytes, if known; `what` names the device. `lines` are overrides
    with which it would fit."""
    phase = max(plan.phases, key=lambda name: sum(plan.phases[name].values()))
    text = f"about {plan.peak / GIB:.3g} GiB at the peak ({phase}), {sum(plan.held.values()) / GIB:.3g} of them all the time"
    text += f"; by phase: {by_phase(plan)}" + (f"; {plan.rows} rows are written side by side" if plan.rows else "")
    if plan.chosen:
        text += f"; it would run with {' '.join(f'{key}={value}'.lower() for key, value in plan.chosen.items())}"
    numbers = {
        "peak": plan.peak,
        "room": room,
        "rows": plan.rows,
        "bytes": plan.as_numbers(),
        "chosen": plan.chosen,
    } | ({"fits_with": [*lines]} if lines else {})
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
        "judge's activations": "lower optim.tokens_per_micro_batch",
        "judge's gradients": "name a smaller method.discriminator.model",
    }
    remedy = remedies.get(largest, "lower rollout.prompts_per_step")
    if sum(plan.held.values()) > 0.9 * room:
        remedy = (
            "weights and moments alone do not fit: take a smaller model, an adapter, bfloat16, or more devices, with "
            "parallel.whole_copy=false if one cannot hold the student"
        )
    light = "red" if plan.peak > room else "amber"
    text += f"; the largest part is {largest}, {size / GIB:.3g} GiB: {remedy}"
    return Finding("memory", light, f"{text}. It would fit with {' '.join(lines)}" if lines else text, numbers)


def by_phase(plan: Memory) -> str:
    """GiB of each phase, with what is held all the time."""
    held = sum(plan.held.values())
    return ", ".join(f"{name} {(held + sum(parts.values())) / GIB:.3g}" for name, parts in plan.phases.items())


@dataclass(frozen=True)
class Cost:
    """The cost of a whole run: response tokens, FLOPs by kind, hours, and the price if one is given."""

    tokens: float
    flops: dict[str, float]
    hours: float
    money: float | None


def cost(
    recipe: Recipe, student: Shape, teachers: Sequence[Shape], prompt_lengths: list[int], speed: Speed,
    price: float | None, devices: int = 1, rows: int | None = None,
) -> Cost:  # fmt: skip
    """Estimate tokens, FLOPs, hours and money of a run in which every response has the maximum length. `price` is that of one
    device for one hour, `rows` how many are written side by side if not max_rows. Rollouts take the time of their FLOPs or that
    of the bytes they read, whichever is longer."""
    rollouts = recipe.rollout.prompts_per_step * recipe.rollout.samples_per_prompt
    response = recipe.rollout.max_tokens
    length = fmean(prompt_lengths) + response

    def forward(shape: Shape) -> float:
        return recipe.steps * rollouts * forward_flops(shape.model, length, length**2, response)

    needs = recipe.method.needs()
    passes = 3 + needs.student_scores
    flops = {"student_sampling": forward(student), "student_training": passes * forward(student)}
    if teachers and needs.signals:
        flops["teacher_scoring"] = sum(map(forward, teachers))
    seconds = {name: number / (speed.flops * UTILISATION * devices) for name, number in flops.items()}
    read = (
        recipe.steps
        * decoded_bytes(recipe, student, fmean(prompt_lengths), devices, rows)
        / (speed.bytes * UTILISATION)
    )
    hours = sum({**seconds, "student_sampling": max(seconds["student_sampling"], read)}.values()) / 3600
    return Cost(
        float(recipe.steps * rollouts * response), flops, hours, None if price is None else hours * price * devices
    )


def decoded_bytes(recipe: Recipe, student: Shape, prompt: float, devices: int, rows: int | None = None) -> float:
    """Return the bytes that one device reads to write a step's responses: for each token of as many rows as are written side by
    side all weights once, and the keys and values of what each row has."""
    rollout = recipe.rollout
    responses = -(-rollout.prompts_per_step * rollout.samples_per_prompt // devices)
    waves, length = -(-responses // (rows or rollout.max_rows)), rollout.max_tokens
    # a matrix of 4 bits is written and read once more as it is multiplied
    weights = waves * length * (student.bytes + 2 * student.itemsize * student.num_quantized)
    return float(weights + responses * length * (prompt + length / 2) * student.cache_bytes_per_token)


def cost_finding(estimate: Cost, speed: Speed) -> Finding:
    money = "" if estimate.money is None else f", {estimate.money:,.2f} at that price"
    time = f"{estimate.hours:.3g} hours" if estimate.hours >= 0.1 else f"{estimate.hours * 60:.2g} minutes"
    text = (
        f"at most {estimate.tokens:.3g} response tokens, {sum(estimate.flops.values()):.3g} FLOPs, about {time}{money}, at "
        f"{UTILISATION:.0%} of {speed.flops / 1e12:.3g} TFLOP/s and {speed.bytes / 1e12:.3g} TB/s"
    )
    numbers = {"tokens": estimate.tokens, "flops": estimate.flops, "hours": estimate.hours, "money": estimate.money}
    return Finding("cost", "green", text, numbers | {"flops_per_second": speed.flops, "bytes_per_second": speed.bytes})


def program_bytes(device: torch.device) -> float:
    """Return the bytes that a process on the CPU takes before it loads models: what this one takes now, where Linux says."""
    if is_gpu(device):
        return 0.0
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE"))


def device_room(device: torch.device) -> tuple[float | None, str]:
    """Return the memory in bytes of the device (of the machine, for the CPU; None if unknown), and its name."""
    if is_gpu(device):
        module = torch.get_device_module(device)
        return float(module.mem_get_info(device)[1]), module.get_device_name(device)
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), "this machine"
    except (ValueError, OSError):  # not every system says
        return None, "this machine"
