"""How fast the embedded engine writes, against `model.generate` and between its own decoders. One thread, one run.

    python benchmarks/generate.py [out.json]

Seconds are process CPU seconds, the least of several runs taken in turns, so that other work on the machine hurts
all sides alike: trust the ratios. `stops` has a stop token in a vocabulary of nearly even odds, so responses have
geometric lengths and rows leave and enter; the other workloads write every token.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config
from transformers.utils import logging

from kibitz.engines.cache import CachedDecoder
from kibitz.engines.fused import FusedDecoder
from kibitz.engines.torch import TorchEngine
from kibitz.types import Prompt, Sampling


@dataclass
class Model:
    model: PreTrainedModel
    vocab_size: int
    device: torch.device


@dataclass(frozen=True)
class Size:
    vocab: int
    hidden: int
    layers: int


@dataclass(frozen=True)
class Work:
    rollouts: int
    rows: int
    prompt: int
    new: int
    stops: bool = False


SIZES = {"0.15M": Size(64, 64, 3), "0.5M": Size(512, 96, 4), "5M": Size(512, 256, 6)}
WORKS = {
    "64 x 32": Work(64, 64, 20, 32),
    "256 x 32": Work(256, 256, 20, 32),
    "64 x 128": Work(64, 64, 20, 128),
    "256 x 128": Work(256, 256, 20, 128),
    "256 x 128, 64 rows, stops": Work(256, 64, 20, 128, stops=True),
}


def build(size: Size) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=max(1, size.hidden // 64),
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def with_engine(model: PreTrainedModel, work: Work, size: Size, decoder: type) -> Callable[[], int]:
    """A `generate` by one of the engine's decoders; says how many tokens it wrote."""
    engine = TorchEngine(Model(model, size.vocab, model.device), work.rows)
    engine.use(decoder(model))
    prompts = [Prompt(tuple(ids), "", str(key)) for key, ids in enumerate(prompt_ids(work, size).tolist())]
    sampling = Sampling(max_tokens=work.new, stop_ids=(1,) if work.stops else ())
    return lambda: sum(rollout.num_tokens for rollout in engine.generate(prompts, sampling))


def with_hf(model: PreTrainedModel, work: Work, size: Size) -> Callable[[], int]:
    """Hugging Face's `generate` with its default cache, the prompts in batches of as many rows as the engine has."""
    ids_NP = prompt_ids(work, size)

    def generate() -> int:
        written = 0
        for ids_BP in ids_NP.split(work.rows):
            out_BL = model.generate(
                ids_BP,
                attention_mask=torch.ones_like(ids_BP),
                do_sample=True,
                top_k=0,
                max_new_tokens=work.new,
                eos_token_id=1 if work.stops else None,
                pad_token_id=0,
            )
            new_BT = out_BL[:, work.prompt :]
            ended_BT = (new_BT == 1).cumsum(-1) - (new_BT == 1).int() > 0 if work.stops else torch.zeros_like(new_BT)
            written += int((ended_BT == 0).sum())
        return written

    return generate


def prompt_ids(work: Work, size: Size) -> torch.Tensor:
    return torch.randint(2, size.vocab, (work.rollouts, work.prompt), generator=torch.Generator().manual_seed(1))


def race(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, dict[str, float]]:
    """CPU seconds and tokens of each side, the best of some rounds; in each round every side runs once."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.process_time()
            tokens = run()
            seconds = time.process_time() - start
            if name not in best or tokens / seconds > best[name]["tokens_per_second"]:
                best[name] = {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}
    return best


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    rows = []
    print("tokens per CPU second, and ratios")
    columns = ["HF generate", "cached", "fused", "cached/HF", "fused/HF", "fused/cached"]
    print(f"{'model':6} {'work':26}" + "".join(f"{column:>13}" for column in columns))
    for size_name, size in SIZES.items():
        model = build(size)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        for work_name, work in WORKS.items():
            if parameters > 1e6 and work.rollouts > 64:
                continue  # minutes, and the ratios of 64 rows tell the same
            sides = {
                "hf": with_hf(model, work, size),
                "cached": with_engine(model, work, size, CachedDecoder),
                "fused": with_engine(model, work, size, FusedDecoder),
            }
            result = race(sides, rounds=3 if parameters > 1e6 else 5)
            speed = {name: side["tokens_per_second"] for name, side in result.items()}
            rows.append({"model": size_name, "parameters": parameters, "work": work_name, **result})
            ratios = [speed["cached"] / speed["hf"], speed["fused"] / speed["hf"], speed["fused"] / speed["cached"]]
            numbers = "".join(f"{value:13.0f}" for value in speed.values()) + "".join(
                f"{ratio:13.2f}" for ratio in ratios
            )
            print(f"{size_name:6} {work_name:26}{numbers}", flush=True)
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump({"torch": torch.__version__, "threads": 1, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
