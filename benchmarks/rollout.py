"""Sampling alone: the embedded engine beside `model.generate`, transformers' continuous batching and vLLM's CPU build.

    python -m benchmarks.rollout                     # 0.5M and 5M; 1, 16, 64 and 256 rows; short and long-tailed lengths
    python -m benchmarks.rollout --sizes 0.5M --rows 16,64 --side-repo before=../kibitz-before
    python -m benchmarks.rollout --real FOLDER       # a real model, as well
    python -m benchmarks.rollout --tiny

Short responses have 32 tokens each; long-tailed ones end by chance, after 55 tokens on average and 256 at most, four for each
row of the engine. The floor is what no program beats here: FLOPs at the roof of one product of the model, or its weights read
once for each token of a row. benchmarks/README.md says how to read the table.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import side_by_side, toys
from benchmarks.side_by_side import HERE, OURS, Side, Spread, Table, middle, ratios, say

SHORT, TAIL, TAIL_END = 32, 256, -4.0
PROMPT = 20
VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
OTHERS = ("generate", "generate_batch", "vllm")
SLOW = {"generate_batch": 64}
"""Sides that are asked for no more rows than this: they take minutes."""


def loads(rows: list[int], tail: bool, tokens: int) -> list[dict[str, Any]]:
    """What a model is asked for: each number of rows, all of one length, or four times as many responses as rows."""
    kind, times, most = ("long-tailed", 4, TAIL) if tail else ("short", 1, tokens)
    return [
        {"name": f"{kind}, {r} rows", "rows": r, "number": max(2, times * r), "prompt": PROMPT, "tokens": most}
        for r in rows
    ]


def prepare(size: str, tail: bool, home: Path, real: Path | None) -> Path:
    """The folder of a model whose responses end by chance, or never."""
    if size == "real":
        assert real is not None
        return real
    folder = home / f"{size}-{'tail' if tail else 'endless'}"
    if not (folder / "tokenizer.json").exists():
        toys.save(toys.build(toys.SIZES[size], 0, TAIL_END if tail else toys.ENDLESS), folder)
    return folder


def cases(options: argparse.Namespace) -> list[tuple[str, bool]]:
    """Sizes and whether lengths have a tail; a real model ends as it likes."""
    if options.tiny:
        return [("0.03M", False), ("0.03M", True)]
    sizes = [size for size in options.sizes.split(",") if size]
    found = [(size, tail) for size in sizes for tail in (False, True)]
    return found + ([("real", False)] if options.real is not None else [])


def sides(options: argparse.Namespace, model: Path, wanted: list[dict[str, Any]]) -> list[Side]:
    def given(name: str) -> dict[str, Any]:
        most = SLOW.get(name, 10**6)
        return {
            "side": name,
            "model": str(model),
            "end": _end(model),
            "loads": [x for x in wanted if x["rows"] <= most],
        }

    without = options.without.split(",")
    found = [Side("roof", "roof", {"shapes": _shapes(model, wanted), "copies": [weight_bytes(model)]})]
    found += [Side(OURS, "rollout_sides", given("kibitz"))]
    found += [Side(name, "rollout_sides", given("kibitz"), repo=path) for name, path in options.sides.items()]
    found += [Side(n, "rollout_sides", given(n)) for n in OTHERS if n != "vllm" and n not in without]
    if options.vllm.exists() and "vllm" not in without:
        found.append(Side("vllm", "rollout_sides", given("vllm"), python=options.vllm, env=VLLM))
    return found


def _config(model: Path) -> dict[str, Any]:
    return json.loads((model / "config.json").read_text(encoding="utf-8"))


def _end(model: Path) -> int:
    end = _config(model)["eos_token_id"]
    return end[0] if isinstance(end, list) else end


def _shapes(model: Path, wanted: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    config = _config(model)
    return [(load["rows"], config["hidden_size"], config["intermediate_size"]) for load in wanted]


def weight_bytes(model: Path) -> int:
    """Bytes of the weights in float32 that a token reads; a tied head counts once."""
    from safetensors import safe_open

    with safe_open(str(model / "model.safetensors"), "pt") as file:
        numbers = [_size(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118 - it is no dict
    return 4 * sum(numbers)


def _size(shape: list[int]) -> int:
    size = 1
    for one in shape:
        size *= one
    return size


def floor(table: Table, case: str, model: Path, load: dict[str, Any], tokens: float) -> float:
    """The least seconds for so many tokens: the matrix products and the attention at the roof of one product of as many rows, or
    the weights, read once for all rows, at the speed of a copy of as many bytes."""
    config, roofs = _config(model), table.of(case, "roof")
    hidden, inner, layers = (config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    shape = f"{load['rows']}x{hidden}x{inner}"
    context = load["prompt"] + tokens / load["number"] / 2
    wide = config["num_attention_heads"] * (config.get("head_dim") or hidden // config["num_attention_heads"])
    flops = tokens * (2 * weight_bytes(model) / 4 + 4 * layers * wide * context)
    speed = max(row["flops"][shape] for row in roofs)
    copied = max(row["copies"][str(weight_bytes(model))] for row in roofs)
    return max(flops / speed, weight_bytes(model) * tokens / load["rows"] / copied)


# ------------------------------------------------------------------ the table


def speed(row: dict[str, Any], load: str) -> float:
    """Seconds for each token of a response."""
    kind = "cpu" if row["threads"] == 1 else "wall"
    (found,) = (one for one in row["loads"] if one["load"] == load)
    return found[kind] / found["tokens"]


def told(table: Table, case: str, side: str, load: str) -> list[dict[str, Any]]:
    return [row for row in table.of(case, side) if any(one["load"] == load for one in row["loads"])]


def report(table: Table, case: str, model: Path, wanted: list[dict[str, Any]]) -> str:
    others = [name for name in (*table.options.sides, *OTHERS) if table.of(case, name)]
    unit = "tokens / CPU s" if table.options.threads == 1 else "tokens / s"
    titles = [f"{case}, {unit}", OURS, "x floor", *(f"{name}, ours is" for name in others)]
    rows = []
    for load in wanted:
        if not (found := told(table, case, OURS, load["name"])):
            continue
        mine = middle(found, lambda row, load=load: speed(row, load["name"]))
        ours = next(one for one in found[0]["loads"] if one["load"] == load["name"])
        least = floor(table, case, model, load, ours["tokens"]) / ours["tokens"]
        cells = [load["name"], f"{1 / mine:,.0f}", f"{mine / least:.1f}"]
        for name in others:
            spread = pair(table, case, name, load["name"])
            theirs = middle(told(table, case, name, load["name"]), lambda row, load=load: speed(row, load["name"]))
            cells.append("" if spread is None else f"{1 / theirs:,.0f}: {spread}")
        rows.append(cells)
    return side_by_side.lines(titles, rows) + _errors(table, case, others)


def pair(table: Table, case: str, side: str, load: str) -> Spread | None:
    if not told(table, case, side, load):
        return None
    return ratios(table, case, side, lambda row: speed(row, load))


def _errors(table: Table, case: str, others: list[str]) -> str:
    found = {name: [row["logp_error"] for row in table.of(case, name)] for name in (OURS, *others)}
    shown = {name: max(errors) for name, errors in found.items() if errors and None not in errors}
    said = "".join(f"; {name} {error:.1e}" for name, error in shown.items())
    failed = {row["side"]: row["failed"] for row in table.rows if row["case"] == case and "failed" in row}
    return f"\nlargest error of a log-probability against one plain forward pass{said}" + "".join(
        f"\n{name} did not run: {why}" for name, why in failed.items()
    )


def main(given: list[str] | None = None) -> Table:
    made = side_by_side.parser(__doc__ or "", rounds=3)
    made.add_argument("--sizes", default="0.5M,5M", help="which, with commas between them: " + ", ".join(toys.SIZES))
    made.add_argument("--rows", default="1,16,64,256")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--real", type=Path, help="folder of a real model, as well")
    made.add_argument("--without", default="", help=f"sides to leave out: {', '.join(OTHERS)}")
    made.add_argument("--vllm", type=Path, default=HERE / ".venv-vllm" / "bin" / "python", help="a Python with vLLM")
    options = side_by_side.read(made, given)
    table, found = Table("rollout", options), {}
    if not options.vllm.exists():
        say(f"vLLM is left out: there is no {options.vllm}; make .venv-vllm/.installed")
    print(side_by_side.heading(table))
    numbers = [2] if options.tiny else [int(rows) for rows in options.rows.split(",")]
    for size, tail in cases(options):
        case = f"{size}, {'long-tailed' if tail else 'short'}"
        model = prepare(size, tail, table.path.parent / "models", options.real)
        wanted = loads(numbers, tail, 6 if options.tiny else SHORT)
        every = sides(options, model, wanted)
        for number in table.alternate(case, every, options.threads):
            say(f"{case}: round {number + 1} of {options.rounds}")
        print(report(table, case, model, wanted) + "\n", flush=True)
        for name in (*options.sides, *OTHERS):
            spreads = {load["name"]: pair(table, case, name, load["name"]) for load in wanted}
            found |= {f"{size}, {load}: {name}": spread for load, spread in spreads.items() if spread is not None}
    side_by_side.settle(table, found)
    return table


if __name__ == "__main__":
    main()
