"""One step ahead against in time, with vLLM's server on one core and the trainer on another.

    KIBITZ_VLLM=.venv-vllm/bin/python python benchmarks/ahead.py [--steps 12] [--cores 0,1] [--processes 1] [--output ahead.json]

A random student of Qwen3's architecture under a teacher of the same size learns from its own text, once with `max_staleness: 0`
and once with 1. `kibitz train`, or `torchrun` of several of it, starts and ends the server itself; the program that it starts
pins it to the second core, and all processes of the trainer are pinned to the first. Printed: seconds of a step without the first
two, in which both kinds wait alike, and by the run's own timeline the seconds in which the server wrote while the trainer learnt.
Nothing else should run on either core. The runs and their reports, whose timeline shows the same, stay in runs/ahead/.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
FOLDER = Path("runs/ahead")
KINDS = {"in time": 0, "one step ahead": 1}
WARM_UP = 2
"""Steps that are left out: compilers and allocators, and the step whose rollouts nobody has written before."""


def prepare(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from kibitz import worlds

    tokenizer = worlds.get("arithmetic").tokenizer()
    for seed, name in enumerate(("student", "teacher")):
        if (folder / name / "config.json").exists():
            continue
        torch.manual_seed(seed)
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        settings = Qwen3Config(vocab_size=len(tokenizer), head_dim=32, max_position_embeddings=2048, **SIZES, **ends)
        AutoModelForCausalLM.from_config(settings).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def recipe(staleness: int, steps: int, tokens: int, rollouts: int, output: Path) -> dict[str, Any]:
    return {
        "student": {"model": str(FOLDER / "student")},
        "teacher": {"model": str(FOLDER / "teacher")},
        "data": {"world": "arithmetic"},
        "rollout": {
            "engine": "vllm",
            "max_staleness": staleness,
            "prompts_per_step": rollouts,
            "samples_per_prompt": 1,
            "max_tokens": tokens,
        },
        "steps": steps,
        "eval": {"every": 0, "num_prompts": 1, "heatmaps": 0},
        "save": {"every": 0},
        "threads": 1,
        "device": "cpu",
        "output": str(output),
    }


def pinned(core: int, folder: Path) -> Path:
    """A program that runs the vLLM that `KIBITZ_VLLM` names on one core."""
    path = folder / "pinned"
    path.write_text(f'#!/bin/sh\nexec taskset -c {core} "{os.environ["KIBITZ_VLLM"]}" "$@"\n')
    path.chmod(0o755)
    return path.resolve()


def seconds_of_both(rows: list[dict[str, Any]], first: str, second: str) -> float:
    """The seconds in which both were at work, by the timelines of the steps."""
    spans = {
        name: sorted(tuple(span) for row in rows for span in row["timeline"].get(name, ())) for name in (first, second)
    }
    return sum(
        max(0.0, min(end, other_end) - max(start, other))
        for start, end in spans[first]
        for other, other_end in spans[second]
    )


def measured(kind: str, staleness: int, asks: argparse.Namespace) -> dict[str, Any]:
    import yaml

    ours, theirs = (int(core) for core in asks.cores.split(","))
    output = FOLDER / kind.replace(" ", "-")
    path = FOLDER / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(recipe(staleness, asks.steps, asks.tokens, asks.rollouts, output)))
    # Both stop at their own core: OMP_NUM_THREADS is that of the server as well.
    environment = os.environ | {"KIBITZ_VLLM": str(pinned(theirs, FOLDER)), "OMP_NUM_THREADS": "1",
                                "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(asks.processes), "-m"]
    trained = [sys.executable, "-m", *(several if asks.processes > 1 else [])]
    trained += ["kibitz", "train", str(path), "--overwrite", "--quiet"]
    subprocess.run(["taskset", "-c", str(ours), *trained], check=True, env=environment)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = rows[WARM_UP:]
    spans = [span for row in kept for spans in row["timeline"].values() for span in spans]
    lasted = max(end for _, end in spans) - min(start for start, _ in spans)
    return {
        "seconds_a_step": lasted / len(kept),
        "both_at_work_a_step": seconds_of_both(kept, "student_sampling", "student_training") / len(kept),
        "phases": {name: fmean(row["seconds"][name] for row in kept) for name in kept[0]["seconds"]},
        "staleness": [row.get("staleness", 0) for row in rows],
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--cores", default="0,1", help="of the trainer and of the server")
    parser.add_argument("--processes", type=int, default=1, help="that train")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("ahead.json"))
    asks = parser.parse_args()
    if "KIBITZ_VLLM" not in os.environ:
        parser.error("name the Python that has vLLM by KIBITZ_VLLM")
    FOLDER.mkdir(parents=True, exist_ok=True)
    prepare(FOLDER)
    found: dict[str, Any] = {
        "steps": asks.steps,
        "processes": asks.processes,
        "rollouts": asks.rollouts,
        "tokens": asks.tokens,
        **SIZES,
    }
    for kind, staleness in KINDS.items():
        found[kind] = measured(kind, staleness, asks)
        asks.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{kind}: {found[kind]['seconds_a_step']:.2f} s a step, both at work for "
              f"{found[kind]['both_at_work_a_step']:.2f} of them", flush=True)  # fmt: skip
    ratio = found["in time"]["seconds_a_step"] / found["one step ahead"]["seconds_a_step"]
    print(f"one step ahead is {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
