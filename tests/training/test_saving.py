"""Checkpoints that are written while training goes on. Real processes, real kills, files that may grow no further."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.runs import Crash, crash, recipe, timeless

import kibitz
from kibitz.training import checkpoint
from kibitz.training.trainer import NullProgress

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are killed the POSIX way")

BEHIND = {"every": 1, "keep": 9, "background": True}

CHILD = """
import json, resource, sys, time
from pathlib import Path
from kibitz import cli
from kibitz.training import checkpoint

how, write = json.loads(sys.argv[1]), checkpoint._write_states
def slowly(folder, stateful):
    if folder.name.startswith(how["held"]):
        Path(how["mark"]).touch()
        time.sleep(how["seconds"])
    write(folder, stateful)
checkpoint._write_states = slowly
if how["most"]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (how["most"], how["most"]))
sys.argv = ["kibitz", "train", how["recipe"], "--resume", "--quiet"]
cli.main()
"""
"""Trains, in a process of its own, and takes its time over the checkpoint `held`, whose writing begins with the file `mark`."""


def begin(tree: dict[str, Any], folder: Path, held: str = "none", seconds: float = 0.0, most: int = 0) -> Any:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    how = {"held": held, "mark": str(folder / "mark"), "seconds": seconds, "most": most, "recipe": str(path)}
    return subprocess.Popen([sys.executable, "-c", CHILD, json.dumps(how)], stderr=subprocess.PIPE, text=True)


def wait_for(child: Any, done: Any) -> None:
    patience = time.monotonic() + 120
    while not done():
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < patience
        time.sleep(0.005)


def steps_of(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


def files_of(saved: Path) -> dict[str, Any]:
    """The bytes of all files, without what a clock says of the run, and so without the sum of that file."""
    found: dict[str, Any] = {
        str(path.relative_to(saved)): path.read_bytes() for path in saved.rglob("*") if path.is_file()
    }
    state = json.loads(found.pop("training/state.json"))
    sums = json.loads(found.pop(str(checkpoint.MANIFEST)))["sha256"]
    assert sums.keys() == {*found, "training/state.json"}
    return found | {"state": timeless([state["ledger"]])[0] | {"position": state["position"], "step": state["step"]}}


class Gate(NullProgress):
    """Lets a checkpoint be written when the step behind it is done."""

    def __init__(self) -> None:
        self.done, self.opened = 0, threading.Condition()
        self.behind = 0

    def step(self, row: dict[str, Any]) -> None:
        with self.opened:
            self.done = row["step"]
            self.opened.notify_all()

    def write(self, folder: Path, stateful: dict[str, Any]) -> None:
        if threading.current_thread() is not threading.main_thread():
            number = int(folder.name.split("-")[1].split(".")[0])
            with self.opened:
                assert self.opened.wait_for(lambda: self.done > number, timeout=60)
            self.behind += 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_written_behind_later_steps_is_that_of_its_own(models, tmp_path, monkeypatch, optimizer):
    """To the byte that of a run which waits: no later step changes what is being written. Two are never on their way at once."""
    sections = {"optim": {"name": optimizer}, "steps": 5}
    whole = recipe(*models, tmp_path / "whole", save={"every": 2, "keep": 9, "background": False}, **sections)
    kibitz.train(whole)
    gate, write = Gate(), checkpoint._write_states

    def when_let(folder: Path, stateful: dict[str, Any]) -> None:
        gate.write(folder, stateful)
        write(folder, stateful)

    monkeypatch.setattr(checkpoint, "_write_states", when_let)
    behind = recipe(*models, tmp_path / "behind", save={**BEHIND, "every": 2}, **sections)
    kibitz.train(behind, progress=gate)
    assert gate.behind == 2
    saved = [checkpoint.checkpoints(tmp_path / name) for name in ("behind", "whole")]
    names = ["step-000002", "step-000004", "step-000005"]
    assert [[path.name for path in paths] for paths in saved] == [names, names]
    for ours, theirs in zip(*saved, strict=True):
        assert checkpoint.damage(ours) is None
        assert files_of(ours) == files_of(theirs)


@pytest.mark.slow
def test_a_run_killed_while_a_checkpoint_is_on_its_way_goes_on_from_the_one_before(models, tmp_path):
    """To the same bits as one that nobody touched. Training had gone on meanwhile."""
    run = tmp_path / "run"
    tree = recipe(*models, run, steps=5, save={**BEHIND, "every": 2})
    child = begin(tree, tmp_path, held=".step-000004", seconds=600)
    wait_for(child, lambda: (tmp_path / "mark").exists() and steps_of(run) == 5)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stderr.close()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [".step-000004.partial", "step-000002"]
    assert checkpoint.damage(run / "checkpoints" / "step-000002") is None
    resumed = kibitz.train(tree, resume=True)
    whole = kibitz.train(recipe(*models, tmp_path / "whole", steps=5, save={"every": 2, "keep": 9}))
    assert timeless(resumed.metrics) == timeless(whole.metrics)
    for name in ("step-000004", "step-000005"):
        assert files_of(run / "checkpoints" / name).keys() == files_of(tmp_path / "whole" / "checkpoints" / name).keys()
        for part in ("model.safetensors", "training/optimizer.safetensors"):
            one, other = (home / "checkpoints" / name / part for home in (run, tmp_path / "whole"))
            assert one.read_bytes() == other.read_bytes()
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_a_file_that_may_not_grow_ends_the_run_and_leaves_the_older_checkpoint_whole(models, tmp_path):
    """The weights fit, the moments do not: so it is the background that fails, and the trainer that says it."""
    run = tmp_path / "run"
    kibitz.train(recipe(*models, run, steps=2, save={"every": 2}))
    first = run / "checkpoints" / "step-000002"
    small, large = ((first / name).stat().st_size for name in ("model.safetensors", "training/optimizer.safetensors"))
    assert large > 1.6 * small
    tree = recipe(*models, run, steps=8, save={**BEHIND, "every": 2})
    child = begin(tree, tmp_path, most=int(1.5 * small))
    said = child.communicate(timeout=300)[1]
    assert child.returncode == 2, said
    assert "step-000004: " in said and "older checkpoints are untouched" in said, said
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert checkpoint.damage(first) is None
    assert kibitz.train(tree, resume=True).metrics[-1]["step"] == 8


@pytest.mark.slow
def test_a_signal_waits_for_the_checkpoint_on_its_way_and_then_saves(models, tmp_path):
    run = tmp_path / "run"
    child = begin(recipe(*models, run, steps=500, save=BEHIND), tmp_path, held=".step-000002", seconds=1.0)
    wait_for(child, (tmp_path / "mark").exists)
    os.kill(child.pid, signal.SIGTERM)
    child.communicate(timeout=300)
    assert child.returncode == 143
    saved = checkpoint.checkpoints(run)
    assert [path.name for path in saved][1] == "step-000002"
    assert saved[-1].name == f"step-{steps_of(run):06d}"
    assert {checkpoint.damage(path) for path in saved} == {None}


@pytest.mark.slow
def test_a_third_ctrl_c_waits_for_no_checkpoint(models, tmp_path):
    """The first lets the step end, the second ends the run, which still waits. What was saved before is whole."""
    run = tmp_path / "run"
    tree = recipe(*models, run, steps=500, save=BEHIND)
    child = begin(tree, tmp_path, held=".step-000002", seconds=600)
    wait_for(child, (tmp_path / "mark").exists)
    for _ in range(3):
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        time.sleep(2.0)
    assert child.wait(timeout=120) == 130
    child.stderr.close()
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step-000001"]
    assert checkpoint.damage(run / "checkpoints" / "step-000001") is None


def test_a_run_that_fails_waits_for_the_checkpoint_on_its_way(models, tmp_path, monkeypatch):
    """And says what it failed of, not what became of the checkpoint."""
    write = checkpoint._write_states

    def slowly(folder: Path, stateful: dict[str, Any]) -> None:
        time.sleep(0.3)
        write(folder, stateful)

    monkeypatch.setattr(checkpoint, "_write_states", slowly)
    tree = recipe(*models, tmp_path / "run", steps=4, save={**BEHIND, "every": 2})
    crash(tree)
    (saved,) = checkpoint.checkpoints(tmp_path / "run")
    assert checkpoint.damage(saved) is None

    def full(folder: Path, stateful: dict[str, Any]) -> None:
        time.sleep(0.3)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_states", full)
    with pytest.raises(RuntimeError, match="power cut"):
        kibitz.train(tree, overwrite=True, progress=Crash(3))
    assert not any((tmp_path / "run" / "checkpoints").iterdir())
