"""A saved student, served by vLLM's own server (its CPU build), writes greedily what transformers writes."""

import pytest
from support.greedy import by_server, by_transformers, num_compared
from support.models import make_model
from support.runs import recipe
from support.vllm_cpu import ENVIRONMENT, MISSING, PYTHON, free_port, installed

import kibitz
from kibitz import config
from kibitz.servers.commands import MODULE, commands
from kibitz.servers.processes import Hosted

PROMPTS = [(1, 5 + i, 6, 7) for i in range(4)]


def test_texts_are_compared_up_to_the_first_tie_and_no_further():
    ours = [(5, 2.0), (6, 0.5), (7, 1e-4), (8, 3.0)]
    assert num_compared(ours, [5, 6, 9, 9]) == 2 and num_compared(ours[:2], [5, 6]) == 2
    with pytest.raises(AssertionError, match="token 1"):
        num_compared(ours, [5, 9, 7, 8])
    with pytest.raises(AssertionError, match="same token"):
        num_compared(ours[:2], [5, 6, 7])


@pytest.mark.slow
@pytest.mark.skipif(not installed(), reason=MISSING)
def test_a_saved_student_is_served_with_the_same_greedy_text(tmp_path, monkeypatch):
    folders = [make_model(tmp_path / name, seed=seed, head_dim=32) for seed, name in enumerate(("student", "teacher"))]
    student = str(kibitz.train(recipe(*folders, tmp_path / "run", steps=2, optim={"lr": 0.01})).checkpoint)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    url = f"http://127.0.0.1:{free_port()}"
    tree = recipe(folders[0], None, tmp_path / "served", teacher={"url": url, "model": student},
                  data={"max_prompt_tokens": 64}, method={"type": "opd", "support": "top_k", "top_k_of": "teacher"})  # fmt: skip
    ours = by_transformers(student, PROMPTS, 24)
    hosted = Hosted([PYTHON, "-m", MODULE], tmp_path / "logs")
    try:
        hosted.start(commands(config.load(tree), cpu=True), timeout=900, restarts=0)
        theirs = by_server(url, student, PROMPTS, 24)
    finally:
        hosted.close()
    assert sum(num_compared(*pair) for pair in zip(ours, theirs, strict=True)) > 12
