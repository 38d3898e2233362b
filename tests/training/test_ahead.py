"""One step ahead: the next rollouts are written, by weights of one step earlier, while the student learns; and a run that goes on
has the same bits."""

import json
import threading
import time
from itertools import groupby

import pytest
import torch
from safetensors.torch import load_file
from support.runs import Crash, recipe, timeless
from support.vllm_faults import Replaced, Restarted, seed_of
from support.vllm_stub import Stub

import kibitz
from kibitz import config
from kibitz.config import RecipeError
from kibitz.servers import ServerError
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


# ------------------------------------------------------------------ servers that fail


def stored(models, stub: Stub, output, *others: str, **server):
    """A run that keeps its text, of several servers."""
    asks = tree(models, stub.url, output)
    rollout = {"urls": [stub.url, *others], "store": True, "server": {"patience": 600.0, **server}}
    return kibitz.train(asks | {"rollout": asks["rollout"] | rollout})


@pytest.fixture(scope="module")
def told(two_models, tmp_path_factory):
    """The run that keeps its text, without a fault."""
    with Stub(two_models[0]) as stub:
        return stored(two_models, stub, tmp_path_factory.mktemp("told") / "run")


def test_a_server_that_dies_gets_the_weights_again_and_what_is_missing_is_written(told, two_models, tmp_path):
    with Restarted(two_models[0]) as stub:
        stub.seed = seed_of(told.folder, 2, 1)
        run = stored(two_models, stub, tmp_path / "run")
        pushed = [path for path, _, _ in stub.asked].count("/collective_rpc")
    assert stub.times == 0 and pushed == 6, "at the start, after each of four steps, and once more"
    assert written(run) == written(told)
    assert [row["flops"] for row in run.metrics] == [row["flops"] for row in told.metrics]


def test_of_two_servers_one_does_the_work_of_the_other(told, two_models, tmp_path):
    with Restarted(two_models[0]) as stub, Stub(two_models[0]) as other:
        stub.seed, stub.stays_dead = seed_of(told.folder, 2, 0), True
        run = stored(two_models, stub, tmp_path / "run", other.url)
    assert written(run) == written(told)


def test_what_a_server_wrote_by_other_weights_is_written_again(told, two_models, tmp_path, caplog):
    with Replaced(two_models[0]) as stub:
        stub.base, stub.seed = load_file(two_models[1] / "model.safetensors"), seed_of(told.folder, 2, 0)
        run = stored(two_models, stub, tmp_path / "run")
    assert "does not hold the student's weights any more" in caplog.text and stub.seed == -1
    assert written(run) == written(told)


def test_a_server_that_always_has_other_weights_ends_the_run(two_models, tmp_path):
    base = load_file(two_models[1] / "model.safetensors")
    with Stub(two_models[0]) as stub:

        def forget(path, answer):
            if path == "/v1/completions" and len(answer["choices"]) == 3:
                stub.model.model.load_state_dict(base, strict=False)
            return answer

        stub.bend = forget
        with pytest.raises(ServerError, match=f"the student at {stub.url}.*3 times in a row"):
            stored(two_models, stub, tmp_path / "run")


def test_a_server_that_dies_at_each_prompt_ends_the_run(two_models, tmp_path):
    """It comes back, takes the weights, and dies of the next prompt: nobody waits for it for ever."""
    with Stub(two_models[0]) as stub:
        stub.bend = lambda path, answer: None if path == "/v1/completions" and len(answer["choices"]) == 3 else answer
        with pytest.raises(ServerError, match="did not stay up until all rollouts of a step were written.*--resume"):
            stored(two_models, stub, tmp_path / "run", patience=1.0)
    assert not [one.name for one in threading.enumerate() if one.name == "kibitz-ahead"]


def test_a_run_that_fails_while_a_server_writes_leaves_no_thread(two_models, tmp_path):
    """The server never answers: its requests are given up."""
    over, first = threading.Event(), threading.Semaphore(4)  # the prompts of the first step are answered

    class Keeping(Stub):
        def answer(self, path, body):
            answer = super().answer(path, body)
            if path == "/v1/completions" and body["n"] == 3 and not first.acquire(blocking=False):
                over.wait(600)
            return answer

    class Failing(NullProgress):
        def phase(self, name: str) -> None:
            if name == "teacher":
                raise RuntimeError("a grader is broken")

    with Keeping(two_models[0]) as stub:
        with pytest.raises(RuntimeError, match="a grader is broken"):
            kibitz.train(tree(two_models, stub.url, tmp_path / "run"), progress=Failing())
        until = time.monotonic() + 60
        while (left := [one.name for one in threading.enumerate() if one.name == "kibitz-ahead"]) and (
            time.monotonic() < until
        ):
            time.sleep(0.01)
        over.set()
    assert not left


# ------------------------------------------------------------------ the embedded engine


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
