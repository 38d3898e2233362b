"""Trackers get the numbers of the rows, go on where a run goes on, and never hold what they log in with."""

import os
import sqlite3
import subprocess
import sys
import warnings

import pytest
from support.runs import crash, recipe

import kibitz
from kibitz import config
from kibitz.config import RecipeError, TrackConfig
from kibitz.training import trackers
from kibitz.training.trainer import NullProgress

SECRET = "k" * 8 + "5ec7e7" + "0" * 26  # 40 signs, as a real key has


def settings(small_models, output, to, **sections):
    changes = {"track": {"to": to}, "save": {"every": 2}, "optim": {"schedule": "constant"}, **sections}
    return recipe(small_models / "student", small_models / "teacher", output, **changes)


def scalars(folder):
    """What TensorBoard reads back, in its order: [(name, step, value)]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder)).Reload()
    return [(tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]


def everything_below(folder) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_numbers_of_a_row():
    row = {
        "step": 3,
        "loss": 0.5,
        "seconds": {"sampling": 2},
        "split": "dev",
        "reward": None,
        "deep": {"er": {"x": True}},
    }
    found = dict(trackers.numbers(row, "train"))
    assert found == {"train/loss": 0.5, "train/seconds/sampling": 2.0, "train/deep/er/x": 1.0}


def test_tensorboard_has_the_rows_and_goes_on_with_them(small_models, tmp_path):
    pytest.importorskip("tensorboard")
    kibitz.train(settings(small_models, tmp_path / "run", "tensorboard", steps=3))
    run = kibitz.train(settings(small_models, tmp_path / "run", "tensorboard", steps=5), resume=True)
    found = scalars(run.folder / "tensorboard")
    losses = [(step, value) for tag, step, value in found if tag == "train/loss"]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5]
    assert [value for _, value in losses] == pytest.approx([row["loss"] for row in run.metrics], rel=1e-6)
    greedy = [(step, value) for tag, step, value in found if tag == "eval/greedy/accuracy"]
    assert greedy[-1] == (5, pytest.approx(run.evals[-1]["greedy"]["accuracy"]))
    assert {tag.split("/")[0] for tag, _, _ in found} == {"train", "eval"}


def test_steps_behind_the_checkpoint_are_not_there_twice(small_models, tmp_path, monkeypatch):
    """The run dies at step 3 of 4; the last checkpoint is of step 2."""
    pytest.importorskip("tensorboard")
    from kibitz.training.trainer import Trainer

    save = Trainer.save
    monkeypatch.setattr(Trainer, "save", lambda self, **how: save(self, **how) if self.done == 2 else None)
    crash(settings(small_models, tmp_path / "run", "tensorboard"))
    monkeypatch.undo()
    run = kibitz.train(settings(small_models, tmp_path / "run", "tensorboard"), resume=True)
    steps = [step for tag, step, _ in scalars(run.folder / "tensorboard") if tag == "train/loss"]
    assert steps == [1, 2, 3, 4]


def in_a_process(tree, environment, resume=False) -> subprocess.CompletedProcess:
    program = (
        "import json, sys, torch, kibitz\n"
        "torch.set_num_threads(1)\n"
        "kibitz.train(json.loads(sys.argv[1]), resume=sys.argv[2] == 'True')\n"
        "print('the result')\n"
    )
    import json

    return subprocess.run(
        [sys.executable, "-c", program, json.dumps(tree), str(resume)],
        capture_output=True, text=True, timeout=900, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_wandb_offline_goes_on_under_one_name_and_keeps_no_key(small_models, tmp_path):
    pytest.importorskip("wandb")
    environment = {"WANDB_MODE": "offline", "WANDB_API_KEY": SECRET, "WANDB__SERVICE_WAIT": "300",
                  "WANDB_CONFIG_DIR": str(tmp_path / "home"),
                   "WANDB_CACHE_DIR": str(tmp_path / "home"), "WANDB_DATA_DIR": str(tmp_path / "home")}  # fmt: skip
    for steps, resume in ((2, False), (4, True)):
        answer = in_a_process(settings(small_models, tmp_path / "run", "wandb", steps=steps), environment, resume)
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout == "the result\n"
        assert SECRET not in answer.stderr and "the tracker failed" not in answer.stderr
    runs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2
    assert len({path.stem for path in runs}) == 1, "both parts belong to one run"
    assert all(b"train/loss" in path.read_bytes() for path in runs)
    assert SECRET.encode() not in everything_below(tmp_path)


@pytest.mark.slow
def test_trackio_goes_on_under_one_name(small_models, tmp_path):
    pytest.importorskip("trackio")
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_TOKEN": SECRET}
    for steps, resume in ((2, False), (4, True)):
        answer = in_a_process(settings(small_models, tmp_path / "run", "trackio", steps=steps), environment, resume)
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout == "the result\n"
        assert "the tracker failed" not in answer.stderr
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step FROM metrics ORDER BY step").fetchall()
    assert len({name for name, _ in rows}) == 1
    assert [step for _, step in rows] == [0, 1, 2, 2, 3, 4, 4]
    assert SECRET.encode() not in everything_below(tmp_path)


def test_a_tracker_that_fails_costs_nothing_but_itself(small_models, tmp_path, monkeypatch):
    notes = []

    class Listens(NullProgress):
        def note(self, text):
            notes.append(text)

    def broken(*_):
        def log(step, values):
            raise ConnectionError(f"401 for key {SECRET}")

        return trackers.Tracker(log, lambda: None)

    monkeypatch.setitem(trackers.OPEN, "tensorboard", broken)
    run = kibitz.train(settings(small_models, tmp_path / "run", "tensorboard", steps=2), progress=Listens())
    assert len(run.metrics) == 2
    (note,) = [text for text in notes if "tracker" in text]
    assert "ConnectionError" in note and SECRET not in note


def test_what_is_missing_is_named_before_anything_loads(tmp_path, monkeypatch):
    tree = recipe("/nowhere/at/all", None, tmp_path, method={"type": "grpo"}, track={"to": "wandb"})
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(RecipeError, match="set WANDB_API_KEY, or WANDB_MODE=offline"):
        kibitz.train(tree)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'kibitz\[wandb\]'"):
        kibitz.train(tree)
    with pytest.raises(RecipeError, match=r"track\.project"):
        config.load(tree, ["track.project=../../etc"])
    with pytest.raises(RecipeError, match=r"unknown key track\.api_key"):
        config.load(tree, [f"track.api_key={SECRET}"])
    assert trackers.require(None) is None and TrackConfig(to="trackio").name is None
