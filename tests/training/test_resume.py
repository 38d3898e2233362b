"""A run that was killed, wherever it was, goes on and ends as if nobody had touched it. Real processes, real kills."""

import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.runs import Interrupt, Notes, recipe, timeless

import kibitz
from kibitz.files import JSONL, writer_of
from kibitz.report.folder import read_run
from kibitz.training import checkpoint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are forked and killed the POSIX way")


PATIENCE = 600.0  # seconds for what takes a few where nobody else uses the machine
ENDLESS = 10**6
"""Steps of a run that is to be stopped, however long that takes."""

LAUNCHER = """
import json, os, sys
import torch, transformers
from kibitz import cli
from kibitz.training import trainer
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
    with launcher.process:  # closes its input, at which it ends
        yield launcher


def write_recipe(models, folder: Path, name: str, **sections) -> Path:
    sections = {"rollout": {"store": True}, "eval": {"every": 3, "num_prompts": 4, "heatmaps": 2}, **sections}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe(*models, folder / name, **sections)), encoding="utf-8")  # JSON is YAML
    return path


def read(run: Path, name: str) -> list[dict]:
    """The rows of a file, of which no half one may be left."""
    path = run / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n") if line] if path.exists() else []


def outcome(run: Path) -> dict[str, object]:
    """All that a run leaves, but for the seconds that it took."""
    found: dict[str, object] = {}
    for name in ("metrics", "evals", "rollouts", "stored"):
        found[name] = timeless(read(run, name))
    (*_, last) = checkpoint.checkpoints(run)
    assert checkpoint.damage(last) is None
    found["step"], found["weights"] = last.name, (last / "model.safetensors").read_bytes()
    found["moments"] = (last / "training" / "optimizer.safetensors").read_bytes()
    state = json.loads((last / "training" / "state.json").read_text())
    found["state"] = {key: value for key, value in state.items() if key != "ledger"} | {
        "flops": state["ledger"]["flops"]
    }
    return found


def kill_at_random(launcher: Launcher, draws: random.Random, run: Path, seconds_per_step: float, *args: object) -> bool:
    """Start, and kill: some while they load, some while they learn, half of them when they have begun to save. False if the run
    was quicker, and had come to its end."""
    part = draws.choice(["loading", "learning", "saving", "saving"])
    sign = ".step-*" if part == "saving" else "run.json"
    before, patience = _version_of(run, sign), time.monotonic() + PATIENCE
    child = launcher.start(*args)
    while part != "loading" and _version_of(run, sign) in (None, before) and not _is_over(run):
        assert time.monotonic() < patience, launcher.log.read_text()
        time.sleep(0.001)
    most = 0.4 if part == "loading" else draws.choice([0.0, 1.0]) * seconds_per_step
    time.sleep(draws.uniform(0, most))
    os.kill(child, signal.SIGKILL)
    code = launcher.wait()
    assert code in (0, -signal.SIGKILL), launcher.log.read_text()
    return not _is_over(run)


def _is_over(run: Path) -> bool:
    info = run / "run.json"
    return info.exists() and json.loads(info.read_text())["status"] != "running"


def _version_of(run: Path, sign: str) -> int | None:
    """A number that is another one when the file or folder is another one."""
    for path in [*run.glob(sign), *run.glob(f"checkpoints/{sign}")]:
        try:
            return path.stat().st_ino
        except FileNotFoundError:
            continue
    return None


def killed_and_resumed(launcher: Launcher, models, folder: Path, *, steps: int, kills: int) -> tuple[list, int]:
    """Kill a run so many times; return how it ended and how an uninterrupted one did, and how many kills fell into a save. One
    that came to its end before it could be killed is put back to where it was, and tries again."""
    whole, part = (
        write_recipe(models, folder, name, steps=steps, save={"every": 1, "keep": 2}) for name in ("whole", "part")
    )
    assert launcher.run("train", whole, "--quiet") == 0, launcher.log.read_text()
    seconds_per_step = json.loads((folder / "whole" / "run.json").read_text())["seconds"] / steps
    draws, num_in_save = random.Random(7), 0
    run, kept = folder / "part", folder / "kept"
    while kills:
        shutil.rmtree(kept, ignore_errors=True)
        if run.exists():
            shutil.copytree(run, kept)
        if kill_at_random(launcher, draws, run, seconds_per_step, "train", part, "--resume", "--quiet"):
            kills -= 1
            num_in_save += any((run / "checkpoints").glob(".step-*"))
        else:
            shutil.rmtree(run)
            if kept.exists():
                shutil.copytree(kept, run)
    assert launcher.run("train", part, "--resume", "--quiet") == 0, launcher.log.read_text()
    return [outcome(folder / name) for name in ("part", "whole")], num_in_save


@pytest.mark.slow
def test_killed_three_times_a_run_ends_as_if_it_had_not_been(launcher, models, tmp_path):
    (part, whole), _ = killed_and_resumed(launcher, models, tmp_path, steps=6, kills=3)
    assert part == whole


@pytest.mark.slow
def test_killed_twenty_times_a_run_ends_as_if_it_had_not_been(launcher, models, tmp_path):
    """Half of the kills wait for a save to begin, and half of those come at once; that it is over before each of them does has no
    measurable chance."""
    (part, whole), num_in_save = killed_and_resumed(launcher, models, tmp_path, steps=40, kills=20)
    print(num_in_save, "kills in a save")
    assert part == whole and num_in_save > 0


# ------------------------------------------------------------------ signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_step_saves_and_gives_the_usual_exit_code(launcher, models, tmp_path, number, code):
    """What a scheduler that wants its machine back does; going on ends as if it had not."""
    path = write_recipe(models, tmp_path, "run", steps=ENDLESS, save={"every": 0})
    child = launcher.start("train", path, "--quiet")
    patience = time.monotonic() + PATIENCE
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < patience, launcher.log.read_text()
        time.sleep(0.01)
    os.kill(child, number)
    if number != signal.SIGINT:
        os.kill(child, number)  # some send several
    assert launcher.wait() == code, launcher.log.read_text()
    (saved,) = checkpoint.checkpoints(tmp_path / "run")
    done = int(saved.name.removeprefix("step-"))
    assert checkpoint.damage(saved) is None
    assert done >= 1
    assert [row["step"] for row in read(tmp_path / "run", "metrics")] == list(range(1, done + 1))
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (info["status"], info["ended_by"]) == ("stopped", f"{number.name} after step {done}")
    assert not (tmp_path / "run" / "run.lock").exists()


def test_a_terminal_that_is_closed_ends_the_run_after_a_save(models, tmp_path):
    """The shell is gone, and whatever is written to it fails."""
    path = write_recipe(models, tmp_path, "run", steps=ENDLESS, save={"every": 0})
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-m", "kibitz", "train", str(path)])
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert select.select([terminal], [], [], PATIENCE)[0], "it prints as it learns"
        os.read(terminal, 1 << 16)
    os.close(terminal)
    os.waitpid(child, 0)
    (saved,) = checkpoint.checkpoints(tmp_path / "run")
    assert checkpoint.damage(saved) is None
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (info["status"], info["ended_by"][:18]) == ("stopped", "SIGHUP after step ")


def test_a_run_that_was_killed_is_found_dead_and_its_time_is_counted(launcher, models, tmp_path):
    path = write_recipe(models, tmp_path, "run", steps=ENDLESS, save={"every": 1})
    child, patience = launcher.start("train", path, "--quiet"), time.monotonic() + PATIENCE
    while len(read_whole(tmp_path / "run", "metrics")) < 3 or not checkpoint.checkpoints(tmp_path / "run"):
        assert time.monotonic() < patience, launcher.log.read_text()
        time.sleep(0.01)
    assert f"process {child} on " in writer_of(tmp_path / "run")
    assert any("The run goes on: process" in notice for notice in read_run(tmp_path / "run").notices)
    with pytest.raises(kibitz.RecipeError, match=f"process {child} on .*, is writing .*: wait for its end"):
        kibitz.train(path, resume=True)
    os.kill(child, signal.SIGKILL)
    assert launcher.wait() == -signal.SIGKILL
    assert writer_of(tmp_path / "run") is None
    run = read_run(tmp_path / "run")
    assert any(re.match("The run died without a word after step \\d+: ", notice) for notice in run.notices)
    info, at = json.loads((tmp_path / "run" / "run.json").read_text()), run.last_step
    assert info["status"] == "running"

    kibitz.train(path, [f"steps={at + 2}"], resume=True)
    later = json.loads((tmp_path / "run" / "run.json").read_text())
    (part,) = later["parts"]
    assert (part["status"], part["first_step"]) == ("died", 0)
    assert later["ended_by"] == f"all {at + 2} steps are done"
    in_steps = sum(sum(row["seconds"].values()) for row in read(tmp_path / "run", "metrics"))
    assert later["seconds"] > part["seconds"] >= info["seconds"]
    assert later["seconds"] > in_steps
    assert read_run(tmp_path / "run").notices == []


def read_whole(run: Path, name: str) -> list[dict]:
    return JSONL(run / f"{name}.jsonl").read()


# ------------------------------------------------------------------ what lies in the folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory) -> Path:
    """A run of 4 steps with the checkpoints of steps 2 and 4."""
    tree = recipe(*models, tmp_path_factory.mktemp("runs") / "run", steps=4, save={"every": 2})
    return kibitz.train(tree).folder


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink], ids=["truncated", "flipped", "missing"])
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer.json", "training/optimizer.safetensors", "training/state.json"],
)
def test_a_damaged_checkpoint_is_named(finished, tmp_path, harm, name):
    shutil.copytree(finished, tmp_path / "run")
    old, new = checkpoint.checkpoints(tmp_path / "run")
    harm(new / name)
    found, (told,) = checkpoint.newest_sound(tmp_path / "run")
    assert found == old
    assert name in told


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink], ids=["truncated", "flipped", "missing"])
def test_a_damaged_manifest_is_damage(finished, tmp_path, harm):
    shutil.copytree(finished, tmp_path / "run")
    (*_, new) = checkpoint.checkpoints(tmp_path / "run")
    manifest = new / checkpoint.MANIFEST
    harm(manifest)
    assert checkpoint.damage(new) is not None
    manifest.write_text('{"sha256": {}}')
    assert checkpoint.damage(new) is not None
    manifest.write_text('{"sha256": ["model.safetensors"]}')
    assert checkpoint.damage(new) is not None


def test_what_a_person_puts_beside_the_checkpoints_is_none(models, finished, tmp_path):
    """Copies under other names, and a checkpoint under the name of another step."""
    run = shutil.copytree(finished, tmp_path / "run")
    folder, real = run / "checkpoints", checkpoint.checkpoints(run)
    for name in ("step-000004.bak", "step-000004 copy", "step-old", "step-"):
        shutil.copytree(real[-1], folder / name)
    shutil.copytree(real[0], folder / "step-000009")
    found, (told,) = checkpoint.newest_sound(run)
    assert found == real[-1]
    assert told == "the checkpoint step-000009 is damaged: it is that of step 2 under another name"
    tree = recipe(*models, run, steps=4, save={"every": 2}) | {"output": str(run)}
    assert kibitz.train(tree, resume=True).checkpoint == real[-1]
    names = {path.name for path in folder.iterdir()}
    assert {"step-000004.bak", "step-000004 copy", "step-old", "step-", "damaged-step-000009"} <= names


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b"\xff", b"student: {", b"steps: 1\nsteps: 2", b"\0"])
def test_a_damaged_recipe_of_a_run_is_named(models, finished, tmp_path, text):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "recipe.yaml").write_bytes(text)
    with pytest.raises(kibitz.RecipeError, match=f"output: the recipe.yaml of the run at {run} cannot be read: "):
        kibitz.train(recipe(*models, run, steps=5) | {"output": str(run)}, resume=True)


def test_a_million_steps_come_after_those_before(tmp_path):
    for step in (1_000_000, 999_999, 20):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [20, 999_999, 1_000_000]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(models, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    flip_a_bit(run / "checkpoints" / "step-000004" / "model.safetensors")
    notes = Notes()
    tree = recipe(*models, run, steps=4, save={"every": 2})
    tree["output"] = str(run)
    resumed = kibitz.train(tree, resume=True, progress=notes)
    (told,) = notes.texts
    assert told == (
        "the checkpoint step-000004 is damaged: model.safetensors is not as it was written; step-000002 is taken"
    )
    assert json.loads((run / "run.json").read_text())["notes"] == [told]
    assert outcome(run) == outcome(finished)
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"step-000002", "step-000004", "damaged-step-000004"}
    assert resumed.checkpoint.name == "step-000004"


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(models, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for path in checkpoint.checkpoints(run):
        truncate(path / "model.safetensors")
    with pytest.raises(kibitz.RecipeError, match="step-000004 is damaged.*step-000002 is damaged.*put a copy back"):
        kibitz.train(recipe(*models, run, steps=4, save={"every": 2}), resume=True)


def test_resume_starts_a_run_that_is_not_there_yet_and_says_so(models, tmp_path):
    """One command line serves the first start and every later one, as a scheduler that starts jobs again wants it."""
    tree, notes = recipe(*models, tmp_path / "run", steps=2), Notes()
    whole = kibitz.train(tree, resume=True, progress=notes)
    assert notes.texts == [f"there is no run at {tmp_path / 'run'} yet: it starts from step 0"]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    notes = Notes()
    again = kibitz.train(tree, resume=True, progress=notes)
    assert notes.texts == [f"the run at {tmp_path / 'run'} had saved no checkpoint: it starts again from step 0"]
    assert [timeless(rows) for rows in (again.metrics, again.evals)] == [
        timeless(rows) for rows in (whole.metrics, whole.evals)
    ]


def test_going_on_between_two_evaluations_adds_none(models, tmp_path):
    """An evaluation more would be a point more on the curve, and one more thing that guards have seen."""
    tree = recipe(*models, tmp_path / "run", steps=4, eval={"every": 2})
    with pytest.raises(KeyboardInterrupt):
        kibitz.train(tree, progress=Interrupt())
    assert [row["step"] for row in kibitz.train(tree, resume=True).evals] == [0, 2, 4]
