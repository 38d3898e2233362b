"""The process of one measurement: `python -m benchmarks.worker MODULE JSON` calls `MODULE.work(**JSON)` and prints its answer.

`KIBITZ_REPO` names the checkout whose kibitz is imported: the benchmark is this file's own, whatever is measured.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ANSWER = "answer of the benchmark: "
HERE = Path(__file__).parents[1]


def main() -> None:
    name, given = sys.argv[1], json.loads(sys.argv[2])
    use(Path(os.environ.get("KIBITZ_REPO", HERE)))
    answer = importlib.import_module(f"benchmarks.{name}").work(**given)
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes the first alone hears of its steps, and its answer is the one to be read
    told = {"peak_rss": peak_rss(), "load": os.getloadavg()[0], "at": time.strftime("%Y-%m-%d %H:%M:%S")}
    print(f"{ANSWER}{json.dumps(told | answer)}", flush=True)


def use(repo: Path) -> None:
    """Import kibitz from this checkout, here and in the processes that this one starts."""
    sys.path.insert(0, str(repo))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(repo), str(HERE)])


def peak_rss() -> int:
    """The largest resident set of this process, in bytes; 0 where the system does not say. (`ru_maxrss` holds what its parent
    had before exec, too.)"""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


class Clock:
    """Wall and processor seconds by phase; each runs until the next is begun."""

    def __init__(self) -> None:
        self.spent: dict[str, dict[str, float]] = {}
        self._phase: str | None = None
        self._begun = _now()

    def phase(self, name: str | None) -> None:
        now = _now()
        if self._phase is not None:
            one = self.spent.setdefault(self._phase, {"wall": 0.0, "cpu": 0.0})
            for kind, (start, end) in {k: (self._begun[k], now[k]) for k in now}.items():
                one[kind] += end - start
        self._phase, self._begun = name, now

    def take(self) -> dict[str, dict[str, float]]:
        """All phases since the last `take`, and their sum as `step`; no phase is begun."""
        self.phase(None)
        spent, self.spent = self.spent, {}
        spent["step"] = {kind: sum(one[kind] for one in spent.values()) for kind in ("wall", "cpu")}
        return spent

    def current(self) -> str | None:
        return self._phase


def _now() -> dict[str, float]:
    return {"wall": time.perf_counter(), "cpu": time.process_time()}


def timed(run: Any) -> dict[str, float]:
    """Wall and processor seconds of one call."""
    start = _now()
    run()
    end = _now()
    return {kind: end[kind] - start[kind] for kind in end}


if __name__ == "__main__":
    main()
