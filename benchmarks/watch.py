"""What `kibitz watch` costs: to open a page on a long run, to look when nothing is new, and to send one more step.

    python benchmarks/watch.py [steps] [rollouts] [out.json]

The run is made up: rows as long as those of a real one, rollouts of 100 tokens. Seconds are process CPU seconds, the median of
several; memory is the most that the process ever had (Linux only).
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from kibitz.report.watch import Seen, Watched


def row(step: int) -> dict[str, Any]:
    left = math.exp(-step / 1500)
    measures = ("loss", "reverse_kl", "student_entropy", "teacher_entropy", "reward", "grad_norm", "response_tokens")
    others = {f"number_{i}": 0.123456789 * i for i in range(25)}
    costs = {
        "seconds": {"sampling": 0.11, "scoring": 0.03, "training": 0.07},
        "flops": {"student_training": 2.9e9, "teacher_scoring": 2.1e9},
    }
    return {
        "step": step,
        **dict.fromkeys(measures, left),
        "num_tokens": 4000,
        "tokens_per_second": 2e4,
        **others,
        **costs,
    }


def write(folder: Path, steps: int, rollouts: int) -> None:
    (folder / "recipe.yaml").write_text(
        f"steps: {steps + 1000}\nmethod: {{type: opd}}\nteacher: {{model: t}}\nstudent: {{model: s}}\n"
    )
    (folder / "run.json").write_text('{"status": "running"}')
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row(step)) + "\n" for step in range(1, steps + 1)))
    top = [["a", 0.5], ["b", 0.3], ["c", 0.1], ["d", 0.05], ["e", 0.01]]
    token = {
        "text": "a",
        "id": 1,
        "student_logp": -0.1,
        "teacher_logp": -0.2,
        "reverse_kl": 0.01,
        "student_top": top,
        "teacher_top": top,
    }
    rest = json.dumps({"answer": "7", "reward": 1.0, "finished": True, "fork": None, "tokens": [token] * 100})[1:]
    with (folder / "rollouts.jsonl").open("w") as file:
        for i in range(rollouts):
            place, step = divmod(i, 2)
            file.write(f'{{"step": {step * steps}, "prompt": "p{place}", "prompt_key": "{place}", {rest}\n')


def timed(work: Callable[[], Any], repeats: int = 5) -> tuple[float, Any]:
    spent, found = [], None
    for _ in range(repeats):
        start = time.process_time()
        found = work()
        spent.append(time.process_time() - start)
    return median(spent), found


def main(steps: int = 5000, rollouts: int = 2000, out: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        write(folder, steps, rollouts)
        watched, seen = Watched([folder]), Seen()

        def look(page: Seen) -> int:
            watched.looked = 0.0
            return sum(len(data) for _, data in watched.news(page))

        found: dict[str, Any] = {
            "steps": steps,
            "rollouts": rollouts,
            "rollouts_mib": (folder / "rollouts.jsonl").stat().st_size / 2**20,
        }
        found["first_seconds"], found["first_bytes"] = timed(lambda: look(seen), 1)
        found["page_seconds"], found["page_bytes"] = timed(lambda: look(Seen()))
        found["idle_seconds"], found["idle_bytes"] = timed(lambda: look(seen))
        last = steps

        def one_more() -> int:
            nonlocal last
            last += 1
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row(last)) + "\n")
            return look(seen)

        found["step_seconds"], found["step_bytes"] = timed(one_more)
        status = Path("/proc/self/status")
        found["peak_mib"] = (
            int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024 if status.exists() else None
        )
    for name, value in found.items():
        print(f"{name:<16}{value if isinstance(value, int) else value and round(value, 4)}")
    if out is not None:
        Path(out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:4])
