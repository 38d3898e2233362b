"""The benchmark for GPUs runs where there is none."""

import json
import subprocess
import sys

import pytest
from support.paths import ROOT, script

gpu = script(ROOT / "benchmarks" / "gpu.py")


@pytest.mark.slow
def test_every_arm_runs_on_a_cpu_and_is_not_run_again(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--tiny", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert tuple(found) == gpu.ARMS
    assert found["resume-0.6B"]["steps"] == 2
    assert all(sum(found[arm]["seconds"].values()) > 0 and found[arm]["grad_norm"] > 0 for arm in gpu.STUDENTS)
    assert found["sampled-1.7B"]["mismatch"] < 0.1
    again = subprocess.run(command, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, "")


def test_the_table_has_the_floor_beside_the_step():
    """5 GB at 1 TB/s and 3 TFLOP at 10 TFLOP/s; the FLOPs of rollouts are done while they read."""
    flops = {"student_sampling": 9e12, "student_training": 2e12, "teacher_scoring": 1e12}
    row = {
        "floor_bytes": 5e9,
        "floor_flops": flops,
        "tokens_per_second": 7.0,
        "seconds": {"sampling": 1.0, "scoring": 2.0},
    }
    row |= {"peak_bytes": {"training": 2.0**31}, "planned_bytes": {"held": {"a": 2.0**30}, "scoring": {"b": 2.0**30}}}
    top = {"card": "a card", "teraflops": 10.0, "terabytes": 1.0}
    assert gpu.floor_seconds(row, top) == pytest.approx(0.005 + 0.3)
    line = gpu.table({"floor": top, "arm": row}).splitlines()[-1].split()
    assert line == ["arm", "3.00", "1.00", "2.00", "0.00", "0.30", "7.00", "2.00", "2.00"]
