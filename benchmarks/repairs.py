"""What each repair since e8b724f takes from a step, counted: a phase before and after it, in the order of `of_a_step`, where all
those that stand before it are in place. So the seconds that are removed add up to those of the whole.

Where a repair concerns only recipes that set something, `elsewhere` has it, with the seconds of what it changed alone.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import phases
from benchmarks.counting import Card, Counting, Scale, Work, model_of, shape
from kibitz.config import SaveConfig
from kibitz.engines import sampling
from kibitz.models.flops import forward_flops
from kibitz.models.language_model import CHUNK_NUMBERS
from kibitz.teachers.local import LARGE
from kibitz.training.room import MOST_IN_CHUNK
from kibitz.types import Sampling

VALUES = 8
"""The loss and the metrics of exact reverse KL."""
RANK = 32
FLOAT32, TF32 = 67 / 989, 494 / 989
"""Rates of products beside that in bfloat16, by the data sheet of the H200."""
QWEN3_32B = shape(5120, 25600, 64, 64)


@dataclass(frozen=True)
class Repair:
    """What was done, the phase that it belongs to, and what was asked for there before and after."""

    name: str
    phase: str
    before: Work
    after: Work

    def row(self, card: Card) -> dict[str, Any]:
        seconds = {"before": self.before.seconds(card), "after": self.after.seconds(card)}
        return {"repair": self.name, "phase": self.phase, **seconds}


# ------------------------------------------------------------------ the step that the page counts


def of_a_step(scale: Scale) -> list[Repair]:
    """In the order of the phases; a phase's last `after` is what it asks for now."""
    written = [phases.rollouts(scale, rounded=rounded)[0] for rounded in (True, False)]
    found = [Repair("the engine's logits are float32 as the product gives them", "rollouts", *written)]
    found += _of_a_body(scale, "teacher scoring", scale.teacher, learns=False)
    found += _of_a_body(scale, "student's body", scale.student, learns=True)
    return found + _of_the_loss(scale)


def _of_a_body(scale: Scale, phase: str, sizes: dict[str, Any], learns: bool) -> list[Repair]:
    plain, compiled = (phases.reading(scale, sizes, learns, compiled)[0] for compiled in (False, True))
    found = []
    if not learns and (carried := hidden_bytes(scale)) > LARGE:
        moved = plain + Work(bus=2 * carried)
        found.append(Repair("hidden states are scored a micro-batch ahead, and stay", phase, moved, plain))
    return [*found, Repair("the body is compiled, where a check at the start allows it", phase, plain, compiled)]


def hidden_bytes(scale: Scale) -> float:
    """Of a step's tokens, by the teacher, in bfloat16."""
    return 2.0 * scale.rollouts * scale.response * scale.teacher["hidden_size"]


def _of_the_loss(scale: Scale) -> list[Repair]:
    small, large = chunks(scale)
    old = {"rounded": True, "all_measured": True, "by_autograd": True}

    def asked(chunk: int, waits: float, **options: bool) -> Work:
        return phases.loss(scale, chunk, **options)[0] + Work(waits=waits * scale.micro_batches)

    of_chunks = -(-scale.rows * scale.response // small)
    of_values = 2 * VALUES
    states = [
        asked(small, of_chunks + of_values, **old),
        asked(small, 1 + of_values, **old),
        asked(small, 2, **old),
        asked(large, 2, **old),
        asked(large, 2, all_measured=True, by_autograd=True),
        asked(large, 2, by_autograd=True),
        asked(large, 2),
    ]
    names = [
        f"the host waits for its checks once a micro-batch, not each {small} tokens",
        f"{VALUES} values are fetched together, not one by one",
        f"chunks of {large:,} tokens, by free memory, not of {small}",
        "logits are float32 as the product gives them, not rounded and copied",
        "metrics as dear as the loss are of a sample, and its KL is not computed twice",
        "the gradients of the KL are by hand, in fewer passes over the logits",
    ]
    return [Repair(name, "loss", *pair) for name, pair in zip(names, pairwise(states), strict=True)]


def chunks(scale: Scale) -> tuple[int, int]:
    """Tokens whose logits exist together: 2^25 logits, as on a CPU, and what a GPU with memory to spare has."""
    learnt = scale.rows * scale.response
    return min(CHUNK_NUMBERS // scale.scored, learnt // 4), min(MOST_IN_CHUNK, learnt)


# ------------------------------------------------------------------ recipes that set something


def elsewhere(scale: Scale) -> list[Repair]:
    """What is not in that step, because its recipe sets nothing of it."""
    return [_recomputed_texts(scale), _sorted_draws(scale), _halves_of_lora(scale), *_carried_layers(scale)]


def _recomputed_texts(scale: Scale) -> Repair:
    """The product of each text from its start, for each of its tokens; and the rollouts as they are."""
    model = model_of(scale.student, scale.vocab)
    lengths = [scale.prompt + token for token in range(scale.response)]
    flops = forward_flops(model, sum(lengths), sum(n * n for n in lengths), scale.response)
    written = phases.rollouts(scale)[0]
    name = "`attention: flash_attention_2`: rollouts are written by `sdpa`, each token once"
    return Repair(name, "rollouts", replace(written, flops=scale.rollouts * flops), written)


def _sorted_draws(scale: Scale) -> Repair:
    """The draws of a step alone, of two rows that are counted and as many more as there are. A sort counts as one kernel, which
    reads and writes once."""
    logits_NV = (-0.1 * torch.arange(scale.scored)).expand(2, -1)  # so peaked that the likeliest suffice
    uniform_N = torch.full((2,), 0.5, dtype=torch.float64)

    def draws() -> Work:
        with Counting() as counting:
            sampling.sample(logits_NV, uniform_N, Sampling(top_p=0.9))
        return Work(counting.work.kernels, counting.bytes * scale.rollouts / len(logits_NV)).times(scale.response)

    with patch.object(sampling, "_truncate_the_best", lambda *_: None):
        before = draws()
    after = draws() + Work(waits=float(scale.response))
    return Repair("`top_p: 0.9`: the likeliest 1,024 are sorted, not the vocabulary", "draws alone", before, after)


def _halves_of_lora(scale: Scale) -> Repair:
    """Products by A and B and their gradients: 6 FLOPs for each of their numbers and position, in float32 or as long in TF32."""
    numbers = RANK * lora_width(scale.student)
    flops = 6.0 * numbers * scale.rollouts * scale.length
    return Repair(
        f"`lora: {{rank: {RANK}}}`: A and B are multiplied at TF32",
        "A and B alone",
        Work(flops=flops / FLOAT32),
        Work(flops=flops / TF32),
    )


def lora_width(sizes: dict[str, Any]) -> int:
    """Inputs and outputs of all linear layers together."""
    hidden, inner, dim = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    query, key = dim * sizes["num_attention_heads"], dim * sizes["num_key_value_heads"]
    return sizes["num_hidden_layers"] * (2 * (hidden + query) + 2 * (hidden + key) + 3 * (hidden + inner))


def _carried_layers(scale: Scale) -> list[Repair]:
    """A teacher of 32B whose layers come from host memory for each micro-batch: copies and products one after the other, or at
    one time. The longer of the two is written as what is asked for."""
    if scale.teacher["hidden_size"] < 4096:
        return []
    model = model_of(QWEN3_32B, scale.vocab)
    numbers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    flops = scale.rollouts * forward_flops(model, scale.length, scale.length**2, 0)
    moved, computed = Work(bus=2.0 * numbers * -(-scale.rollouts // scale.rows)), Work(flops=flops)
    return [
        Repair(
            "a teacher of 32B with `offload: layers`: the next layer is copied meanwhile",
            "teacher scoring, products and copies alone",
            moved + computed,
            computed,
        )
    ]


# ------------------------------------------------------------------ checkpoints

EVERY = SaveConfig().every


def checkpoints(scale: Scale, card: Card) -> list[dict[str, Any]]:
    """What a checkpoint has, in bytes, and for how many seconds training waits for it: at once, and in the background. Weights
    are bfloat16; beside them are two moments and a master of each number, in float32. LoRA's numbers are float32 and need no
    master.

    At once what is kept for training is copied to the host, all is written, and each file is hashed by one core, which is over
    when the optimizer's is. In the background it is copied, and the weights are written."""
    students = {"1.7B, all weights": (scale.student, 0), "8B, all weights": (scale.teacher, 0)}
    students[f"8B, LoRA of rank {RANK}"] = (scale.teacher, RANK)
    rows = []
    for name, (sizes, rank) in students.items():
        numbers = rank * lora_width(sizes) or sum(p.numel() for p in model_of(sizes, scale.vocab).parameters())
        weights, kept = (4.0 * numbers, 8.0 * numbers) if rank else (2.0 * numbers, 12.0 * numbers)
        copied, written, hashed = kept / card.bus, (weights + kept) / card.disk, kept / card.digest
        at_once, behind = copied + written + hashed, copied + weights / card.disk
        parts = {"copied": copied, "written": written, "hashed": hashed, "at_once": at_once, "behind": behind}
        rows.append({"student": name, "weights_bytes": weights, "kept_bytes": kept, **parts})
    return rows


def table_of_checkpoints(rows: list[dict[str, Any]]) -> str:
    head = ["student", "weights, GB", "kept for training, GB", "copied, s", "written, s", "hashed, s"]
    head += ["training waits, s", "in the background, s"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
    for row in rows:
        numbers = [row["weights_bytes"] / 1e9, row["kept_bytes"] / 1e9]
        numbers += [row[name] for name in ("copied", "written", "hashed", "at_once", "behind")]
        lines.append(f"| {row['student']} | {' | '.join(f'{number:.3g}' for number in numbers)} |")
    return "\n".join(lines)


def about_checkpoints(rows: list[dict[str, Any]], step: float) -> str:
    """Sentences about the first student, whose step takes so many seconds."""
    first, interval = rows[0], EVERY * step
    return (
        f"So every {EVERY} steps of {step:.1f} s the first waits {first['at_once'] / interval:.1%} of its time, and "
        f"{first['behind'] / interval:.1%} in the background, which is the default on a GPU in one process. A kill costs "
        "no more: the folder has its name about as long after the step as if training had waited, and until then a run goes on "
        "from the one before in either case."
    )


# ------------------------------------------------------------------ tables


def table(rows: list[dict[str, Any]], last: str = "") -> str:
    """Markdown: a line for each repair, and one named `last` of their sum, if all are of one step."""
    lines = ["| repair | phase | before, s | after, s | removed, s |", "|---|---|--:|--:|--:|"]
    for row in rows:
        taken = row["before"] - row["after"]
        lines.append(f"| {row['repair']} | {row['phase']} | {row['before']:.2f} | {row['after']:.2f} | {taken:.2f} |")
    if last:
        lines.append(
            f"| all | {last} | {_of_phases(rows, 'before'):.2f} | {_of_phases(rows, 'after'):.2f} | {removed(rows):.2f} |"
        )
    return "\n".join(lines)


def _of_phases(rows: list[dict[str, Any]], when: str) -> float:
    """Before the first repair of each phase, or after the last one."""
    ordered = rows if when == "after" else reversed(rows)
    return sum({row["phase"]: row[when] for row in ordered}.values())


def removed(rows: list[dict[str, Any]]) -> float:
    return sum(row["before"] - row["after"] for row in rows)
