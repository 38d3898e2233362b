"""What every test stands on: one thread, no network, and small models with random weights."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "100", "NO_COLOR": "1"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import hypothesis
import pytest

# The same examples every time, and no clock: a shared machine is slow when it likes.
hypothesis.settings.register_profile("kibitz", derandomize=True, deadline=None)
hypothesis.settings.load_profile("kibitz")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Two cores are shared, and sums come out the same only on one thread."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_models(tmp_path_factory) -> Path:
    """A folder with `student` and `teacher` of one tokenizer, and `stranger` of another."""
    from support.models import make_model, tokenizer

    home = tmp_path_factory.mktemp("models")
    make_model(home / "student", seed=1)
    make_model(home / "teacher", seed=2, hidden_size=48)
    other = tokenizer()
    other.add_tokens(["x", "y"])
    other.save_pretrained(make_model(home / "stranger", seed=3, vocab_size=len(other)))
    return home
