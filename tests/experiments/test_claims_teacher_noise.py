"""A misled teacher: what counts as its own mistake, and which numbers make which verdict."""

import json

import pytest
import torch
from support.records import put, record

from kibitz import experiments, worlds
from kibitz.experiments import records
from kibitz.experiments.claims import teacher_noise
from kibitz.experiments.evidence import finding
from kibitz.types import Prompt, Rollout

NOISE = experiments.get("teacher-noise")


def test_the_teachers_answer_takes_the_place_of_the_right_one():
    row = {"prompt": "9-5-3", "answer": "1", "task": "arithmetic"}
    prompt = Prompt((1,), "9-5-3", "key", answer="1", columns=row)
    mistake = Rollout(prompt, [1], torch.zeros(1), True, text="9-2=7")
    asked = teacher_noise.as_answer(mistake)
    world = worlds.get("arithmetic")
    assert asked.answer == "7" and prompt.answer == "1"
    assert world.grade(dict(asked.columns), "9-2=7") == 1 and world.grade(dict(asked.columns), "4-3=1") == 0
    assert teacher_noise.as_answer(Rollout(prompt, [1], torch.zeros(1), True, text="so it is 7")).answer == "so it is 7"


@pytest.mark.parametrize(
    ("mistake", "rewarded", "verdict", "fixed"),
    [(0.9, 0.9, "reproduced", True), (0.9, 0.6, "partly", False), (0.1, 0.9, "partly", True), (0.1, 0.6, "not", False)],
)
def test_the_verdict_follows_the_numbers(tmp_path, mistake, rewarded, verdict, fixed):
    """A remedy counts only against the same method without it: the mixture with the sound teacher against `misled`."""
    folder = tmp_path / "teacher-noise"
    for arm, share in {"sound": 0.9, "misled": 0.6, "and-sound": rewarded, "misled-sampled": 0.6}.items():
        row = record(arm, 1e-3, 0, 0.5, share)
        row["test"]["num_prompts"] = 1000
        put(folder, row)
    for role, share in {"student": 0.65, "teacher": 0.97, "teacher-misled": 0.62, "teacher-slips": 0.7}.items():
        records.write(folder / f"{role}.json", {"test": {"sampled": {"accuracy": share}, "num_prompts": 1000}})
    shares = {"student": 0.1, "sound": 0.02, "misled": mistake, "and-sound": 0.05, "misled-sampled": mistake}
    models = {name: {"right": 1 - share, "mistake": share} for name, share in shares.items()}
    about = {"commit": "c0ffee", "date": "2026-11-24", "machine": "toy", "threads": 1}
    for seed in range(3):
        row = {"num_mistakes": 300, "num_problems": 1000, "models": models, **about}
        (folder / f"probe-{seed}.json").write_text(json.dumps(row), encoding="utf-8")
    found = finding(NOISE, tmp_path)
    assert found.verdict == verdict
    assert found.numbers["repairing"] == ["and-sound"] * fixed
