"""Several processes by torchrun, which train one run after another: what `train_together.py` is given, and what it answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT

WORKER = ROOT / "tests" / "support" / "train_together.py"
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(num: int, jobs: list[dict], folder: Path) -> None:
    """Have `num` processes do the jobs."""
    answer = started(num, jobs, folder)
    assert answer.returncode == 0, answer.stderr[-4000:]
    assert answer.stdout.count("done") == num, answer.stdout


def started(num: int, jobs: list[dict], folder: Path) -> subprocess.CompletedProcess:
    """The same, whatever becomes of them."""
    path = folder / f"jobs-{num}.json"
    path.write_text(json.dumps(jobs))
    line = [*TORCHRUN, "--standalone", "--nproc-per-node", str(num), str(WORKER), str(path)]
    return subprocess.run(line, capture_output=True, text=True, timeout=3600, env={**os.environ, "PYTHONPATH": PATHS})
