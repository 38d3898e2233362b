"""How runs of policies end before their last step: by a signal between two iterations, by SIGKILL, and never by a picture."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT

pytest.importorskip("stable_baselines3")

import support.two_states  # noqa: F401  # registers the environment

from kibitz.config import load_as
from kibitz.control import distil, frames, rpd
from kibitz.control.folder import Stopped, newest
from kibitz.control.recipe import DistilRecipe, RPDRecipe

TWO_STATES = {"id": "support.two_states:TwoStates-v0"}
TEACHER = {"python": "support.two_states:oracle", "trust": True, "samples": 2}


def long_rpd(output: Path, steps: int = 32 * 10**6) -> dict:
    return {
        "env": {"id": "Pendulum-v1", "num_envs": 2}, "method": {"type": "ppo"}, "steps": steps,
        "ppo": {"num_steps": 16, "batch": 16, "epochs": 2, "hidden": [8]},
        "eval": {"every": 2, "episodes": 1, "last": 1, "frames": 0}, "output": str(output),
    }  # fmt: skip


def long_distil(output: Path, iterations: int = 10**6) -> dict:
    return {
        "env": TWO_STATES, "teacher": TEACHER, "student": {"type": "tree", "depth": 1},
        "method": {"type": "viper", "iterations": iterations, "steps": 20, "validation": 4},
        "eval": {"last": 8, "frames": 0}, "output": str(output),
    }  # fmt: skip


KILLED = """
import itertools, sys, time
from kibitz.config import load_as
from kibitz.control import rpd
from kibitz.control.recipe import RPDRecipe

numbers = itertools.count()
rpd.run(load_as(RPDRecipe, sys.argv[-2]), asked=lambda: next(numbers) >= 40 and time.sleep(3600) or 0)
"""
"""A run that comes to no end before it is killed, however long that takes."""


def begun(command: str, tree: dict, rows: int = 7, program: tuple[str, ...] = ("-m", "kibitz")) -> subprocess.Popen:
    """A process that runs the recipe and has written so many rows of metrics."""
    folder = Path(tree["output"])
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(tree))
    words = [sys.executable, *program, "control", command, str(recipe), "--json"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    running = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 600
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < rows:
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return running


def without_clock(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


SIGNALS = [
    ("rpd", long_rpd, signal.SIGTERM, 143),
    ("rpd", long_rpd, signal.SIGINT, 130),
    ("distil", long_distil, signal.SIGHUP, 129),
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "tree", "number", "code"), SIGNALS)
def test_a_signal_ends_the_iteration_and_the_command_says_how_to_go_on(command, tree, number, code, tmp_path):
    folder = tmp_path / "run"
    running = begun(command, tree(folder))
    running.send_signal(number)
    if number != signal.SIGINT:
        running.send_signal(number)  # some send several
    _, said = running.communicate(timeout=600)
    assert running.returncode == code, said
    assert "Traceback" not in said
    assert f"continue with: kibitz control {command} {tmp_path}/run.yaml --resume" in " ".join(said.split())
    info = json.loads((folder / "run.json").read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (info["status"], info["ended_by"]) == ("stopped", f"{number.name} after step {last}")
    assert newest(folder) is not None and not (folder / "run.lock").exists()
    assert number.name in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["rpd", "distil"])
def test_a_run_that_was_asked_to_stop_goes_on_bit_for_bit(name, tmp_path):
    """Asked in the middle of a period between two checkpoints: its iterations are played again, and come out the same."""
    loop, kind, tree = (rpd, RPDRecipe, long_rpd) if name == "rpd" else (distil, DistilRecipe, long_distil)
    size = 32 * 6 if name == "rpd" else 6
    whole = loop.run(load_as(kind, tree(tmp_path / "whole", size)))
    recipe, looks = load_as(kind, tree(tmp_path / "stopped", size)), iter([0, 0, 0, signal.SIGTERM])
    with pytest.raises(Stopped):
        loop.run(recipe, asked=lambda: next(looks))
    parts = json.loads((tmp_path / "stopped" / "run.json").read_text())
    assert parts["ended_by"] == ("SIGTERM after step 96" if name == "rpd" else "SIGTERM after step 3")
    stopped = loop.run(recipe, resume=True)
    assert without_clock(stopped.metrics) == without_clock(whole.metrics) and stopped.evals == whole.evals


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path):
    """By SIGKILL, at whatever moment it comes, in an environment with long episodes that stable-baselines3 could not save."""
    whole = rpd.run(load_as(RPDRecipe, long_rpd(tmp_path / "whole", 32 * 60)))
    tree = long_rpd(tmp_path / "killed", 32 * 60)
    running = begun("rpd", tree, program=("-c", KILLED))
    running.kill()
    running.communicate()
    rows = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert 7 <= len(rows) <= 41, "it was killed before its end"
    killed = rpd.run(load_as(RPDRecipe, tree), resume=True)
    assert without_clock(killed.metrics) == without_clock(whole.metrics) and killed.evals == whole.evals


def test_a_picture_that_aborts_its_process_ends_nothing(tmp_path, monkeypatch):
    """What MuJoCo does where it finds no OpenGL: the environment calls abort() when it is asked for a picture."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    tree = {**long_distil(tmp_path / "run", 1), "env": {"id": "support.two_states:Aborting-v0"}}
    run = distil.run(load_as(DistilRecipe, {**tree, "eval": {"last": 2, "frames": 2}}))
    shown = json.loads((run.folder / "shown.json").read_text())
    assert shown[-1]["title"] == "An episode of the student"
    assert f"ended with code {-signal.SIGABRT}" in shown[-1]["words"] and "image" not in shown[-1]
    assert json.loads((run.folder / "run.json").read_text())["status"] == "finished"


def test_a_picture_that_never_comes_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "SECONDS", 0.01)
    (tmp_path / "recipe.yaml").write_text("")
    found = frames.section(tmp_path, "after.png", "An episode")
    assert found == {"title": "An episode", "words": "No picture was drawn within 0.01 s."}
