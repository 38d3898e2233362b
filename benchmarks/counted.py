"""How long a step must take on a GPU, from what it does: kernels, bytes and FLOPs, counted on tensors without numbers.

    python -m benchmarks.counted            # a minute on any CPU; writes benchmarks/counted.json
    python -m benchmarks.counted --tiny     # small shapes; prints, and writes nothing

Qwen3-1.7B under Qwen3-8B in bfloat16, exact reverse KL, 256 rollouts of 200 + 1,024 tokens, on one H200: the step of commit
e8b724f, what each repair since then takes away, and what is left (`benchmarks.phases`, `benchmarks.repairs`). The code that
trains runs on torch's meta device. A phase takes the longer of two times: to start its kernels, or to move bytes beside the
products and to do these (`benchmarks.counting`).

These are counts, not measurements. Caches, and kernels that reach less than the rates there, make a step longer. What is stated
for commit e8b724f was worked out by hand before the repairs, from counts on the same shapes.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import phases, repairs
from benchmarks.counting import FULL, H200, TINY, Card, Scale

HERE = Path(__file__).parent

STATED = {"rollouts": (13.0, 31.0), "teacher scoring": (8.2, 8.2), "student's body": (6.5, 6.5), "loss": (5.0, 5.0)}
"""Seconds that were worked out for e8b724f, the least and the most; 33 to 51 for the step."""


def count(scale: Scale, card: Card = H200) -> dict[str, Any]:
    """By phase: what is asked for now, seconds by the card's rates before and after the repairs, and those of the floor; and by
    repair, seconds of its phase before and after it."""
    floors = {
        "rollouts": phases.rollouts(scale)[1],
        "teacher scoring": phases.reading(scale, scale.teacher, learns=False)[1],
        "student's body": phases.reading(scale, scale.student, learns=True)[1],
        "loss": phases.loss(scale, repairs.chunks(scale)[1])[1],
    }
    made = repairs.of_a_step(scale)
    rows = {}
    for name, floor in floors.items():
        own = [repair for repair in made if repair.phase == name]
        seconds = {"before_seconds": own[0].before.seconds(card), "seconds": own[-1].after.seconds(card)}
        rows[name] = {**asdict(own[-1].after), **seconds, "floor_seconds": floor.seconds(card)}
    return {
        "card": asdict(card),
        "scale": asdict(scale),
        "kernels_per_token": phases.decoding(scale).kernels,
        "phases": rows,
        "repairs": [repair.row(card) for repair in made],
        "checkpoints": repairs.checkpoints(scale, card),
        "elsewhere": [repair.row(card) for repair in repairs.elsewhere(scale)],
    }


# ------------------------------------------------------------------ tables


def table(found: dict[str, Any]) -> str:
    """Markdown: the phases of a step, before, counted now, and their floor; below it the step."""
    head = ["phase", "stated for e8b724f, s", "counted for it, s", "kernels now", "TB beside products", "PFLOP"]
    head += ["counted now, s", "floor, s"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
    for name, row in found["phases"].items():
        low, high = STATED[name]
        said = f"{low:g}" if low == high else f"{low:g}-{high:g}"
        lines.append(
            f"| {name} | {said} | {row['before_seconds']:.3g} | {row['kernels']:,.0f} | {row['bytes'] / 1e12:.3g} "
            f"| {row['flops'] / 1e15:.3g} | {row['seconds']:.3g} | {row['floor_seconds']:.3g} |"
        )
    low, high = stated()
    before, now, floor = (total(found, name) for name in ("before_seconds", "seconds", "floor_seconds"))
    return "\n".join([*lines, f"| step | {low:.0f}-{high:.0f} | {before:.3g} | | | | {now:.3g} | {floor:.3g} |"])


def stated() -> tuple[float, float]:
    return sum(low for low, _ in STATED.values()), sum(high for _, high in STATED.values())


def total(found: dict[str, Any], name: str) -> float:
    return sum(row[name] for row in found["phases"].values())


def left_over(found: dict[str, Any]) -> str:
    """Sentences: the repairs' seconds beside those that were stated, what no count explains, and what stands above the floor."""
    rows, launch = found["phases"], found["kernels_per_token"] * found["card"]["launch"] * 1e3
    low, high = stated()
    before, now, floor = (total(found, name) for name in ("before_seconds", "seconds", "floor_seconds"))
    removed = repairs.removed(found["repairs"])
    compiled = repairs.removed([row for row in found["repairs"] if "compiled" in row["repair"]])
    written = rows["rollouts"]["before_seconds"]
    fused = rows["loss"]["seconds"] - rows["loss"]["floor_seconds"]
    parts = ", ".join(f"{name} {row['seconds'] - row['floor_seconds']:.2g} s" for name, row in rows.items())
    first, last = (bound - written for bound in STATED["rollouts"])
    return (
        f"Counted by these rules the step of e8b724f takes {before:.1f} s. The repairs remove {removed:.1f} s of it; {now:.1f} s "
        f"are left, {now - floor:.1f} s above the floor, or {now + compiled:.1f} s where bodies are not compiled. Of the stated "
        f"{low:.0f}-{high:.0f} s the count does not explain {low - before:.1f} to {high - before:.1f}: {first:.1f} to {last:.1f} "
        "of rollouts, because small kernels reach no full rate and Python between kernels was put at 25 to 30 ms a token; the "
        f"rest is rounding by hand. No repair takes that away: {low - removed:.0f}-{high - removed:.0f} s are left of what was "
        f"stated. Above the floor stand {parts}. A token of the embedded engine starts {found['kernels_per_token']:,.0f} "
        f"kernels, {launch:.1f} ms if the host does nothing else: only a CUDA graph, or vLLM, shortens that. A kernel that "
        f"fuses the loss could remove {fused:.1f} s at most, {fused / now:.0%} of the step: it is not written."
    )


def page(found: dict[str, Any]) -> str:
    """Markdown: all tables, with a sentence before each."""
    return "\n\n".join([
        table(found),
        "What each repair takes from its phase, in the order in which they stand, so that the seconds add up:",
        repairs.table(found["repairs"], last="step"),
        left_over(found),
        "And what a recipe meets that sets something else, the shapes being the same:",
        repairs.table(found["elsewhere"]),
        "A sort counts as one pass over the vocabulary here. It takes several: by hand it was put at 10 ms a token, 10 s a step.",
        "Checkpoints, on a disk of 2 GB/s, hashed at 1.1 GB/s on a core:",
        repairs.table_of_checkpoints(found["checkpoints"]),
        repairs.about_checkpoints(found["checkpoints"], total(found, "seconds")),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes; writes nothing")
    tiny = parser.parse_args().tiny
    found = count(TINY if tiny else FULL)
    if not tiny:
        (HERE / "counted.json").write_text(json.dumps(found, indent=1) + "\n")
    print(page(found))


if __name__ == "__main__":
    main()
