"""How a run ends, what it says of it, who may write its folder, and what becomes of its files when a disk damages them."""

import fcntl
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import Interrupt, Notes, crash, recipe, timeless

import kibitz
from kibitz import report
from kibitz.files import JSONL, LOCK, Lock, read_lines, writer_of
from kibitz.parallel.ranks import Ranks
from kibitz.report import costs
from kibitz.report.folder import read_run
from kibitz.training.folder import RunFolder
from kibitz.training.trainer import NullProgress


def info(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


# ------------------------------------------------------------------ the end


def test_a_run_says_what_ended_it(models, tmp_path):
    tree = recipe(*models, tmp_path / "run", save={"every": 2})
    crash(tree, step=3)
    assert (info(tmp_path / "run")["status"], info(tmp_path / "run")["ended_by"]) == (
        "failed",
        "RuntimeError: power cut",
    )
    assert "The run failed after step 3: RuntimeError: power cut." in read_run(tmp_path / "run").notices
    with pytest.raises(KeyboardInterrupt):
        kibitz.train(tree, resume=True, progress=Interrupt(3))
    assert info(tmp_path / "run")["ended_by"] == "SIGINT after step 3"
    kibitz.train(tree, resume=True)
    last = info(tmp_path / "run")
    assert [part["ended_by"] for part in last["parts"]] == ["RuntimeError: power cut", "SIGINT after step 3"]
    assert [part["first_step"] for part in last["parts"]] == [0, 2]
    assert (last["status"], last["ended_by"]) == ("finished", "all 4 steps are done")
    page = report.build([tmp_path / "run"]).read_text(encoding="utf-8")
    assert "failed: RuntimeError: power cut" in page


def test_a_signal_that_comes_while_the_processes_ask_each_other_is_heard_one_step_later(models, tmp_path, monkeypatch):
    """The answers to that question were given before it came, so that they must not be taken for a later one's."""
    gather, asked = Ranks.gather, []

    def interrupted(ranks: Ranks, value: object) -> list:
        said = gather(ranks, value)
        if isinstance(value, tuple) and value[0] == 0:
            asked.append(value)
            if len(asked) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        return said

    monkeypatch.setattr(Ranks, "gather", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kibitz.train(recipe(*models, tmp_path / "run", steps=10, save={"every": 0}))
    assert info(tmp_path / "run")["ended_by"] == "SIGTERM after step 3"


def test_a_signal_that_comes_again_while_the_end_is_written_changes_nothing(models, tmp_path, monkeypatch):
    """Schedulers send several, and the second may come behind the last save."""
    finish, heard = RunFolder.finish, []
    monkeypatch.setattr(RunFolder, "finish", lambda *said: os.kill(os.getpid(), signal.SIGTERM) or finish(*said))
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("behind the run"))
    try:
        with pytest.raises(KeyboardInterrupt):
            kibitz.train(recipe(*models, tmp_path / "run"), progress=Interrupt(3))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == []
    assert info(tmp_path / "run")["ended_by"] == "SIGINT after step 3"


def test_the_time_of_a_run_is_that_of_all_its_parts(models, tmp_path):
    """The total of the cost table is never less than what its steps took."""
    tree = recipe(*models, tmp_path / "run", save={"every": 1})
    crash(tree, step=3)
    first = info(tmp_path / "run")["seconds"]
    kibitz.train(tree, resume=True)
    run = read_run(tmp_path / "run")
    (part,) = run.info["parts"]
    in_steps = sum(sum(row["seconds"].values()) for row in run.metrics)
    assert part["seconds"] == first
    assert costs.wall(run) == run.info["seconds"] > max(first, in_steps)


def test_a_total_that_an_older_version_noted_of_the_last_part_only_is_not_shown():
    row = {"step": 1, "seconds": {"sampling": 2.0, "training": 3.0}, "flops": {"student_training": 1.0}}
    for noted, shown in ((4.0, "–"), (6.0, "6.0 s")):
        assert costs.table(report.folder.Run("r", metrics=[row], info={"seconds": noted}))["wall"] == shown


# ------------------------------------------------------------------ one writer


def test_one_process_writes_a_folder_and_another_is_told_which(models, tmp_path):
    lock = Lock(tmp_path)
    lock.take()
    with pytest.raises(kibitz.RecipeError, match=r"process \d+ on .*, is writing .*write output=ANOTHER"):
        kibitz.train(recipe(*models, tmp_path))
    with pytest.raises(BlockingIOError, match="process"):
        Lock(tmp_path).take()
    lock.release()
    assert writer_of(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    lock.take()
    lock.release()


def test_one_who_looks_and_is_put_to_sleep_keeps_no_writer_off(tmp_path, monkeypatch):
    """A reader asks who writes, by a lock that it shares, and the machine stops it there for a while."""
    (tmp_path / LOCK).touch()
    looking = os.open(tmp_path / LOCK, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    tries = []

    def wait(seconds: float) -> None:
        tries.append(seconds)
        if len(tries) == 20:
            os.close(looking)

    monkeypatch.setattr("kibitz.files.time", SimpleNamespace(sleep=wait, strftime=time.strftime))
    lock = Lock(tmp_path)
    lock.take()
    assert len(tries) == 20 and "process" in writer_of(tmp_path)
    lock.release()


def test_a_lock_that_was_taken_while_a_run_loaded_is_seen(models, tmp_path):
    """Both have found the folder free; one is quicker."""
    lock, folder = Lock(tmp_path / "run"), tmp_path / "run"

    class Quicker(NullProgress):
        def start(self, recipe, first_step):
            with pytest.raises(BlockingIOError):
                lock.take()

    kibitz.train(recipe(*models, folder, steps=1), progress=Quicker())
    lock.take()
    with pytest.raises(kibitz.RecipeError, match="is writing"):
        kibitz.train(recipe(*models, folder), overwrite=True)
    lock.release()
    assert len(kibitz.train(recipe(*models, folder, steps=2), resume=True).metrics) == 2


# ------------------------------------------------------------------ damaged lines


@pytest.fixture(scope="module")
def stopped(models, tmp_path_factory) -> Path:
    """A run of 4 steps that stopped after 3, with its checkpoint."""
    tree = recipe(*models, tmp_path_factory.mktemp("stopped") / "run", save={"every": 3}, eval={"every": 1})
    with pytest.raises(KeyboardInterrupt):
        kibitz.train(tree, progress=Interrupt(3))
    return Path(tree["output"])


def damage(path: Path, number: int, line: bytes) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = line
    path.write_bytes(b"\n".join(lines))


@pytest.mark.parametrize("name", ["metrics", "evals", "rollouts"])
@pytest.mark.parametrize("line", [b"{", b"\x00\xff\x80", b"[]", b'{"step": "x"}', b"[" * 9000, b"9" * 5000, b"{}"])
def test_a_damaged_line_is_named_and_no_crash(models, stopped, tmp_path, name, line):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    whole = JSONL(run / f"{name}.jsonl").read()
    damage(run / f"{name}.jsonl", 2, line)
    assert f"{name}.jsonl cannot be read in line 2; what stood there was left out." in read_run(run).notices
    tree, notes = recipe(*models, run, save={"every": 3}, eval={"every": 1}), Notes()
    went_on = kibitz.train(tree, resume=True, progress=notes)
    assert notes.texts[0] == f"{name}.jsonl is damaged in line 2, which cannot be read, and was left out"
    if name != "rollouts":
        rows = timeless(getattr(went_on, name))[: len(whole) - 1]
        assert rows == timeless([*whole[:1], *whole[2:]])[: len(rows)]
    assert JSONL(run / f"{name}.jsonl").damage() is None


MUTATIONS = st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 12), st.binary(max_size=12)), max_size=6)


@settings(max_examples=60)
@given(name=st.sampled_from(["metrics", "evals", "rollouts", "alarms"]), mutations=MUTATIONS)
def test_whatever_happens_to_a_log_is_read_and_reported(stopped, tmp_path_factory, name, mutations):
    folder = tmp_path_factory.mktemp("logs")
    for path in stopped.glob("*.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / f"{name}.jsonl"
    data = bytearray(path.read_bytes() if path.exists() else b'{"step": 1, "name": "x"}\n')
    for place, length, new in mutations:
        place %= len(data) + 1
        data[place : place + length] = new
    path.write_bytes(bytes(data))
    found = read_lines(path)
    lines = [line for line in bytes(data).split(b"\n") if line.strip()]
    assert len(found.rows) + len(found.damaged) + found.cut_short == len(lines)
    assert read_run(folder).last_step <= 2**53
    file = JSONL(path)
    rows = file.read()
    file.keep(last_step=2**53)
    assert json.dumps(file.read()) == json.dumps(rows).replace("NaN", "null").replace("-Infinity", "null").replace(
        "Infinity", "null"
    )
    assert file.damage() is None


def test_any_value_of_a_row_may_be_of_another_kind(stopped, tmp_path):
    """A page is built of rows whose values were exchanged at random (seeded)."""
    odd = [None, True, -1, 1e400, "x", [], {}, [[]], {"a": None}, 10**400, "\ud800"]
    for number in range(12):
        draw = random.Random(number)
        for path in stopped.glob("*.*"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        for name in ("metrics", "evals", "rollouts"):
            rows = read_lines(stopped / f"{name}.jsonl").rows
            for row in rows:
                row[draw.choice([key for key in row if key != "step"])] = draw.choice(odd)
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        page = report.build([tmp_path]).read_text(encoding="utf-8")
        assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>"), number


@pytest.mark.parametrize("name", ["run.json", "run.lock", "metrics.jsonl", "recipe.yaml", "checkpoints", ""])
def test_what_stands_in_the_place_of_a_file_is_found_before_training(models, tmp_path, name):
    """A link to nothing for each folder, a folder for each file."""
    output = tmp_path / "run"
    if name in ("checkpoints", ""):
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).symlink_to(tmp_path / "nowhere")
    else:
        (output / name).mkdir(parents=True)
    with pytest.raises(kibitz.RecipeError, match=rf"^output: {output / name} is "):
        kibitz.train(recipe(*models, output), overwrite=True)
    (tmp_path / "nowhere").mkdir()
    if name in ("checkpoints", ""):
        kibitz.train(recipe(*models, output, steps=1))
