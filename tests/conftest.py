"""What every test stands on: one thread, no network, and small models with random weights."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "100", "NO_COLOR": "1"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import signal
import ssl
from pathlib import Path

import hypothesis
import pytest

# Each of the many clients that tests open would read all certificates of the machine: 20 ms, and none needs them.
ssl.create_default_context = functools.cache(ssl.create_default_context)

# A shell lets what it starts in the background ignore Ctrl-C, and the children of the tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time, and no clock: a shared machine is slow when it likes.
slow = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("kibitz", derandomize=True, deadline=None, suppress_health_check=slow)
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


@pytest.fixture(scope="session")
def models(small_models) -> tuple[Path, Path]:
    """The student and the teacher of `small_models`."""
    return small_models / "student", small_models / "teacher"


@pytest.fixture(scope="session")
def two_models(tmp_path_factory) -> list[Path]:
    """Two models of one shape: the weights of either fit into the other."""
    from support.models import make_model

    home = tmp_path_factory.mktemp("two-models")
    return [make_model(home / str(seed), seed=seed) for seed in range(2)]


@pytest.fixture
def lab(small_models, tmp_path):
    """Makes a `Lab` of a method: one step of it on the small models, without the run around it."""
    from support.lab import Lab

    def build(method: dict, name: str = "run", **sections) -> Lab:
        return Lab(small_models, tmp_path / name, method, **sections)

    return build
