"""The tutorial and the library are each other's oracle."""

import json

import pytest
from support.models import make_model
from support.paths import ROOT, script
from support.runs import recipe

import kibitz
from kibitz import worlds

EXAMPLE = ROOT / "examples" / "opd_in_one_file.py"


@pytest.fixture
def example():
    return script(EXAMPLE)


def test_the_one_file_has_the_loss_of_the_library(example, tmp_path, monkeypatch):
    """Same seed, same rollouts, same losses over several updates: sampling, shift, loss, mean, clipping and AdamW agree."""
    student, teacher = make_model(tmp_path / "student", seed=1), make_model(tmp_path / "teacher", seed=2)
    rows = worlds.get("arithmetic").rows("train", 10, seed=0)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    tree = recipe(student, teacher, tmp_path / "run", steps=5, rollout={"prompts_per_step": 4, "max_tokens": 10})
    run = kibitz.train({**tree, "data": {"prompts": str(prompts)}})
    for name, value in {"PROMPTS_PER_STEP": 4, "SAMPLES_PER_PROMPT": 2, "MAX_TOKENS": 10}.items():
        monkeypatch.setattr(example, name, value)
    losses = example.main(str(student), str(teacher), str(prompts), steps=5)
    assert losses == pytest.approx([row["loss"] for row in run.metrics], rel=2e-4)


def test_the_one_file_is_short_and_alone():
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) <= 200
    assert "import kibitz" not in text
    assert "from kibitz" not in text
