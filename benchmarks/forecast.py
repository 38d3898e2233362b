"""What `kibitz check` plans for each phase of a step on this CPU, beside what a run then takes.

    python benchmarks/forecast.py [out.json] [--sizes 9M,22M,47M]

Random models of Qwen3's architecture, a student under a teacher of the same size, two steps; check and run have a process of
their own, for each size. A run's numbers are those of metrics.jsonl: the largest resident set of the process in each phase
(VmHWM, which is set back between phases), the larger of both steps. Sizes that stand in out.json are not run again.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "9M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "vocab_size": 8_192},
    "22M": {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8, "vocab_size": 16_384},
    "47M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "vocab_size": 32_768},
    "110M": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "vocab_size": 32_768},
}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Lets glibc give back what is freed, so that a resident set is what is in use, as an allocator of a GPU counts it."""
PHASES = {"sampling": "rollouts", "scoring": "scoring", "training": "training"}
"""The names of a run's phases, and those of a plan."""
WORDS = 64


def prepare(folder: Path, size: str) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    shape = SIZES[size]
    words = ["<end>", "<pad>", *(f"w{i}" for i in range(shape["vocab_size"] - 2))]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    heads = {"num_attention_heads": shape["hidden_size"] // 64, "num_key_value_heads": shape["hidden_size"] // 128 or 1}
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1, "tie_word_embeddings": True}
        settings = Qwen3Config(head_dim=64, max_position_embeddings=1024, **heads, **shape, **ends)
        AutoModelForCausalLM.from_config(settings).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    draw = random.Random(0)
    rows = [{"prompt": " ".join(draw.choices(words[2:], k=WORDS))} for _ in range(16)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(folder: Path) -> dict[str, Any]:
    return {
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / "teacher")},
        "data": {"prompts": str(folder / "prompts.jsonl")},
        "method": {"type": "opd"},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_tokens": 16},
        "optim": {"lr": 1e-5, "tokens_per_micro_batch": 640},
        "eval": {"every": 0, "heatmaps": 0},
        "steps": 2,
        "device": "cpu",
        "threads": 1,
        "output": str(folder / "run"),
    }


def planned(folder: Path) -> dict[str, float]:
    """Bytes of each phase, with what is held all the time."""
    from kibitz import config, preflight

    (found,) = (f for f in preflight.check_files(config.load(recipe(folder))) if f.name == "memory")
    parts = found.numbers["bytes"]
    held = sum(parts["held"].values())
    return {phase: held + sum(parts[name].values()) for phase, name in PHASES.items()} | {"parts": parts}


def taken(folder: Path) -> dict[str, float]:
    import kibitz

    rows = kibitz.train(recipe(folder), overwrite=True).metrics
    return {phase: max(row["peak_bytes"][phase] for row in rows) for phase in PHASES}


WORK = {"prepare": prepare, "planned": lambda folder, _: planned(folder), "taken": lambda folder, _: taken(folder)}


def measure(size: str) -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as name:
        for work in WORK:
            command = [sys.executable, __file__, "--folder", name, "--work", work, "--sizes", size]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **MALLOC})
            found[work] = json.loads(done.stdout.splitlines()[-1])
    parts = found["planned"].pop("parts")
    off = {phase: found["planned"][phase] / found["taken"][phase] - 1 for phase in PHASES}
    return {"planned_bytes": found["planned"], "taken_bytes": found["taken"], "off_by": off, "parts": parts}


def table(found: dict[str, Any]) -> str:
    """Lines of Markdown: MiB planned and taken by phase, and the difference."""
    lines = ["| size | phase | planned MiB | taken MiB | off by |", "|---|---|--:|--:|--:|"]
    for size, row in found.items():
        for phase in PHASES:
            plan, took = row["planned_bytes"][phase] / 2**20, row["taken_bytes"][phase] / 2**20
            lines.append(f"| {size} | {phase} | {plan:,.0f} | {took:,.0f} | {row['off_by'][phase]:+.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--sizes", default="9M,22M,47M", help="which, with commas between them")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work is not None:
        print(json.dumps(WORK[given.work](given.folder, given.sizes)))
        return
    found: dict[str, Any] = json.loads(given.out.read_text()) if given.out is not None and given.out.exists() else {}
    for size in [name for name in given.sizes.split(",") if name not in found]:
        found[size] = measure(size)
        if given.out is not None:
            given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
