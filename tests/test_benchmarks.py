"""The benchmark for GPUs runs where there is none; what a step asks is counted; a plan is what a run takes; sides in turns."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.paths import ROOT, script

from benchmarks import loss_forms, scale, side_by_side, toys, worker
from benchmarks.side_by_side import Spread

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


# ------------------------------------------------------------------ sides in turns


@pytest.mark.parametrize(("rank", "answers"), [("0", 1), ("1", 0)])
def test_of_several_processes_the_first_answers(rank, answers, monkeypatch, capsys):
    """The others hear of no step; whose line comes last is chance."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["worker", "sides_of_a_test", "{}"])
    monkeypatch.setitem(sys.modules, "benchmarks.sides_of_a_test", SimpleNamespace(work=dict))
    monkeypatch.setattr(worker, "use", lambda repo: None)
    worker.main()
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(worker.ANSWER) for line in said) == answers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "sides"),
    [
        ("step", ["--without-trl", "--side-repo", f"itself={ROOT}"], {"roof", "kibitz", "itself"}),
        ("rollout", ["--without", "generate_batch,vllm"], {"roof", "kibitz", "generate"}),
        ("loss", ["--without-trl"], {"products", "naive", "checkpointed", "liger", "kibitz"}),
        ("teacher", ["--without-server"], {"full, here", "top 8, here", "written token, here"}),
        ("scale", [], {"kibitz", "padded", "packed"}),
    ],
)
def test_a_table_is_measured_and_not_measured_again(tmp_path, name, options, sides):
    """TRL and vLLM stand in environments of their own, which a test does not make."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--tiny", "--out", out, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {row["side"] for row in rows} == sides
    assert not [row for row in rows if "failed" in row]
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert again.stdout == done.stdout and json.loads(out.read_text(encoding="utf-8"))["rows"] == rows


def test_a_ratio_that_fell_by_more_than_the_spread_is_told():
    stored = {"a": {"median": 1.5, "spread": 0.1}, "b": {"median": 1.5, "spread": 0.1}}
    now = {"a": Spread(1.35, 1.3, 1.38), "b": Spread(1.35, 1.2, 1.4), "new": Spread(0.1, 0.1, 0.1)}
    assert side_by_side.worse(now, stored) == ["a was 1.50 (spread 0.10) and is 1.35x (1.30-1.38)"]


def test_pairs_are_of_one_round(tmp_path):
    """A round in which one side failed has no ratio."""
    options = side_by_side.read(side_by_side.parser("a table"), ["--out", str(tmp_path / "out.json")])
    table = side_by_side.Table("table", options)
    seconds = {"kibitz": [1.0, 2.0, 4.0], "other": [2.0, None, 6.0]}
    table.rows = [
        {"case": "x", "side": side, "round": number} | ({"failed": "why"} if taken is None else {"seconds": taken})
        for side, all_taken in seconds.items()
        for number, taken in enumerate(all_taken)
    ]
    assert side_by_side.ratios(table, "x", "other", lambda row: row["seconds"]) == Spread(1.75, 1.5, 2.0)
    assert side_by_side.ratios(table, "x", "nobody", lambda row: row["seconds"]) is None


def test_a_file_goes_on_with_other_sides_and_begins_anew_with_other_code(tmp_path, monkeypatch):
    made, out = side_by_side.parser("a table"), tmp_path / "out.json"
    first = side_by_side.Table("table", side_by_side.read(made, ["--out", str(out)]))
    first.rows = [{"case": "x", "side": "kibitz", "round": 0}]
    first.write()
    again = side_by_side.read(made, ["--out", str(out), "--side-repo", f"itself={ROOT}"])
    assert side_by_side.Table("table", again).rows == first.rows
    monkeypatch.setattr(side_by_side, "commit", lambda repo: "another")
    assert side_by_side.Table("table", again).rows == []


def test_a_side_that_dies_says_why():
    side = side_by_side.Side("roof", "roof", {"shapes": [[1, 2]]})
    found = side_by_side.run(side, 1, {**side.given}, minutes=5)
    assert found["failed"].startswith("ValueError: not enough values")


def test_a_clock_gives_each_second_to_one_phase():
    clock = worker.Clock()
    clock.phase("a")
    clock.phase("b")
    clock.phase("a")
    spent = clock.take()
    assert set(spent) == {"a", "b", "step"}
    assert spent["step"]["wall"] == pytest.approx(spent["a"]["wall"] + spent["b"]["wall"])
    assert clock.current() is None and clock.take() == {"step": {"wall": 0, "cpu": 0}}


@pytest.mark.parametrize("divergence", loss_forms.DIVERGENCES)
def test_all_forms_of_a_divergence_have_the_same_gradients(divergence):
    found = {}
    for name, form in loss_forms.FORMS.items():
        if name != "trl":  # which stands in an environment of its own
            one = loss_forms.Inputs(40, 8, 300)
            loss = form(one, divergence)
            found[name] = (loss, one.student.grad, one.states.grad)
    exact = 300 * loss_forms.exact(loss_forms.Inputs(40, 8, 300), divergence)
    for name, (loss, *gradients) in found.items():
        assert float(loss) == pytest.approx(exact, rel=1e-5), name
        for got, want in zip(gradients, found["naive"][1:], strict=True):
            assert torch.allclose(got, want, atol=1e-5), name


def test_models_of_benchmarks_end_by_chance_or_never():
    """Over 512 positions the odds of an end are those asked for, on average of their logarithm."""
    ids = torch.randint(2, 128, (8, 64), generator=torch.Generator().manual_seed(1))
    for odds, most in ((toys.ENDLESS, -15.0), (-4.0, -3.5)):
        with torch.no_grad():
            logp = toys.build(toys.SIZES["0.03M"], 0, odds)(ids).logits.log_softmax(-1)[..., toys.END].mean()
        assert logp < most and (odds == toys.ENDLESS or logp == pytest.approx(odds, abs=0.5))


def test_the_exponent_is_the_slope():
    assert scale.exponent([1.0, 10.0, 100.0], [3.0, 30.0, 300.0]) == pytest.approx(1.0)
    assert scale.exponent([1.0, 2.0, 4.0], [1.0, 4.0, 16.0]) == pytest.approx(2.0)
