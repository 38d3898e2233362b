"""One step ahead: the next rollouts are written, by weights of one step earlier, while the student learns; and a run that goes on
has the same bits."""

import json
import threading
from itertools import groupby

import pytest
import torch
from safetensors.torch import load_file
from support.runs import Crash, recipe, timeless
from support.vllm_stub import Stub

import kibitz
from kibitz import config
from kibitz.config import RecipeError
from kibitz.training.trainer import NullProgress


def tree(models, url: str, output, samples: int = 3, **sections):
    rollout = {"engine": "vllm", "urls": [url], "max_staleness": 1, "prompts_per_step": 4, "max_tokens": 8}
    rollout["samples_per_prompt"] = samples
    return recipe(
        *models, output, rollout=rollout, **{"steps": 4, "save": {"every": 1}, "optim": {"lr": 0.01}, **sections}
    )


@pytest.fixture(scope="module")
def whole(two_models, tmp_path_factory):
    """A run that nothing interrupts, and the requests of its server."""
    with Stub(two_models[0]) as stub:
        run = kibitz.train(tree(two_models, stub.url, tmp_path_factory.mktemp("whole") / "run"))
        yield run, [(path, body) for path, _, body in stub.asked]


def test_every_step_but_the_first_learns_from_text_that_is_a_step_old(whole):
    run, asked = whole
    assert [row["staleness"] for row in run.metrics] == [0, 1, 1, 1]
    salts = [body["cache_salt"] for path, body in asked if path == "/v1/completions" and body["n"] == 3]
    versions = [len(list(group)) for _, group in groupby(salts)]
    assert versions == [8, 4, 4], "the first two steps by the first weights"


def test_it_learns(whole):
    losses = [row["loss"] for row in whole[0].metrics]
    assert all(loss == loss for loss in losses) and losses[-1] < losses[0]


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_run_goes_on_to_the_same_bits(step, whole, two_models, tmp_path):
    with Stub(two_models[0]) as stub:
        asks = tree(two_models, stub.url, tmp_path / "run")
        with pytest.raises(RuntimeError, match="power cut"):
            kibitz.train(asks, progress=Crash(step + 1))
    with Stub(two_models[0], port=stub.port):
        run = kibitz.train(asks, resume=True)
    assert timeless(run.metrics) == timeless(whole[0].metrics)
    ours, theirs = (load_file(found.checkpoint / "model.safetensors") for found in (run, whole[0]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_server_writes_while_the_student_learns(two_models, tmp_path):
    """The student begins to learn in the first step only when the server has been asked for rollouts of the second: a run that
    wrote first and learnt then would not get there."""
    asked, waited = threading.Semaphore(0), []

    def count(path, answer):
        if path == "/v1/completions" and len(answer["choices"]) == 3:
            asked.release()
        return answer

    class Waiting(NullProgress):
        def phase(self, name: str) -> None:
            if name == "student" and not waited:
                waited.extend(asked.acquire(timeout=600) for _ in range(5))  # a step has four prompts

    with Stub(two_models[0], bend=count) as stub:
        run = kibitz.train(tree(two_models, stub.url, tmp_path / "run", samples=3, steps=2), progress=Waiting())
    assert waited == [True] * 5 and [row["staleness"] for row in run.metrics] == [0, 1]
    for row in run.metrics:  # the teacher is in this process, and is seen to work there
        lanes = row["timeline"]
        assert list(lanes) == ["teacher_scoring", "student_training", "student_sampling"]
        assert lanes["teacher_scoring"][0][1] <= lanes["student_training"][-1][0]


@pytest.fixture(scope="module")
def embedded(two_models, tmp_path_factory):
    """A recipe whose rollouts the embedded engine writes one step ahead, and its run."""
    rollout = {"engine": "torch", "urls": [], "max_staleness": 1, "prompts_per_step": 4, "max_tokens": 8, "store": True}
    asks = tree(two_models, "", tmp_path_factory.mktemp("embedded") / "run") | {"rollout": rollout}
    return asks, kibitz.train(asks)


def written(run: "kibitz.Run") -> list[list[str]]:
    """The texts of each step."""
    rows = [json.loads(line) for line in (run.folder / "stored.jsonl").read_text().splitlines()]
    return [[json.dumps(row["response_ids"]) for row in group] for _, group in groupby(rows, lambda row: row["step"])]


def test_the_embedded_engine_writes_by_weights_of_one_step_earlier(embedded, two_models, tmp_path):
    """The first two steps have the text of the first weights, as if the student had not moved; the third has not."""
    asks, run = embedded
    assert [row["staleness"] for row in run.metrics] == [0, 1, 1, 1]
    asks = asks | {"output": str(tmp_path / "still"), "optim": {"lr": 1e-12}}
    frozen = kibitz.train(asks)
    assert written(run)[:2] == written(frozen)[:2] and written(run)[2] != written(frozen)[2]


def test_the_embedded_engine_one_step_ahead_goes_on_to_the_same_bits(embedded, tmp_path):
    asks, whole = embedded
    asks = asks | {"output": str(tmp_path / "run")}
    with pytest.raises(RuntimeError, match="power cut"):
        kibitz.train(asks, progress=Crash(3))
    run = kibitz.train(asks, resume=True)
    assert timeless(run.metrics) == timeless(whole.metrics) and written(run) == written(whole)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rollout": {"max_staleness": 1, "engine": "vllm", "server": {"sleep": True}}}, "drop rollout.server.sleep"),
        ({"rollout": {"max_staleness": 1, "engine": "vllm"}, "method": {"type": "opd", "replay": 0.5}}, "without replay"),
        ({"rollout": {"max_staleness": 1, "engine": "vllm"}, "method": {"type": "gkd"}}, "is for methods whose step"),
    ],
)  # fmt: skip
def test_what_cannot_be_ahead_is_refused(changes, sentence, tmp_path):
    base = {"student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"world": "arithmetic"}}
    with pytest.raises(RecipeError, match=sentence):
        config.load({**base, **changes})
