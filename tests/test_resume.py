"""A run that was killed, wherever it was, goes on and ends as if nobody had touched it. Real processes, real kills."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import make_model, recipe

import kibitz
from kibitz import checkpoint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are forked and killed the POSIX way")

TIMES = {"seconds", "tokens_per_second"}

LAUNCHER = """
import json, os, sys
import torch, transformers
from kibitz import cli, trainer
from transformers import Qwen3ForCausalLM
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv = ["kibitz", *json.loads(line)]
        cli.main()
    print(child, flush=True)
    sys.stdin.readline()  # until then the process, finished or not, keeps its number
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Launcher:
    """Starts `kibitz ...` in processes of their own, without the seconds that importing torch takes each time."""

    def __init__(self, folder: Path):
        self.log = folder / "log.txt"
        line = [sys.executable, "-c", LAUNCHER, str(self.log)]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, *args: object) -> int:
        """The number of the process."""
        self.process.stdin.write(json.dumps([str(arg) for arg in args]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def run(self, *args: object) -> int:
        self.start(*args)
        return self.wait()


@pytest.fixture(scope="module")
def launcher(tmp_path_factory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("launcher"))
    yield launcher
    launcher.process.stdin.close()
    launcher.process.wait(timeout=60)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return make_model(folder / "student", seed=1), make_model(folder / "teacher", seed=2, hidden_size=48)


def write_recipe(models, folder: Path, name: str, **sections) -> Path:
    sections = {"rollout": {"store": True}, "eval": {"every": 3, "num_prompts": 4, "heatmaps": 2}, **sections}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe(*models, folder / name, **sections)), encoding="utf-8")  # JSON is YAML
    return path


def outcome(run: Path) -> dict[str, object]:
    """All that a run leaves, but for the seconds that it took."""
    found: dict[str, object] = {}
    for name in ("metrics", "evals", "rollouts", "stored"):
        rows = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]  # no half line is left
        found[name] = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    (*_, last) = checkpoint.checkpoints(run)
    assert checkpoint.damage(last) is None
    found["step"], found["weights"] = last.name, (last / "model.safetensors").read_bytes()
    found["moments"] = (last / "training" / "optimizer.safetensors").read_bytes()
    state = json.loads((last / "training" / "state.json").read_text())
    found["state"] = {key: value for key, value in state.items() if key != "ledger"} | {"flops": state["ledger"]["flops"]}
    return found


def kill_at_random(launcher: Launcher, draws: random.Random, run: Path, seconds_per_step: float, *args: object) -> int:
    """Start, and kill while it loads, or within the next two steps or so."""
    info = run / "run.json"
    before = info.stat().st_mtime_ns if info.exists() else None
    child = launcher.start(*args)
    if draws.random() < 0.15:
        time.sleep(draws.uniform(0, 0.4))
    else:
        patience = time.monotonic() + 60
        while not info.exists() or info.stat().st_mtime_ns == before:  # written anew when all is loaded
            assert time.monotonic() < patience, launcher.log.read_text()
            time.sleep(0.002)
        time.sleep(draws.uniform(0, 2) * seconds_per_step)
    os.kill(child, signal.SIGKILL)
    return launcher.wait()


def killed_and_resumed(launcher: Launcher, models, folder: Path, *, steps: int, kills: int) -> int:
    """Kill a run so many times, compare its end with an uninterrupted one's; how many kills fell into a save."""
    whole, part = (
        write_recipe(models, folder, name, steps=steps, save={"every": 1, "keep": 2}) for name in ("whole", "part")
    )
    assert launcher.run("train", whole, "--quiet") == 0, launcher.log.read_text()
    seconds_per_step = json.loads((folder / "whole" / "run.json").read_text())["seconds"] / steps
    draws, num_in_save = random.Random(7), 0
    for _ in range(kills):
        code = kill_at_random(launcher, draws, folder / "part", seconds_per_step, "train", part, "--resume", "--quiet")
        assert code == -signal.SIGKILL, launcher.log.read_text()
        num_in_save += any((folder / "part" / "checkpoints").glob(".step-*"))
    assert launcher.run("train", part, "--resume", "--quiet") == 0, launcher.log.read_text()
    assert outcome(folder / "part") == outcome(folder / "whole")
    return num_in_save


def test_killed_three_times_a_run_ends_as_if_it_had_not_been(launcher, models, tmp_path):
    killed_and_resumed(launcher, models, tmp_path, steps=6, kills=3)


@pytest.mark.slow
def test_killed_twenty_times_a_run_ends_as_if_it_had_not_been(launcher, models, tmp_path):
    """More than a third of the time goes into saving; that none of 20 kills falls into it has a chance of 3e-4."""
    assert killed_and_resumed(launcher, models, tmp_path, steps=40, kills=20) > 0
