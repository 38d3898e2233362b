"""Whether a refactoring changed any number: short seeded runs of everything, at two commits.

    python dev/same_bits.py record before.json      # at the commit before
    python dev/same_bits.py compare before.json     # after; exit 1, and what differs, if anything does

Each case is a run of a few steps on the shipped models, on one thread. Recorded are all numbers of metrics.jsonl and
evals.jsonl and a digest of the weights of the last checkpoint; seconds and memory are left out. FLOPs are compared
apart from the rest, so that a count that is meant to change can be told from a number that is not. Numbers hold on one
machine only: another processor sums in another order.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

UNSTEADY = {"seconds", "tokens_per_second", "peak_bytes", "host_peak_bytes", "store_bytes", "sync", "timeline"}
UNSTEADY |= {"rollout_bytes_per_token", "teacher_bytes_per_token"}
Tree = dict[str, Any]


def base(world: str = "arithmetic", **sections: Any) -> Tree:
    from kibitz import worlds

    shipped = worlds.get(world)
    tree: Tree = {
        "student": {"model": str(shipped.checkpoint("student"))},
        "teacher": sections.get("teacher") or {"model": str(shipped.checkpoint("teacher"))},
        "data": {"world": world, "limit": 64},
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 2, "max_tokens": 40},
        "optim": {"lr": 1e-3, "tokens_per_micro_batch": 512},
        "steps": 3,
        "eval": {"every": 3, "num_prompts": 16},
        "save": {"every": 3, "keep": 1},
        "device": "cpu",
        "threads": 1,
    }
    for name, section in sections.items():
        if name != "teacher":
            tree[name] = {**tree[name], **section} if isinstance(tree.get(name), dict) else section
    return tree


def cases() -> dict[str, Tree]:
    """Every method, and every part that goes around methods, teachers and students."""
    from kibitz import worlds

    teacher, student = (str(worlds.get("arithmetic").checkpoint(name)) for name in ("teacher", "student"))
    long_teacher = str(worlds.get("arithmetic-long").checkpoint("teacher"))
    one, two = {"model": teacher, "name": "one"}, {"model": student, "name": "two", "weight": 0.5}

    def of(method: str, **options: Any) -> Tree:
        return base(method={"type": method, **options})

    def sampled(**options: Any) -> Tree:
        return of("opd", support="sampled", **options)

    def taught(teacher: Any, **sections: Any) -> Tree:
        return base(teacher=teacher, **sections)

    return {
        "sft": of("sft"),
        "sft-teacher": of("sft", source="teacher"),
        "opd": of("opd"),
        "opd-top-k": of("opd", support="top_k", top_k=8),
        "opd-top-k-teacher": of("opd", support="top_k", top_k=8, top_k_of="teacher"),
        "opd-union": of("opd", support="top_k", top_k=8, top_k_of="union", divergence="jsd"),
        "opd-adaptive": of("opd", divergence="adaptive_kl", temperature=2.0, normalize="sequence"),
        "opd-entropy": of("opd", token_weight="entropy"),
        "opd-tip": of("opd", token_weight="tip", divergence="skew_kl"),
        "opd-iw": of("opd", token_weight="iw", divergence="total_variation"),
        "opd-prefix": of("opd", prefix_tokens=8),
        "opd-seeded": of("opd", seed_tokens=6, seed_decays=True),
        "opd-seed-learnt": of("opd", seed_tokens=6, learn_seed=True),
        "opd-held-replayed": of("opd", reference_kl=0.1, replay=0.25, replay_coef=0.5),
        "opd-masked-tokens": of("opd", mask_tokens=["="]),
        "sampled": sampled(),
        "sampled-reward": sampled(reward_coef=0.5, clip_advantage=3.0, policy_loss="ppo_clip"),
        "sampled-discount": sampled(discount=0.9, policy_loss="truncated"),
        "sampled-baseline": sampled(baseline=True, policy_loss="banded"),
        "sampled-extrapolated": sampled(extrapolation=1.25, policy_loss="one_sided"),
        "gkd": of("gkd"),
        "gkd-teacher": of("gkd", source="teacher", on_policy_end=1.0),
        "skd": of("skd", accept_top_k=3),
        "minillm": of("minillm"),
        "distillm2": of("distillm2"),
        "grpo": of("grpo"),
        "kdrl": of("kdrl", skip_correct=True),
        "ammd": of("ammd"),
        "ammd-data": of("ammd", source="dataset"),
        "gad": of("gad", source="teacher"),
        "gad-data": of("gad"),
        "lora": base(student={"lora": {"rank": 4}}),
        "packed-recomputed": base(optim={"packing": True, "checkpointing": True}),
        "muon": base(optim={"name": "muon"}),
        "adamw-bf16": base(student={"dtype": "bfloat16"}),
        "chunked": base(optim={"chunk_tokens": 7}, rollout={"temperature": 0.8, "top_p": 0.95}),
        "guarded": base(guards={"cut_off": "mask"}, rollout={"max_tokens": 12}),
        "mixed": taught([one, two]),
        "routed": taught([{**one, "tasks": ["default"]}, two]),
        "ema": taught({"student": "ema", "context": "{{ prompt }}"}),
        "context": taught({"model": teacher, "context": "{{ prompt }}{{ answer }}"}),
        "stored": taught({"model": teacher, "store": "STORE"}),
        "aligned": taught({"model": long_teacher, "tokenizer": "own"}, method={"type": "opd", "support": "sampled"}),
        "aligned-gold": taught(
            {"model": long_teacher, "tokenizer": "own"}, method={"type": "opd", "alignment": "gold"}
        ),
        "aligned-alm": taught({"model": long_teacher, "tokenizer": "own"}, method={"type": "opd", "alignment": "alm"}),
        "offloaded": taught({"model": teacher, "offload": "layers"}),
        "navigation": base(world="navigation"),
        "long": base(world="arithmetic-long", rollout={"max_tokens": 60}),
        "assistant": base(world="assistant", teacher={"student": "start"}),
    }


def run(tree: Tree, folder: Path, *, resume: bool = False, processes: int = 1) -> None:
    path = folder.with_suffix(".json")
    tree = json.loads(json.dumps({**tree, "output": str(folder)}).replace("STORE", f"{folder}-store"))
    path.write_text(json.dumps(tree))
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "kibitz", "train", str(path), "--quiet", *(["--resume"] if resume else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{folder.name}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def found(folder: Path) -> Tree:
    """What a run left: its numbers without the unsteady ones, and a digest of its weights."""
    rows = {}
    for name in ("metrics", "evals"):
        lines = (folder / f"{name}.jsonl").read_text().split("\n")
        rows[name] = [{k: v for k, v in json.loads(line).items() if k not in UNSTEADY} for line in lines if line]
    flops = [row.pop("flops") for row in rows["metrics"]]
    checkpoint = sorted((folder / "checkpoints").iterdir())[-1]
    digest = hashlib.sha256()
    for file in sorted(checkpoint.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return {**rows, "flops": flops, "weights": digest.hexdigest()}


def one_process(name: str, tree: Tree, folder: Path) -> Tree:
    """In this process, which is quicker than a fresh one for each case."""
    import kibitz

    tree = json.loads(
        json.dumps({**tree, "output": str(folder / name)}).replace("STORE", str(folder / f"{name}-store"))
    )
    kibitz.train(tree)
    return found(folder / name)


def record(only: str | None) -> Tree:
    results: Tree = {}
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        for name, tree in cases().items():
            if only is None or only in name:
                results[name] = one_process(name, tree, folder)
                print(f"{name:22s} {results[name]['weights'][:16]}", flush=True)
        if only is None:
            for name, tree in {"resumed": cases()["kdrl"], "resumed-ammd": cases()["ammd"]}.items():
                run({**tree, "steps": 2, "optim": {**tree["optim"], "schedule": "constant"}}, folder / name)
                run(
                    {**tree, "steps": 4, "optim": {**tree["optim"], "schedule": "constant"}}, folder / name, resume=True
                )
                results[name] = found(folder / name)
            for name in ("opd", "opd-held-replayed", "grpo"):
                run(cases()[name], folder / f"two-{name}", processes=2)
                results[f"two-{name}"] = found(folder / f"two-{name}")
            subprocess.run(
                [sys.executable, "-m", "kibitz", "demo", "--output", str(folder / "demo")],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            results["demo"] = found(folder / "demo")
            last = results["demo"]["evals"][-1]
            print(
                f"demo: {last['sampled']['accuracy']:.4f} at T=1, {last['greedy']['accuracy']:.4f} greedy",
                last["reverse_kl"],
            )
    return results


def differences(before: Any, after: Any, place: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        names = list(dict.fromkeys([*before, *after]))
        return [d for n in names for d in differences(before.get(n), after.get(n), f"{place}/{n}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [d for i, pair in enumerate(zip(before, after, strict=True)) for d in differences(*pair, f"{place}/{i}")]
    return [] if before == after else [f"{place}: {before!s:.60} -> {after!s:.60}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", help="cases whose name contains this")
    options = parser.parse_args()
    results = record(options.only)
    if options.action == "record":
        options.file.write_text(json.dumps(results, indent=1))
        return 0
    before = json.loads(options.file.read_text())
    before = {name: case for name, case in before.items() if name in results}
    flops = differences({n: c["flops"] for n, c in before.items()}, {n: c["flops"] for n, c in results.items()})
    numbers = [{n: {k: v for k, v in c.items() if k != "flops"} for n, c in r.items()} for r in (before, results)]
    other = differences(*numbers)
    for title, lines in (("FLOPs", flops), ("numbers and weights", other)):
        print(f"{title}: {len(lines)} differences in {len(results)} runs", *lines[:40], sep="\n  ")
    return int(bool(other or flops))


if __name__ == "__main__":
    sys.exit(main())
