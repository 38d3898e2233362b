"""One step ahead by several processes: real ones, which meet by gloo, and a server of the student for all of them."""

import json
import os
import threading
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.receiver import Receiver
from support.runs import recipe, timeless
from support.torchrun import started, torchrun
from support.train_together import train
from support.vllm_faults import Refusing, Replaced, Restarted, seed_of
from support.vllm_program import program
from support.vllm_stub import Stub

from kibitz.config import ModelConfig
from kibitz.files import JSONL
from kibitz.models.load import load_model
from kibitz.training import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="processes are started and stopped the POSIX way"),
]

STEPS, PROMPTS, SAMPLES = 4, 5, 3
IN_PARTS = {"whole_copy": False}


def job(models, url: str, output: Path, resume: bool = False, server: dict | None = None, **sections) -> dict:
    """A run of prompts that two processes do not share evenly."""
    rollout = {"engine": "vllm", "urls": [url] if url else [], "max_staleness": 1, "prompts_per_step": PROMPTS}
    rollout |= {"samples_per_prompt": SAMPLES, "max_tokens": 8, "store": True, "server": server or {"patience": 600.0}}
    rollout |= sections.pop("rollout", {})
    given = {"steps": STEPS, "save": {"every": 1, "keep": 9}, "optim": {"lr": 0.01}, "eval": {"num_prompts": 4}}
    return {"recipe": recipe(*models, output, rollout=rollout, **given | sections), "resume": resume}


def rows(folder: Path, name: str) -> list[dict]:
    return JSONL(folder / f"{name}.jsonl").read()


def texts(folder: Path) -> list[tuple]:
    return [(row["step"], row["prompt_key"], row["response_ids"]) for row in rows(folder, "stored")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.checkpoints(folder)[-1]
    return {name: one for path in newest.glob("*.safetensors") for name, one in load_file(path).items()}


def assert_same_run(one: Path, other: Path) -> None:
    """The same text, and the same numbers but for rounding."""
    assert texts(one) == texts(other)
    for mine, theirs in zip(rows(one, "metrics"), rows(other, "metrics"), strict=True):
        for key in ("loss", "grad_norm", "response_tokens", "num_tokens", "reward", "staleness"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-4), key
        assert mine["flops"] == pytest.approx(theirs["flops"])
    for mine, theirs in zip(rows(one, "evals"), rows(other, "evals"), strict=True):
        assert mine["reverse_kl"] == pytest.approx(theirs["reverse_kl"], rel=1e-3, abs=1e-4)


def assert_same_bits(one: Path, other: Path) -> None:
    """Every number and every weight, and the text."""
    assert texts(one) == texts(other)
    assert timeless(rows(one, "metrics")) == timeless(rows(other, "metrics"))
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "in_parts": {"parallel": IN_PARTS},
    "behind": {"save": {"every": 1, "keep": 9, "background": True}, "eval": {"num_prompts": 4, "every": 1}},
    "kdrl": {"method": {"type": "kdrl"}},
    "embedded": {"rollout": {"engine": "torch", "urls": []}},
}


@pytest.fixture(scope="module")
def alone(two_models, tmp_path_factory) -> Path:
    """The runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    with Stub(two_models[0]) as stub:
        for name in ("plain", "behind", "kdrl", "embedded"):
            train(job(two_models, stub.url, folder / name, **RUNS[name]))
    return folder


@pytest.fixture(scope="module")
def by_two(two_models, tmp_path_factory) -> tuple[Path, list]:
    """The same and others by two processes; and what the server was asked by the first."""
    folder = tmp_path_factory.mktemp("by-two")
    with Stub(two_models[0]) as stub:
        torchrun(2, [job(two_models, stub.url, folder / "plain")], folder)
        asked = [(path, body) for path, _, body in stub.asked]
        others = [job(two_models, stub.url, folder / name, **RUNS[name]) for name in RUNS if name != "plain"]
        torchrun(2, others, folder)
    return folder, asked


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_run_of_one(alone, by_two, name):
    """Also with a student in parts, with checkpoints that are asked to be written behind, and evaluations on the server."""
    folder, _ = by_two
    assert_same_run(folder / name, alone / ("plain" if name == "in_parts" else name))
    assert [row["staleness"] for row in rows(folder / name, "metrics")] == [0, 1, 1, 1]
    assert all(checkpoint.damage(path) is None for path in checkpoint.checkpoints(folder / name))


def test_each_prompt_is_asked_once_and_weights_are_brought_once_for_all(by_two):
    _, asked = by_two
    salts = [body["cache_salt"] for path, body in asked if path == "/v1/completions" and body["n"] == SAMPLES]
    versions = [len(list(group)) for _, group in groupby(salts)]
    assert versions == [2 * PROMPTS, PROMPTS, PROMPTS], "the first two steps by the first weights"
    assert [path for path, _ in asked].count("/collective_rpc") == STEPS + 1, "at the start and after each step"


# ------------------------------------------------------------------ at the same time


class CountDown:
    """Opens at the call of `count` with this number."""

    def __init__(self, number: int):
        self.number, self.called, self.lock, self.opened = number, 0, threading.Lock(), threading.Event()

    def count(self) -> int:
        """Return the number of this call."""
        with self.lock:
            self.called += 1
            if self.called == self.number:
                self.opened.set()
            return self.called

    def wait(self) -> bool:
        return self.opened.wait(600)


def test_the_server_writes_while_both_processes_are_at_work(two_models, tmp_path):
    """The server keeps the rollouts of the second step until the teacher has been asked about all of the first, and the teacher
    does not answer before the server has been asked for all of the second: processes that did one after the other would wait
    for ever."""
    begun, taught, waited = CountDown(2 * PROMPTS), CountDown(PROMPTS * SAMPLES), []

    class Keeping(Stub):
        def answer(self, path, body):
            if path == "/v1/completions" and body["n"] == SAMPLES and begun.count() > PROMPTS:
                waited.append(taught.wait())
            return super().answer(path, body)

    class Slow(Stub):
        def answer(self, path, body):
            if path == "/inference/v1/generate" and len(body["token_ids"]) > 2:
                taught.count()
                waited.append(begun.wait())
            return super().answer(path, body)

    method = {"support": "top_k", "top_k": 8}  # of the student: asked about when the step is scored, not before
    with Keeping(two_models[0]) as writer, Slow(two_models[1]) as teacher:
        asks = job(two_models, writer.url, tmp_path / "run", steps=2, eval={"num_prompts": 2}, method=method)
        asks["recipe"]["teacher"] = {"url": teacher.url, "patience": 600.0}
        torchrun(2, [asks], tmp_path)
    assert len(waited) == 2 * PROMPTS * SAMPLES + PROMPTS and all(waited)
    first, second = rows(tmp_path / "run", "metrics")
    assert (first["staleness"], second["staleness"]) == (0, 1)
    lanes = first["timeline"]
    assert set(lanes) == {"teacher_scoring", "student_training", "student_sampling"}
    scoring, sampling = lanes["teacher_scoring"], lanes["student_sampling"]
    assert any(a < end and start < b for a, b in scoring for start, end in sampling), "both were at work"
    assert first["rollout_bytes_per_token"] > 0


def test_a_teacher_on_a_server_begins_in_the_process_that_will_ask(two_models, tmp_path):
    """It is asked once about each rollout, while others are written: two processes with different shares would ask twice."""
    asked, method = {}, {"support": "sampled"}
    for name in ("one", "two"):
        with Stub(two_models[0]) as writer, Stub(two_models[1]) as teacher:
            asks = job(two_models, writer.url, tmp_path / name, method=method)
            asks["recipe"]["teacher"] = {"url": teacher.url, "patience": 600.0}
            train(asks) if name == "one" else torchrun(2, [asks], tmp_path)
            bodies = [body for path, _, body in teacher.asked if path == "/inference/v1/generate"]
            asked[name] = sorted(tuple(body["token_ids"]) for body in bodies if len(body["token_ids"]) > 2)
    assert asked["one"] == asked["two"] and len(asked["two"]) == len(set(asked["two"]))
    assert texts(tmp_path / "two") == texts(tmp_path / "one")
    assert len(asked["two"]) == len({(key, tuple(ids)) for _, key, ids in texts(tmp_path / "two")})


# ------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
def test_what_one_process_is_refused_ends_both_in_the_same_sentence(place, by_two, two_models, tmp_path):
    """And after that both can do another run: neither waits in a collective of which the other knows nothing."""
    with Refusing(two_models[0]) as stub:
        stub.seed = seed_of(by_two[0] / "plain", 2, place)
        refused = job(two_models, stub.url, tmp_path / "refused") | {"told": str(tmp_path / "told")}
        after = job(two_models, stub.url, tmp_path / "after", seed=3, steps=2)
        torchrun(2, [refused, after], tmp_path)
    said = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2)]
    assert said[0] == said[1] and said[0]["type"] == "Refused" and "this prompt is not for me" in said[0]["text"]
    assert said[0]["threads"] == []
    assert [row["step"] for row in rows(tmp_path / "refused", "metrics")] == [1], (
        "the third is written during the second"
    )
    assert json.loads((tmp_path / "refused" / "run.json").read_text())["status"] == "failed"
    assert len(rows(tmp_path / "after", "metrics")) == 2


@pytest.mark.parametrize("name", ["plain", "in_parts"])
def test_a_server_that_dies_while_it_writes_ahead_gets_the_weights_again(name, by_two, two_models, tmp_path):
    with Restarted(two_models[0]) as stub:
        stub.seed = seed_of(by_two[0] / "plain", 2, -1)
        torchrun(2, [job(two_models, stub.url, tmp_path / "run", **RUNS[name])], tmp_path)
        assert stub.times == 0
        pushed = [path for path, _, _ in stub.asked].count("/collective_rpc")
    assert pushed == STEPS + 2, "once more than in a run without a fault"
    assert_same_run(tmp_path / "run", by_two[0] / name)


def test_a_server_that_stays_away_ends_both_in_the_same_sentence(by_two, two_models, tmp_path):
    with Restarted(two_models[0]) as stub:
        stub.seed, stub.stays_dead = seed_of(by_two[0] / "plain", 2, 0), True
        asks = job(two_models, stub.url, tmp_path / "run", server={"patience": 1.0}) | {"told": str(tmp_path / "told")}
        torchrun(2, [asks], tmp_path)
    said = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2)]
    assert said[0] == said[1] and said[0]["type"] == "ServerError" and said[0]["threads"] == []
    assert f"the student at {stub.url} cannot be reached" in said[0]["text"] and "--resume" in said[0]["text"]


def test_what_other_weights_wrote_is_written_again(two_models, tmp_path):
    """The teacher's weights are the ones that the student does not have: they are far enough from its own to be seen."""
    with Stub(two_models[0]) as stub:
        torchrun(2, [job(two_models, stub.url, tmp_path / "whole")], tmp_path)
    with Replaced(two_models[0]) as stub:
        stub.base = load_file(two_models[1] / "model.safetensors")
        stub.seed = seed_of(tmp_path / "whole", 2, 0)
        torchrun(2, [job(two_models, stub.url, tmp_path / "run")], tmp_path)
        assert stub.seed == -1
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# ------------------------------------------------------------------ going on


@pytest.mark.parametrize("name", ["plain", "in_parts"])
def test_a_killed_run_goes_on_to_the_same_bits(name, by_two, two_models, tmp_path):
    with Stub(two_models[0]) as stub:
        asks = job(two_models, stub.url, tmp_path / "run", **RUNS[name])
        answer = started(2, [asks | {"signal": [3, "SIGKILL"]}], tmp_path)
        assert answer.returncode != 0 and not rows(tmp_path / "run", "metrics")[3:]
        newest = checkpoint.checkpoints(tmp_path / "run")[-1]
        assert newest.name == "step-000002" and (newest / "training" / "ahead.safetensors").exists()
    with Stub(two_models[0], port=stub.port):
        torchrun(2, [asks | {"resume": True}], tmp_path)
    assert_same_bits(tmp_path / "run", by_two[0] / name)


def test_a_signal_to_one_process_stops_both_behind_a_step_and_they_go_on_to_the_same_bits(by_two, two_models, tmp_path):
    """What is written ahead by then is saved, and nothing is left at work."""
    with Stub(two_models[0]) as stub:
        asks = job(two_models, stub.url, tmp_path / "run", save={"every": 0})
        torchrun(2, [asks | {"signal": [2, "SIGTERM"], "told": str(tmp_path / "told")}], tmp_path)
        said = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2)]
        assert [one["type"] for one in said] == ["KeyboardInterrupt"] * 2 and not any(one["threads"] for one in said)
        assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["step-000002"]
        torchrun(2, [asks | {"resume": True}], tmp_path)
    assert_same_bits(tmp_path / "run", by_two[0] / "plain")


# ------------------------------------------------------------------ ways of the weights, and servers that the run starts


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_server_of_the_run_that_is_killed_while_it_writes_ahead_is_replaced(
    by_two, two_models, tmp_path, monkeypatch
):
    """A process of its own, killed by the kernel at a request of the background; the run ends with none left."""
    world = tmp_path / "world"
    monkeypatch.setenv("KIBITZ_TEST_FOLDER", str(world))
    monkeypatch.setenv("KIBITZ_VLLM", program(world))
    asks = job(two_models, "", tmp_path / "run") | {"at": [3, str(world / "die-student-0"), "/v1/completions"]}
    torchrun(2, [asks], tmp_path)
    begun = [json.loads(line) for line in (world / "student-0.started").read_text().splitlines()]
    assert len(begun) == 2, "the one that was killed and the one in its place"
    until = time.monotonic() + 60
    while (left := [pid for one in begun for pid in one["pids"] if alive(pid)]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left
    assert texts(tmp_path / "run") == texts(by_two[0] / "plain")


def test_a_student_in_parts_is_sent_by_nccl_while_nothing_is_written(by_two, two_models, tmp_path):
    """By the channel of `sync: nccl`, for which all processes gather each weight."""
    with Stub(two_models[0], bend=(receiver := Receiver())) as stub:
        receiver.stub = stub
        server = {"patience": 600.0, "sync": "nccl"}
        asks = job(two_models, stub.url, tmp_path / "run", server=server, parallel=IN_PARTS)
        torchrun(2, [asks | {"stand_in": True}], tmp_path)
        paths = [path for path, _, _ in stub.asked]
    assert paths.count("/finish_weight_update") == STEPS + 1 and "/collective_rpc" not in paths
    assert_same_run(tmp_path / "run", by_two[0] / "plain")


class Adapted(Stub):
    """Takes an adapter's folder as vLLM does, under its name."""

    adapter = ""

    def answer(self, path, body):
        if path == "/v1/load_lora_adapter":
            self.adapter = body["lora_name"]
            self.model = load_model(ModelConfig(model=body["lora_path"]), "stub", torch.device("cpu"))
            return {}
        if path == "/v1/completions" and body["model"] == self.adapter:
            return super().answer(path, body | {"model": self.name}) | {"model": self.adapter}
        return super().answer(path, body)


def test_adapters_are_loaded_while_nothing_is_written(two_models, tmp_path):
    """Each version of the adapter comes between the rollouts of two steps, of both processes."""
    lora = {"student": {"lora": {"rank": 4}}, "optim": {"lr": 0.02}}
    with Adapted(two_models[0]) as stub:
        train(job(two_models, stub.url, tmp_path / "one", **lora))
        stub.asked.clear()
        two = job(two_models, stub.url, tmp_path / "two", **lora)
        torchrun(2, [two, job(two_models, stub.url, tmp_path / "in_parts", parallel=IN_PARTS, **lora)], tmp_path)
        asked = [(path, body) for path, _, body in stub.asked]
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert_same_run(tmp_path / "in_parts", tmp_path / "one")
    told = {"/v1/load_lora_adapter": "weights", "/v1/completions": "rollouts"}
    kinds = [told[path] for path, body in asked if path in told and (body or {}).get("n", SAMPLES) == SAMPLES]
    first, more = ["weights", *["rollouts"] * 2 * PROMPTS], ["weights", *["rollouts"] * PROMPTS]
    assert kinds == [*first, *more, *more, "weights", "weights"] * 2, "of both runs"
    assert {row["sync"]["way"] for row in rows(tmp_path / "two", "metrics")} == {"lora"}
