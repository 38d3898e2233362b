"""The benchmark for GPUs runs where there is none; what a step asks is counted; a plan is what a run takes; sides in turns."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.paths import ROOT, script

from benchmarks import counting, loss_forms, phases, repairs, roof, scale, side_by_side, toys, worker
from benchmarks.side_by_side import Spread
from kibitz.losses.chunked import over_chunks
from kibitz.losses.criteria import Divergence
from kibitz.models.language_model import CHUNK_NUMBERS
from kibitz.signals import Dense, Tokens
from kibitz.teachers.local import LARGE
from kibitz.training.room import MOST_IN_CHUNK

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


def test_steps_of_an_arm_are_written_down_before_it_ends(tmp_path):
    """And such an arm is run again: the file says that it is unfinished."""
    rows = tmp_path / "run-arm" / "metrics.jsonl"
    rows.parent.mkdir()
    program = (
        f"import pathlib, sys, time; rows = pathlib.Path({str(rows)!r}); out = pathlib.Path({str(tmp_path / 'out.json')!r})\n"
        'rows.write_text(\'{"step": 1, "seconds": {"sampling": 3.0}}\\n{"step": 2, "sec\')\n'
        "while not out.exists(): time.sleep(0.05)\n"
        "sys.exit('out of memory')"
    )
    error = gpu.run_arm([sys.executable, "-c", program], "arm", tmp_path, {"floor": {}}, tmp_path / "out.json")
    assert error == "out of memory\n"
    found = json.loads((tmp_path / "out.json").read_text())
    assert found == {"floor": {}, "arm": {"unfinished": [{"seconds": {"sampling": 3.0}}]}}


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
    return counted.count(counting.TINY)


def test_what_is_counted_adds_up(small_counts):
    """FLOPs by hand: 2 for each number of a matrix and position, and attention's square, three passes of what learns; the loss
    has two heads, of which one has two gradients."""
    tiny, found = counting.TINY, small_counts["phases"]
    length, tokens = tiny.prompt + tiny.response, tiny.rollouts * tiny.response
    per_layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    norms = 4 * (2 * 64 + 2 * 16) + 64
    passes = 2.0 * (4 * per_layer + norms) * length + 2.0 * 4 * 64 * length**2
    assert found["student's body"]["flops"] == pytest.approx(3 * tiny.rollouts * passes)
    assert found["loss"]["flops"] == 2.0 * tokens * tiny.vocab * (3 * 64 + 128)
    assert all(row["before_seconds"] > row["seconds"] >= row["floor_seconds"] > 0 for row in found.values())
    assert found["rollouts"]["kernels"] == small_counts["kernels_per_token"] * tiny.response


def test_seconds_are_those_of_kernels_or_of_all_else():
    """1,000 kernels at a microsecond; 2 TB at 1 TB/s, 3 PFLOP at 1 PFLOP/s, 4 GB at 2 GB/s, and 5 waits."""
    card = counting.Card("a card", bytes=1e12, flops=1e15, launch=1e-6, bus=2e9, disk=1.0, digest=1.0)
    asked = counting.Work(1000.0, 2e12, 3e15, 5.0, 4e9)
    assert asked.seconds(card) == pytest.approx(2 + 3 + 2 + 5e-6)
    assert counting.Work(kernels=1000.0, bytes=1.0).seconds(card) == pytest.approx(1e-3)
    assert (asked + asked.times(2.0)).seconds(card) == pytest.approx(3 * asked.seconds(card))


def test_operations_between_products_are_one_kernel_where_they_are_fused():
    """Matrices of 64 bytes: of four operations two are products. Alone the sum reads and writes 192 bytes, the factor 128; fused
    both read the product and the other term, and write for the next product."""
    found = []
    for count in (counting.Counting(), counting.Fused()):
        with torch.device("meta"):
            one, other = torch.zeros(4, 4), torch.zeros(4, 4)
            with count:
                _ = (2.0 * (one @ other + other)) @ one
        found.append(count.work)
    assert found == [counting.Work(4.0, 192.0 + 128.0), counting.Work(3.0, 192.0)]


def test_the_repairs_of_a_phase_follow_each_other_and_add_up(small_counts):
    rows, found = small_counts["repairs"], small_counts["phases"]
    for name, phase in found.items():
        own = [row for row in rows if row["phase"] == name]
        assert [row["before"] for row in own] == [phase["before_seconds"], *(row["after"] for row in own[:-1])]
        assert own[-1]["after"] == phase["seconds"]
    taken = sum(phase["before_seconds"] - phase["seconds"] for phase in found.values())
    assert repairs.removed(rows) == pytest.approx(taken)
    last = repairs.table(rows, last="step").splitlines()[-1].split(" | ")
    assert [float(cell.strip(" |")) for cell in last[2:]] == [
        pytest.approx(number, abs=0.006)
        for number in (counted.total(small_counts, "before_seconds"), counted.total(small_counts, "seconds"), taken)
    ]


def test_the_bytes_of_the_loss_are_those_by_hand():
    """A chunk more adds the head's gradient in bfloat16 to the one in float32: 10 bytes for each number. Logits in bfloat16 are
    copied, 6 bytes each, of student, teacher and gradient; in float32 the gradient alone is, with what was cut off, for which it
    is written out at 4 bytes and not at 2."""
    tiny = counting.TINY
    learnt = tiny.rows * tiny.response
    some, more, rounded = (
        phases.loss(tiny, chunk, rounded=rounded)[0].times(1 / tiny.micro_batches)
        for chunk, rounded in ((learnt, False), (learnt // 4, False), (learnt, True))
    )
    assert more.bytes - some.bytes == pytest.approx(3 * 10 * tiny.vocab * 64, rel=1e-2)
    cut = (18 + 2) * tiny.scored + 2 * tiny.vocab
    assert rounded.bytes - some.bytes == learnt * (cut - 4 * tiny.scored - (4 + 6) * tiny.vocab)
    assert rounded.kernels - some.kernels == 2


def test_what_repairs_are_counted_from_is_the_code():
    """The values of exact reverse KL; LoRA's numbers; hidden states that are more than what waited on the device."""
    hidden, head = torch.zeros(3, 8, requires_grad=True), torch.nn.Linear(8, 40, bias=False)
    signal = Dense(torch.zeros(3, 8), torch.nn.Linear(8, 40, bias=False).requires_grad_(False))
    tokens = Tokens(torch.zeros(3, dtype=torch.long), torch.ones(3), torch.zeros(3), signal)
    assert len(over_chunks(Divergence(), hidden, head, tokens)[1]) == repairs.VALUES
    per_layer = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)
    assert repairs.lora_width(counting.TINY.student) == 4 * per_layer
    assert repairs.hidden_bytes(counting.FULL) == 256 * 1024 * 4096 * 2 > LARGE
    assert repairs.chunks(counting.FULL) == (CHUNK_NUMBERS // 151_669, MOST_IN_CHUNK) == (221, 2048)


def test_what_a_checkpoint_has_and_how_long_it_takes(small_counts):
    """All weights: 2 bytes of weights, 4 of a master and 8 of moments; LoRA: 4 and 8. All is written and
    hashed, or the weights are written alone."""
    card = counting.Card("a card", bytes=1.0, flops=1.0, launch=1.0, bus=4e6, disk=1e6, digest=2e6)
    whole, _, adapter = repairs.checkpoints(counting.TINY, card)
    tied = 1000 * 64 * 2 + 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64 + 2 * 16) + 64
    assert (whole["weights_bytes"], whole["kept_bytes"]) == (2 * tied, 12 * tied)
    assert whole["at_once"] == pytest.approx(12 * tied / 4e6 + 14 * tied / 1e6 + 12 * tied / 2e6)
    assert whole["behind"] == pytest.approx(12 * tied / 4e6 + 2 * tied / 1e6)
    numbers = repairs.RANK * repairs.lora_width(counting.TINY.teacher)
    assert (adapter["weights_bytes"], adapter["kept_bytes"]) == (4 * numbers, 8 * numbers)
    step = 2 * whole["at_once"] / 50
    assert "waits 50.0% of its time" in repairs.about_checkpoints([whole], step)


def test_the_tables_of_counts_have_a_line_for_each_phase_and_repair(small_counts):
    lines = counted.table(small_counts).splitlines()
    assert len(lines) == 2 + len(small_counts["phases"]) + 1
    assert lines[-1].startswith("| step | 33-51 |")
    assert "Above the floor stand rollouts" in counted.left_over(small_counts)
    rows = [line for line in counted.page(small_counts).splitlines() if line.startswith("| ")]
    assert (
        len(rows) == len(lines) - 1 + 1 + len(small_counts["repairs"]) + 1 + 1 + len(small_counts["elsewhere"]) + 1 + 3
    )


def test_the_page_has_the_counts_of_the_file_and_the_file_those_of_the_code():
    """The kernels of a token and what the loss moves: all else in the file follows from shapes."""
    generate = script(ROOT / "docs" / "generate.py")
    text = (ROOT / "docs" / "machines.md").read_text(encoding="utf-8")
    assert generate.machines(text) == text, "docs/machines.md is stale: make format writes its generated parts again"
    kept = json.loads((ROOT / "benchmarks" / "counted.json").read_text(encoding="utf-8"))
    assert phases.decoding(counting.FULL).kernels == kept["kernels_per_token"], "write python -m benchmarks.counted"
    loss, written = phases.loss(counting.FULL, repairs.chunks(counting.FULL)[1])[0], kept["phases"]["loss"]
    assert (loss.kernels, loss.bytes) == (written["kernels"], written["bytes"]), "write python -m benchmarks.counted"


# ------------------------------------------------------------------ memory


@pytest.mark.slow
def test_check_plans_what_a_run_takes(tmp_path):
    """The smallest of the sizes in benchmarks/forecast.json, there within 5%; a third is left for other machines."""
    row = forecast.measure("9M")
    assert all(abs(off) < 0.33 for off in row["off_by"].values()), row


# ------------------------------------------------------------------ sides in turns


def test_a_call_shorter_than_a_tick_of_the_clock_has_a_time():
    """A clock that counts whole hundredths, and calls of a thousandth."""
    now = [0.0]

    def run():
        now[0] += 0.001

    found = roof._best(run, 0.0, lambda: now[0] // 0.01 * 0.01)
    assert found == pytest.approx(0.001, rel=0.5)


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
        (
            "step",
            ["--without-trl", "--bfloat16", "--side-repo", f"itself={ROOT}"],
            {"roof", "kibitz", "kibitz, bfloat16", "itself"},
        ),
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
