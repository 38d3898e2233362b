"""How long a step of distillation takes on one GPU, beside what its memory and its matrix units allow, and how much memory it
takes, beside what `kibitz check` says.

    python benchmarks/gpu.py                  # one H100 or H200, about nine minutes; writes benchmarks/gpu-CARD.json
    python benchmarks/gpu.py --tiny           # a CPU, a minute: shows that everything runs, and no more
    python benchmarks/gpu.py --arms floor,full-1.7B --tokens 256

Nothing is downloaded: models have Qwen3's shapes and random weights, prompts are made-up words. Each arm has a process of
its own and is written down as it ends, and each step of it before that; arms that are whole in the file are not run again.
benchmarks/README.md says how to read the table.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@dataclass(frozen=True)
class Scale:
    """The sizes of a benchmark. `ends` words end a response: a mean of vocabulary / ends tokens, with a long tail."""

    vocab: int
    shapes: dict[str, dict[str, int]]
    prompts: int
    samples: int
    prompt_tokens: int
    max_tokens: int
    ends: int
    device: str


def shape(hidden: int, inner: int, layers: int, heads: int, tied: bool = True) -> dict[str, int]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2)}
    return sizes | heads_of | {"tie_word_embeddings": tied}


QWEN3 = {
    "0.6B": shape(1024, 3072, 28, 16),
    "1.7B": shape(2048, 6144, 28, 16),
    "8B": shape(4096, 12288, 36, 16, tied=False) | {"num_attention_heads": 32},
}
SMALL = {"0.6B": shape(32, 64, 2, 2), "1.7B": shape(48, 96, 2, 2), "8B": shape(64, 128, 2, 2, tied=False)}
FULL = Scale(151_669, QWEN3, 64, 4, 200, 1024, 380, "cuda")
TINY = Scale(2_000, SMALL, 4, 2, 6, 24, 150, "cpu")

STUDENTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "full-0.6B": ("0.6B", "1.7B", {}),
    "full-1.7B": ("1.7B", "8B", {}),
    "lora-1.7B": ("1.7B", "8B", {"student": {"lora": {"rank": 32}}}),
    "sampled-1.7B": ("1.7B", "8B", {"method": {"type": "opd", "support": "sampled"}}),
    "long-tail-0.6B": ("0.6B", "1.7B", {"rollout": {"stop": "ENDS"}}),
}
PEERS = {f"trl-{arm}": arm for arm in ("full-1.7B", "lora-1.7B", "full-0.6B")}
"""Arms that TRL runs, with the models and prompts of ours."""
ARMS = ("floor", "decode-0.6B", *STUDENTS, "resume-0.6B", "decode-1.7B", *PEERS)


def words(scale: Scale) -> list[str]:
    return ["<end>", "<pad>", *(f"w{i}" for i in range(scale.vocab - 2))]


def make_model(home: Path, name: str, scale: Scale) -> Path:
    """A folder with random weights in bfloat16, made on the device, and a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    folder = home / name
    if (folder / "tokenizer.json").exists():
        return folder
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words(scale))}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    config = Qwen3Config(
        vocab_size=scale.vocab, max_position_embeddings=4096, head_dim=128 if scale.shapes is QWEN3 else 16,
        bos_token_id=None, eos_token_id=0, pad_token_id=1, **scale.shapes[name],
    )  # fmt: skip
    torch.manual_seed(len(name))
    with torch.device(scale.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(home: Path, arm: str, scale: Scale, steps: int = 2) -> dict[str, Any]:
    student, teacher, changes = STUDENTS[arm]
    draw = random.Random(0)
    rows = [
        {"prompt": " ".join(draw.choices(words(scale)[2:], k=scale.prompt_tokens))} for _ in range(4 * scale.prompts)
    ]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rollout = {"prompts_per_step": scale.prompts, "samples_per_prompt": scale.samples, "max_tokens": scale.max_tokens}
    tree: dict[str, Any] = {
        "student": {"model": str(make_model(home, student, scale)), "dtype": "bfloat16"},
        "teacher": {"model": str(make_model(home, teacher, scale)), "dtype": "bfloat16"},
        "data": {"prompts": str(home / "prompts.jsonl")},
        "method": {"type": "opd"},
        "rollout": rollout,
        "optim": {"lr": 1e-6, "tokens_per_micro_batch": 16384, "checkpointing": True},
        "eval": {"every": 0},
        "save": {"every": 0},
        "steps": steps,
        "device": scale.device,
        "output": str(home / f"run-{arm}"),
    }
    for name, section in changes.items():
        tree[name] = {**tree.get(name, {}), **section}
    if tree["rollout"].get("stop") == "ENDS":
        tree["rollout"]["stop"] = words(scale)[2 : 2 + scale.ends]
    return tree


# ------------------------------------------------------------------ arms


def floor(home: Path, scale: Scale) -> dict[str, Any]:
    import torch

    from kibitz.preflight.speed import speed_of

    speed = speed_of(torch.device(scale.device))
    name = torch.cuda.get_device_name() if scale.device == "cuda" else "CPU"
    return {"card": name, "torch": torch.__version__, "teraflops": speed.flops / 1e12, "terabytes": speed.bytes / 1e12}


def train(home: Path, arm: str, scale: Scale) -> dict[str, Any]:
    """The second step of a run: seconds and peaks by phase, and what the plan said."""
    import kibitz

    tree = recipe(home, arm, scale)
    start = time.perf_counter()
    rows = kibitz.train(tree, overwrite=True).metrics
    took = {"run_seconds": time.perf_counter() - start, "first_step_seconds": rows[0]["seconds"]}
    return kept_of(rows[-1]) | took | plan_of(tree, scale)


def kept_of(row: dict[str, Any]) -> dict[str, Any]:
    kept = ("seconds", "tokens_per_second", "num_tokens", "longest_response", "peak_bytes", "grad_norm", "mismatch")
    return {name: row[name] for name in kept if name in row}


def plan_of(tree: dict[str, Any], scale: Scale) -> dict[str, Any]:
    """What `kibitz check` plans for a recipe, and the bytes and FLOPs of its floor, for one step."""
    import torch

    from kibitz import config
    from kibitz.preflight import budget
    from kibitz.preflight.shapes import shape_of

    loaded = config.load(tree)
    shapes = [shape_of(section, torch.bfloat16) for section in (loaded.student, loaded.teacher)]
    device = torch.device(scale.device)
    room = budget.device_room(device)[0] if scale.device == "cuda" else None
    models, program = budget.Models(shapes[0], shapes[1:]), budget.program_bytes(device)
    plan = budget.memory(loaded, models, scale.prompt_tokens, room=room, program=program)
    flops = budget.cost(loaded, shapes[0], shapes[1:], [scale.prompt_tokens], budget.Speed(1.0, 1.0), None).flops
    responses = scale.prompts * scale.samples
    read = budget.decoded_bytes(loaded, shapes[0], scale.prompt_tokens, 1)
    return {
        "rollouts": responses,
        "planned_bytes": plan.as_numbers(),
        "floor_bytes": read,
        "floor_flops": {name: number / loaded.steps for name, number in flops.items()},
    }


def resume(home: Path, arm: str, scale: Scale) -> dict[str, Any]:
    """A run of one step, gone on with for another: the optimizer's state comes back to the device."""
    import kibitz

    small = {"rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_tokens": 16}}
    tree = recipe(home, "full-0.6B", scale, steps=1)
    tree = {**tree, **small, "optim": {**tree["optim"], "schedule": "constant"}, "output": str(home / "run-resume")}
    kibitz.train(tree, overwrite=True)
    start = time.perf_counter()
    run = kibitz.train({**tree, "steps": 2}, resume=True)
    seconds, row = time.perf_counter() - start, run.metrics[-1]
    return {"steps": len(run.metrics), "grad_norm": row["grad_norm"], "seconds": seconds}


def decode(home: Path, arm: str, scale: Scale) -> dict[str, Any]:
    """The engine alone, under the profiler: kernels started for each token, and the share of time the GPU works."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from kibitz.config import ModelConfig
    from kibitz.engines.torch import TorchEngine
    from kibitz.models.load import load_model
    from kibitz.types import Prompt, Sampling

    folder, device = make_model(home, arm.removeprefix("decode-"), scale), torch.device(scale.device)
    engine = TorchEngine(load_model(ModelConfig(model=str(folder), dtype="bfloat16"), "student", device))
    prompts = [Prompt(tuple(range(2, 2 + scale.prompt_tokens)), "", str(i)) for i in range(scale.prompts)]
    tokens = min(64, scale.max_tokens)

    def seconds(num: int) -> float:
        start = time.perf_counter()
        engine.generate(prompts, Sampling(max_tokens=num, num_samples=scale.samples))
        return time.perf_counter() - start

    seconds(4)  # chooses the decoder, loads kernels
    short, long = seconds(tokens // 2), seconds(tokens)
    found: dict[str, Any] = {"decoder": type(engine.decoder()).__name__, "rows": scale.prompts * scale.samples}
    found["ms_per_token"] = 1000 * (long - short) / (tokens - tokens // 2)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if scale.device == "cuda" else [])]
    with profile(activities=activities) as watched:
        took = seconds(tokens)
    events = watched.key_averages()
    launches = sum(event.count for event in events if "LaunchKernel" in event.key)
    busy = sum(getattr(event, "self_device_time_total", 0.0) for event in events) / 1e6
    return found | {"launches_per_token": launches / tokens, "busy_share": busy / took}


def peer(home: Path, arm: str, scale: Scale) -> dict[str, Any]:
    """The same step through TRL, beside the floor of ours; or why there is none."""
    sys.path.insert(0, str(HERE))
    import gpu_trl

    if (why := gpu_trl.missing()) is not None:
        return {"skipped": why}
    tree = recipe(home, PEERS[arm], scale)
    return gpu_trl.train(tree, home / f"run-{arm}") | plan_of(tree, scale)


KINDS = {"trl": peer, "floor": lambda home, arm, scale: floor(home, scale), "decode": decode, "resume": resume}


def measure(home: Path, arm: str, scale: Scale) -> dict[str, Any]:
    return KINDS.get(arm.split("-")[0], train)(home, arm, scale)


# ------------------------------------------------------------------ the table


def table(found: dict[str, Any]) -> str:
    """A line for each arm: what it took, and the floor below it."""
    top = found.get("floor", {})
    speeds = (top.get("teraflops", 0.0), top.get("terabytes", 0.0))
    lines = ["{}: {:.3g} TFLOP/s, {:.3g} TB/s".format(top.get("card", "?"), *speeds)]
    head = ("arm", "step s", "rollouts", "scoring", "training", "floor s", "tokens/s", "peak GiB", "planned")
    lines.append(" ".join(f"{title:>12}" for title in head))
    for arm, row in found.items():
        if "planned_bytes" not in row:  # of another kind, or unfinished
            if arm != "floor":
                lines.append(f"{arm:>12} {json.dumps(row)}")
            continue
        seconds, peaks, plan = row["seconds"], row.get("peak_bytes", {}), row["planned_bytes"]
        planned = sum(plan["held"].values()) + max(
            sum(parts.values()) for name, parts in plan.items() if name != "held"
        )
        cells = [sum(seconds.values()), *(seconds.get(name, 0.0) for name in ("sampling", "scoring", "training"))]
        cells += [floor_seconds(row, top), row["tokens_per_second"], max(peaks.values(), default=0.0) / 2**30]
        lines.append(" ".join([f"{arm:>12}", *(f"{cell:12.2f}" for cell in (*cells, planned / 2**30))]))
    return "\n".join(lines)


def floor_seconds(row: dict[str, Any], top: dict[str, Any]) -> float:
    """The least that a step could take: what rollouts read by the memory's speed, all else by that of the matrix units."""
    other = sum(number for name, number in row["floor_flops"].items() if name != "student_sampling")
    return 0.0 if not top else row["floor_bytes"] / (top["terabytes"] * 1e12) + other / (top["teraflops"] * 1e12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models on a CPU")
    parser.add_argument("--arms", default=",".join(ARMS), help="which, with commas between them")
    parser.add_argument("--out", type=Path, help="the JSON file; else by the name of the card")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no arm after so many; run it again to go on")
    parser.add_argument("--tokens", type=int, help="of a response; default: 1,024")
    options = parser.parse_args()
    scale = TINY if options.tiny else FULL
    if options.tokens is not None:
        scale = replace(scale, max_tokens=options.tokens)
    if options.work is not None:  # the process of one arm
        result = measure(options.work, options.arms, scale)
        (options.work / f"{options.arms}.json").write_text(json.dumps(result))
        return
    tokens = [] if options.tokens is None else ["--tokens", str(options.tokens)]
    name = "-".join(["gpu", "tiny" if options.tiny else card(), *tokens[1:]])
    out = options.out or HERE / f"{name}.json"
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    found = {arm: row for arm, row in found.items() if "unfinished" not in row}
    begun, left = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as home:
        for arm in [name for name in options.arms.split(",") if name not in found]:
            start = time.perf_counter()
            if start - begun > 60 * options.minutes and not options.tiny:
                left.append(arm)
                continue
            again = [
                sys.executable,
                __file__,
                "--work",
                home,
                "--arms",
                arm,
                *(["--tiny"] if options.tiny else []),
                *tokens,
            ]
            if (error := run_arm(again, arm, Path(home), found, out)) is not None:
                print(f"{arm} failed:\n{error[-3000:]}", file=sys.stderr)
                continue
            found[arm] = json.loads((Path(home) / f"{arm}.json").read_text())
            out.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{arm}: {time.perf_counter() - start:.0f} s with loading\n{table(found)}\n", flush=True)
    if left:
        print(f"left for the same command once more: {', '.join(left)}")
    if missing := set(options.arms.split(",")) - found.keys() - {*left}:
        sys.exit(f"failed: {', '.join(sorted(missing))}")


def run_arm(command: list[str], arm: str, home: Path, found: dict[str, Any], out: Path) -> str | None:
    """Run an arm in its process; while it runs, write down each step that it has finished, so that a machine that is taken away
    leaves more than nothing. What it said, if it failed."""
    said, rows, steps = home / f"{arm}.err", 0, home / f"run-{arm}" / "metrics.jsonl"
    with said.open("w") as stream, subprocess.Popen(command, stderr=stream) as process:
        while process.poll() is None:
            time.sleep(0.5)
            lines = steps.read_text().rpartition("\n")[0].splitlines() if steps.exists() else []
            if len(lines) > rows:
                rows = len(lines)
                unfinished = {"unfinished": [kept_of(json.loads(line)) for line in lines]}
                out.write_text(json.dumps({**found, arm: unfinished}, indent=1) + "\n")
    return said.read_text() if process.returncode else None


def card() -> str:
    import torch

    return torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else sys.exit(
        "there is no GPU here: write --tiny"
    )  # fmt: skip


if __name__ == "__main__":
    main()
