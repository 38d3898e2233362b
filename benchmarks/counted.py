"""How long a step must take on a GPU, from what it does: kernels, bytes and FLOPs, counted on tensors without numbers.

    python -m benchmarks.counted            # a minute on any CPU; writes benchmarks/counted.json
    python -m benchmarks.counted --tiny     # small shapes; prints, and writes nothing

Qwen3-1.7B under Qwen3-8B in bfloat16, exact reverse KL, 256 rollouts of 200 + 1,024 tokens, on one H200. The code that trains
runs on torch's meta device: models of two and of three layers, whose difference is a layer, and one chunk of the loss. Each
operation that is no view is a kernel. It reads its arguments and writes its results, once each; products and attention have FLOPs
instead. A phase takes the longer of two times: to start its kernels, or to move bytes beside the products and to do these.

These are counts, not measurements. Caches, and kernels that reach less than the rates below, make a step longer. What is stated
for commit e8b724f, before the repairs, was worked out by hand from counts on the same shapes.
"""

import argparse
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen3Config

from kibitz.engines.cache import CachedDecoder
from kibitz.engines.room import cache_bytes
from kibitz.engines.sampling import sample
from kibitz.losses.divergences import reverse_kl
from kibitz.models.flops import forward_flops
from kibitz.models.head import _WideProduct
from kibitz.models.kept import fused_attention
from kibitz.models.language_model import CHUNK_NUMBERS

HERE = Path(__file__).parent
META = torch.device("meta")
FREE = {"empty", "empty_strided", "empty_like", "new_empty", "detach", "alias", "lift_fresh", "_unsafe_view"}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "linear"}


@dataclass(frozen=True)
class Card:
    """Rates of a device: bytes a second, FLOP/s that products reach, seconds to start a kernel."""

    name: str
    bytes: float
    flops: float
    launch: float


H200 = Card("H200", 4.8e12, 700e12, 7e-6)
"""4.8 TB/s by its data sheet; 700 of 989 TFLOP/s and 7 microseconds a kernel are assumed."""


@dataclass(frozen=True)
class Scale:
    """Shapes of student and teacher, and the sizes of a step."""

    student: dict[str, Any]
    teacher: dict[str, Any]
    vocab: int = 151_936
    rollouts: int = 256
    prompt: int = 200
    response: int = 1024
    micro_batch: int = 16_384


def shape(hidden: int, inner: int, layers: int, heads: int, kv: int = 8, dim: int = 128) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "head_dim": dim}
    return {**sizes, "num_attention_heads": heads, "num_key_value_heads": kv}


FULL = Scale(shape(2048, 6144, 28, 16) | {"tie_word_embeddings": True}, shape(4096, 12288, 36, 32))
TINY = Scale(shape(64, 128, 4, 4, 2, 16), shape(128, 256, 4, 4, 2, 32), 1_000, 8, 20, 40, 240)


@dataclass(frozen=True)
class Work:
    """What a device is asked for: `bytes` are those moved beside products and attention."""

    kernels: float = 0.0
    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.kernels + other.kernels, self.bytes + other.bytes, self.flops + other.flops)

    def times(self, factor: float) -> "Work":
        return Work(factor * self.kernels, factor * self.bytes, factor * self.flops)

    def seconds(self, card: Card) -> float:
        return max(self.kernels * card.launch, self.bytes / card.bytes + self.flops / card.flops)


class Counting(TorchDispatchMode):
    """Counts what the operations inside the context ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name not in FREE and not func.is_view:
            self.names[name] += 1
            if name not in PRODUCTS:
                tensors = [one for one in [*args, *_listed(result)] if isinstance(one, Tensor)]
                self.bytes += sum(tensor.nbytes for tensor in tensors)
        return result

    @property
    def work(self) -> Work:
        return Work(float(sum(self.names.values())), self.bytes)


def _listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, list | tuple) else [result]


def model_of(sizes: dict[str, Any], vocab: int, layers: int | None = None) -> Any:
    settings = {**sizes, "vocab_size": vocab, **({} if layers is None else {"num_hidden_layers": layers})}
    with META:
        return AutoModelForCausalLM.from_config(Qwen3Config(**settings), dtype=torch.bfloat16).eval()


def of_all_layers(two: Work, three: Work, layers: int) -> Work:
    """What a model of `layers` asks for, from one of two layers and one of three."""
    return two + (three + two.times(-1.0)).times(layers - 2.0)


# ------------------------------------------------------------------ phases


def decoding(scale: Scale) -> Work:
    """The kernels of one token of all rows, the draw among them; what is read is in `rollouts`."""

    def token(layers: int) -> Work:
        model = model_of(scale.student, scale.vocab, layers)
        decoder = CachedDecoder(model)
        one_kernel = patch.object(F, "scaled_dot_product_attention", lambda query, *_, **__: query + 0)
        with torch.no_grad(), META, one_kernel:
            decoder.start(scale.rollouts, 512)
            token_N, position_N = torch.zeros(2, scale.rollouts, dtype=torch.long).unbind()
            decoder.step(token_N, position_N, 300)  # allocates keys and values
            with Counting() as counting:
                logits_NV = decoder.step(token_N, position_N, 300)
                sample(logits_NV, torch.zeros(scale.rollouts, dtype=torch.float64), _plain_sampling())
        return Work(counting.work.kernels)

    return of_all_layers(token(2), token(3), scale.student["num_hidden_layers"])


def _plain_sampling() -> Any:
    from kibitz.types import Sampling

    return Sampling()


def rollouts(scale: Scale) -> tuple[Work, Work]:
    """All tokens as they are written; and the least: every weight once a token, and the keys and values of what there is."""
    model = model_of(scale.student, scale.vocab)
    weights = 2.0 * sum(parameter.numel() for parameter in model.parameters())
    held = cache_bytes(model) * scale.rollouts * (scale.prompt + scale.response / 2)
    least = Work(bytes=weights + held).times(scale.response)
    return Work(decoding(scale).kernels * scale.response) + least, least


def reading(scale: Scale, sizes: dict[str, Any], learns: bool) -> tuple[Work, Work]:
    """A pass of a body over all rollouts, and its gradients if it `learns`; and its products alone."""
    length = scale.prompt + scale.response
    rows = max(1, scale.micro_batch // length)

    def body(layers: int) -> Work:
        model = model_of(sizes, scale.vocab, layers).model
        ids = torch.zeros(rows, length, dtype=torch.long, device=META)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=META)
        with torch.set_grad_enabled(learns), Counting() as counting, kernels_of_attention():
            hidden = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
            if learns:
                hidden.backward(torch.empty_like(hidden))
        return counting.work

    one = of_all_layers(body(2), body(3), sizes["num_hidden_layers"])
    full = model_of(sizes, scale.vocab)
    flops = scale.rollouts * forward_flops(full, length, length**2, 0) * (3 if learns else 1)
    passes = math.ceil(scale.rollouts / rows)
    return one.times(passes) + Work(flops=flops), Work(flops=flops)


class _Attention(torch.autograd.Function):
    """A kernel forward and one backward, which read and write what a flash kernel does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return query + 0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = ctx.saved_tensors
        return query + grads[0], key + 0, value + 0


def kernels_of_attention() -> Any:
    """Attention with a gradient, and heads that share keys, as `fused_attention` has them without one."""

    class Both:
        def __enter__(self) -> None:
            self.outer = fused_attention()
            self.outer.__enter__()
            self.inner = patch.object(
                F, "scaled_dot_product_attention", lambda q, k, v, *_, **__: _Attention.apply(q, k, v)
            )
            self.inner.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)
            self.outer.__exit__(*error)

    return Both()


def loss(scale: Scale, chunk: int) -> tuple[Work, Work]:
    """Exact reverse KL with its gradients, chunk after chunk: two heads, two softmaxes, the divergence, and the sum of the head's
    gradients in float32, no metrics; and its products alone."""
    width, taught, vocab = scale.student["hidden_size"], scale.teacher["hidden_size"], scale.vocab
    with META:
        hidden = torch.empty(chunk, width, dtype=torch.bfloat16, requires_grad=True)
        head = torch.empty(vocab, width, dtype=torch.bfloat16, requires_grad=True)
        other, theirs = (torch.empty(n, taught, dtype=torch.bfloat16) for n in (chunk, vocab))
        total = torch.empty(vocab, width)
    products: Any = _WideProduct.apply
    with Counting() as counting:
        logits = products(hidden, head)
        with torch.no_grad():
            teacher_logp = products(other, theirs).log_softmax(-1)
        value = reverse_kl(logits.log_softmax(-1), teacher_logp).sum()
        grads = torch.autograd.grad(value, [head, hidden])
        total += grads[0]
    tokens = scale.rollouts * scale.response
    flops = 2.0 * tokens * vocab * (3 * width + taught)
    return counting.work.times(math.ceil(tokens / chunk)) + Work(flops=flops), Work(flops=flops)


STATED = {"rollouts": (13.0, 31.0), "teacher scoring": (8.2, 8.2), "student's body": (6.5, 6.5), "loss": (5.0, 5.0)}
"""Seconds that were worked out for e8b724f, the least and the most; 33 to 51 for the step."""
CHUNKS = (221, 1024, 4096)
"""221 is what 2^25 logits are of this vocabulary; on a GPU the chunk follows from free memory."""


def count(scale: Scale, card: Card = H200) -> dict[str, Any]:
    """By phase: what is asked for, seconds by the card's rates, and seconds of the floor."""
    written, least = rollouts(scale)
    phases = {
        "rollouts": (written, least),
        "teacher scoring": reading(scale, scale.teacher, learns=False),
        "student's body": reading(scale, scale.student, learns=True),
    }
    chunks = CHUNKS if scale is FULL else (max(16, CHUNK_NUMBERS // scale.vocab // 2**10), 64)
    phases |= {f"loss, chunks of {chunk:,}": loss(scale, chunk) for chunk in chunks}
    rows = {
        name: {**asdict(work), "seconds": work.seconds(card), "floor_seconds": floor.seconds(card)}
        for name, (work, floor) in phases.items()
    }
    return {"card": asdict(card), "scale": asdict(scale), "kernels_per_token": decoding(scale).kernels, "phases": rows}


# ------------------------------------------------------------------ tables


def table(found: dict[str, Any]) -> str:
    """Markdown: the phases of a step, before, counted now, and their floor; below it the step."""
    lines = ["| phase | stated for e8b724f, s | kernels | TB beside products | PFLOP | counted now, s | floor, s |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    before, now, floor = [0.0, 0.0], 0.0, 0.0
    chunks = [name for name in found["phases"] if name.startswith("loss")]
    for name, row in found["phases"].items():
        low, high = STATED.get(name.split(",")[0], (0.0, 0.0)) if name not in chunks[1:] else (0.0, 0.0)
        said = "" if not high else f"{low:g}" if low == high else f"{low:g}-{high:g}"
        lines.append(
            f"| {name} | {said} | {row['kernels']:,.0f} | {row['bytes'] / 1e12:.3g} | {row['flops'] / 1e15:.3g} "
            f"| {row['seconds']:.3g} | {row['floor_seconds']:.3g} |"
        )
        before = [before[0] + low, before[1] + high]
        if name not in chunks[:-1]:
            now, floor = now + row["seconds"], floor + row["floor_seconds"]
    lines.append(f"| step | {before[0]:.0f}-{before[1]:.0f} | | | | {now:.3g} | {floor:.3g} |")
    return "\n".join(lines)


def left_over(found: dict[str, Any]) -> str:
    """Sentences: what chunks of the loss remove, and what stands above the floor."""
    phases, rate = found["phases"], found["card"]
    chunks = [name for name in phases if name.startswith("loss")]
    first, last = phases[chunks[0]], phases[chunks[-1]]
    launch = found["kernels_per_token"] * rate["launch"] * 1e3
    above = {name: row["seconds"] - row["floor_seconds"] for name, row in phases.items() if name not in chunks[:-1]}
    parts = ", ".join(f"{name} {seconds:.2g} s" for name, seconds in above.items())
    saved, fewer = first["seconds"] - last["seconds"], first["kernels"] / last["kernels"]
    return (
        f"Chunks of the loss that follow from free memory take {saved:.2g} s away: the head's gradient, in float32, is summed "
        f"{fewer:.0f} times less often. Above the floor stand {parts}. A token of the embedded engine starts "
        f"{found['kernels_per_token']:,.0f} kernels, {launch:.1f} ms if the host does nothing else; with Python between them it "
        "was put at 25 to 30 ms. Only a CUDA graph, or vLLM, takes that away; elementwise kernels go with `student.compile`."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes; writes nothing")
    tiny = parser.parse_args().tiny
    found = count(TINY if tiny else FULL)
    if not tiny:
        (HERE / "counted.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{table(found)}\n\n{left_over(found)}")


if __name__ == "__main__":
    main()
