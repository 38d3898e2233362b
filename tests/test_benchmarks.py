"""The benchmark for GPUs runs where there is none; what a step asks for is counted; a plan is what a run takes."""

import json
import subprocess
import sys

import pytest
from support.paths import ROOT, script

gpu, forecast, counted = (script(ROOT / "benchmarks" / f"{name}.py") for name in ("gpu", "forecast", "counted"))


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


# ------------------------------------------------------------------ counts


@pytest.fixture(scope="module")
def small_counts():
    return counted.count(counted.TINY)


def test_what_is_counted_adds_up(small_counts):
    """FLOPs by hand: 2 for each number of a matrix and position, and attention's square, three passes of what learns; the loss
    has two heads, of which one has two gradients."""
    tiny, phases = counted.TINY, small_counts["phases"]
    length, tokens = tiny.prompt + tiny.response, tiny.rollouts * tiny.response
    per_layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    norms = 4 * (2 * 64 + 2 * 16) + 64
    passes = 2.0 * (4 * per_layer + norms) * length + 2.0 * 4 * 64 * length**2
    assert phases["student's body"]["flops"] == pytest.approx(3 * tiny.rollouts * passes)
    head = 2.0 * tokens * tiny.vocab * (3 * 64 + 128)
    losses = [row for name, row in phases.items() if name.startswith("loss")]
    assert all(row["flops"] == head for row in losses)
    assert losses[0]["kernels"] > losses[-1]["kernels"] and losses[0]["bytes"] > losses[-1]["bytes"]
    assert all(row["seconds"] >= row["floor_seconds"] > 0 for row in phases.values())
    assert phases["rollouts"]["kernels"] == small_counts["kernels_per_token"] * tiny.response


def test_the_table_of_counts_has_a_line_for_each_phase_and_the_step(small_counts):
    lines = counted.table(small_counts).splitlines()
    assert len(lines) == 2 + len(small_counts["phases"]) + 1
    assert lines[-1].startswith("| step | 33-51 |")
    assert "Above the floor stand rollouts" in counted.left_over(small_counts)


def test_the_page_has_the_counts_of_the_file_and_the_file_those_of_the_code():
    """The kernels of a token: all else in the file follows from shapes."""
    generate = script(ROOT / "docs" / "generate.py")
    text = (ROOT / "docs" / "machines.md").read_text(encoding="utf-8")
    assert generate.machines(text) == text, "docs/machines.md is stale: make format writes its generated parts again"
    kept = json.loads((ROOT / "benchmarks" / "counted.json").read_text(encoding="utf-8"))
    assert counted.decoding(counted.FULL).kernels == kept["kernels_per_token"], "write python -m benchmarks.counted"


# ------------------------------------------------------------------ memory


@pytest.mark.slow
def test_check_plans_what_a_run_takes(tmp_path):
    """The smallest of the sizes in benchmarks/forecast.json, there within 5%; a third is left for other machines."""
    row = forecast.measure("9M")
    assert all(abs(off) < 0.33 for off in row["off_by"].values()), row
