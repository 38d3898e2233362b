"""How a step's cost grows: with tokens, samples of a prompt, length, vocabulary and processes, and the exponent that fits.

    python -m benchmarks.scale                       # 0.5M under 0.5M, every axis
    python -m benchmarks.scale --axes length,packing
    python -m benchmarks.scale --tiny

Along one axis all else stays; the exponent is the slope of log seconds over log size by least squares: 1 is cost in proportion.
Processes share the step of the axis `processes`, each with one thread, and the numbers are wall seconds. `packing` compares rows
that are concatenated (`optim.packing: true`) with padded ones, on responses of long-tailed lengths.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import side_by_side, toys
from benchmarks.side_by_side import OURS, Side, Spread, Table, middle, ratios, say
from benchmarks.teacher import seconds

TAIL_END = -4.0


@dataclass(frozen=True)
class Point:
    """One step: `rows` responses of `tokens` tokens each, `group` to a prompt."""

    rows: int = 32
    group: int = 1
    tokens: int = 64
    vocab: int = 512
    processes: int = 1
    tail: bool = False


BASE = Point()
AXES: dict[str, list[tuple[float, Point]]] = {
    "tokens": [(32 * n, replace(BASE, rows=n)) for n in (8, 32, 128)],
    "group": [(n, replace(BASE, rows=32, group=n)) for n in (1, 4, 16)],
    "length": [(n, replace(BASE, rows=16, tokens=n)) for n in (32, 128, 512)],
    "vocabulary": [(n, replace(BASE, vocab=n)) for n in (512, 4096, 32768)],
    "processes": [(n, replace(BASE, rows=48, processes=n)) for n in (1, 2, 3)],
}
TINY: dict[str, list[tuple[float, Point]]] = {
    "tokens": [(n, Point(rows=n, tokens=6, vocab=128)) for n in (2, 4)],
    "processes": [(n, Point(rows=4, tokens=6, vocab=128, processes=n)) for n in (1, 2)],
}
PACKING = Point(rows=64, tokens=256, tail=True)
STEPS, PROMPT = 3, 20


def prepare(home: Path, point: Point, tiny: bool) -> Path:
    """The folder of a vocabulary, its student and teacher of one shape, and prompts."""
    folder = home / f"scale-{point.vocab}{'-tail' if point.tail else ''}{'-tiny' if tiny else ''}"
    if not (folder / "prompts.jsonl").exists():
        shape = toys.SIZES["0.03M" if tiny else "0.5M"]
        size, end = replace(shape, vocab=point.vocab), TAIL_END if point.tail else toys.ENDLESS
        for seed, role in enumerate(("student", "teacher")):
            toys.save(toys.build(size, seed, end), folder / role)
        toys.write_prompts(folder / "prompts.jsonl", toys.prompts(point.vocab, 128 * STEPS, PROMPT))
    return folder


def side(name: str, point: Point, home: Path, repo: Path, **change: Any) -> Side:
    rollout = {"prompts_per_step": point.rows // point.group, "samples_per_prompt": point.group}
    given = {
        "side": "kibitz",
        "home": str(home),
        "rows": point.rows,
        "tokens": point.tokens,
        "steps": STEPS,
        "lr": 1e-4,
    }
    given |= {"change": {"rollout": rollout, **change}}
    given |= {"output": str(home / f"run-{point.processes}")} if point.processes > 1 else {}
    return Side(name, "step_sides", given, repo=repo, processes=point.processes)


def cost(row: dict[str, Any]) -> float:
    """Seconds of a step, by the processor; of several processes by the clock on the wall."""
    return sum(row["num_tokens"][1:]) / (len(row["num_tokens"]) - 1) * seconds(row, "step", row["kind"])


def exponent(sizes: list[float], costs: list[float]) -> float:
    """The slope of log cost over log size by least squares."""
    xs, ys = [math.log(size) for size in sizes], [math.log(one) for one in costs]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def measure(table: Table, axis: str, points: list[tuple[float, Point]]) -> str:
    """The lines of an axis: seconds of each size, and the exponent."""
    home, tiny = table.path.parent / "models", table.options.tiny
    names = {OURS: side_by_side.HERE, **table.options.sides}
    kind, found = "wall" if axis == "processes" else "cpu", {name: [] for name in names}
    for size, point in points:
        case, folder = f"{axis} {size:g}", prepare(home, point, tiny)
        sides = [side(name, point, folder, repo) for name, repo in names.items()]
        for number in table.alternate(case, sides, 1):
            say(f"{case}: round {number + 1} of {table.options.rounds}")
        for name in names:
            rows = [{**row, "kind": kind} for row in table.of(case, name)]
            found[name].append((size, middle(rows, cost)))
    titles = [f"{axis}, {kind} s of a step", *(f"{size:g}" for size, _ in points), "exponent"]
    lines = []
    for name, costs in found.items():
        told = [(size, one) for size, one in costs if one == one]
        slope = f"{exponent(*map(list, zip(*told, strict=True))):.2f}" if len(told) > 1 else ""
        lines.append([name, *(f"{one:.2f}" for _, one in costs), slope])
    return side_by_side.lines(titles, lines)


def packing(table: Table) -> tuple[str, dict[str, Spread]]:
    """Padded rows beside concatenated ones."""
    folder = prepare(table.path.parent / "models", PACKING, table.options.tiny)
    point = replace(PACKING, rows=4, tokens=16) if table.options.tiny else PACKING
    sides = [
        side(name, point, folder, side_by_side.HERE, optim={"packing": packed})
        for name, packed in (("padded", False), ("packed", True))
    ]
    for number in table.alternate("packing", sides, 1):
        say(f"packing: round {number + 1} of {table.options.rounds}")
    titles = ["long-tailed lengths", "CPU s of a step", "tokens", "training, us CPU a token"]
    lines = []
    for name in ("padded", "packed"):
        rows = [{**row, "kind": "cpu"} for row in table.of("packing", name)]
        if rows:
            trained = middle(rows, lambda row: seconds(row, "training", "cpu"))
            lines.append([name, f"{middle(rows, cost):.2f}", str(rows[0]["num_tokens"][-1]), f"{1e6 * trained:.0f}"])
    spread = ratios(table, "packing", "packed", lambda row: seconds(row, "training", "cpu"), ours="padded")
    return side_by_side.lines(titles, lines), {} if spread is None else {"packed training against padded": spread}


def main(given: list[str] | None = None) -> Table:
    made = side_by_side.parser(__doc__ or "", rounds=1)
    made.add_argument("--axes", default=",".join([*AXES, "packing"]))
    options = side_by_side.read(made, given)
    table, found = Table("scale", options), {}
    print(side_by_side.heading(table))
    wanted = options.axes.split(",")
    for axis, points in (TINY if options.tiny else AXES).items():
        if axis in wanted:
            print(measure(table, axis, points) + "\n", flush=True)
    if "packing" in wanted:
        text, found = packing(table)
        print(text + "\n", flush=True)
    side_by_side.settle(table, found)
    return table


if __name__ == "__main__":
    main()
