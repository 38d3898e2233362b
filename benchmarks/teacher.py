"""What asking a teacher costs: its whole distribution here, its top K here, and the top K of a server over HTTP.

    python -m benchmarks.teacher                     # 5M under 0.5M and K = 64; HTTP by vLLM where .venv-vllm is
    python -m benchmarks.teacher --size 25M --top-k 16,64
    python -m benchmarks.teacher --tiny

Each way is a run of `opd` of a few steps. Seconds for a token of a response count scoring and the student's training, which does
what is left of the loss; a server's own seconds are in the wall time only. Bytes are those kept for a token until the loss
needs them, and over HTTP those of the answers.
"""

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import side_by_side, toys
from benchmarks.side_by_side import HERE, Side, Spread, Table, middle, ratios, say

FULL = "full, here"


def ways(options: Any, home: Path) -> dict[str, dict[str, Any]]:
    """By name: what differs in the recipe."""
    found: dict[str, dict[str, Any]] = {FULL: {}}
    top = {int(k): {"method": {"support": "top_k", "top_k": int(k)}} for k in options.top_k.split(",")}
    found |= {f"top {k}, here": change for k, change in top.items()}
    found |= {"written token, here": {"method": {"support": "sampled"}}}
    if options.vllm.exists() and not options.without_server:
        served = {"=": True, "model": str(home / "teacher"), "engine": "vllm", "dtype": "float32"}
        found |= {f"top {k}, HTTP": {**change, "teacher": served} for k, change in top.items()}
    return found


def prepare(home: Path, student: str, teacher: str, rows: int, steps: int, prompt: int) -> None:
    if (home / "prompts.jsonl").exists():
        return
    for seed, (role, size) in enumerate((("student", student), ("teacher", teacher))):
        toys.save(toys.build(toys.SIZES[size], seed), home / role)
    toys.write_prompts(home / "prompts.jsonl", toys.prompts(toys.SIZES[student].vocab, rows * steps, prompt))


def seconds(row: dict[str, Any], phase: str, kind: str) -> float:
    """For a token of a response: the median over all steps but the first."""
    steps = zip(row["steps"], row["num_tokens"], strict=True)
    found = [step.get(phase, {kind: 0.0})[kind] / tokens for step, tokens in steps]
    return median(found[1:])


def asked(row: dict[str, Any]) -> float:
    """Wall seconds of scoring and training, of a token."""
    return seconds(row, "scoring", "wall") + seconds(row, "training", "wall")


def report(table: Table, case: str, names: list[str]) -> str:
    titles = [
        case,
        "scoring, us CPU",
        "training, us CPU",
        "both, us wall",
        "bytes kept",
        "bytes answered",
        "time / full",
    ]
    rows = []
    for name in names:
        if not (found := table.of(case, name)):
            continue
        cells = [
            f"{1e6 * middle(found, lambda row, p=p: seconds(row, p, 'cpu')):,.0f}" for p in ("scoring", "training")
        ]
        cells.append(f"{1e6 * middle(found, asked):,.0f}")
        first = found[0]
        cells.append(f"{(first['signal_bytes'][-1] or 0.0) / first['num_tokens'][-1]:,.0f}")
        answered = first["bytes"][-1]
        cells.append("" if answered is None else f"{answered:,.0f}")
        cells.append("" if name == FULL else str(ratios(table, case, name, asked, ours=FULL)))
        rows.append([name, *cells])
    failed = {row["side"]: row["failed"] for row in table.rows if row["case"] == case and "failed" in row}
    said = "".join(f"\n{name} did not run: {why}" for name, why in failed.items())
    return side_by_side.lines(titles, rows) + said


def main(given: list[str] | None = None) -> Table:
    made = side_by_side.parser(__doc__ or "", rounds=3)
    made.add_argument("--size", default="5M", help="of the teacher: " + ", ".join(toys.SIZES))
    made.add_argument("--top-k", default="64", help="with commas between them")
    made.add_argument("--vllm", type=Path, default=HERE / ".venv-vllm" / "bin" / "python", help="a Python with vLLM")
    made.add_argument("--without-server", action="store_true", help="leave HTTP out")
    options = side_by_side.read(made, given)
    table = Table("teacher", options)
    if not options.vllm.exists():
        say(f"HTTP is left out: there is no {options.vllm}; make .venv-vllm/.installed")
    print(side_by_side.heading(table))
    student, teacher = ("0.03M", "0.03M") if options.tiny else ("0.5M", options.size)
    rows, tokens, steps, prompt = (4, 8, 3, 6) if options.tiny else (64, 64, 3, 20)
    if options.tiny:
        options.top_k = "8"
    home = table.path.parent / "models" / f"teacher-{teacher}-of-{student}"
    prepare(home, student, teacher, rows, steps, prompt)
    case, every = f"{teacher} of {student}, {rows} x {tokens}", ways(options, home)
    recipe = {"side": "kibitz", "home": str(home), "rows": rows, "tokens": tokens, "steps": steps, "lr": 1e-4}
    env = {"KIBITZ_VLLM": str(options.vllm), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
    sides = [Side(name, "step_sides", {**recipe, "change": change}, env=env) for name, change in every.items()]
    found: dict[str, Spread] = {}
    for number in table.alternate(case, sides, 1):
        say(f"{case}: round {number + 1} of {options.rounds}")
    print(report(table, case, list(every)) + "\n", flush=True)
    for name in every:
        spread = ratios(table, case, FULL, asked, ours=name)
        found |= {} if spread is None or name == FULL else {f"{case}: full against {name}": spread}
    side_by_side.settle(table, found)
    return table


if __name__ == "__main__":
    main()
