"""Servers over HTTP: requests that are tried again, keys that stay secret, rollouts from vLLM and the weights that go there.

The server is a thread of this process with a real model behind it (tests/vllm_stub.py); tests/test_vllm.py asks vLLM's own.
"""

import logging
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml
from support.models import language_model
from support.runs import recipe
from support.vllm_stub import Stub

import kibitz
from kibitz import config
from kibitz.config import RecipeError, RolloutConfig
from kibitz.config.servers import ServerConfig, checked_url
from kibitz.engines.sync import score
from kibitz.engines.vllm import VLLMEngine
from kibitz.servers import ServerError
from kibitz.servers.http import Server, Servers
from kibitz.servers.keys import api_key
from kibitz.types import Prompt, Sampling

PROMPTS = [Prompt(ids=(1, 5 + i, 6, 7), text="", key=str(i)) for i in range(6)]
SAMPLING = Sampling(max_tokens=12, num_samples=3, stop_ids=(2,), seed=5)


@pytest.fixture
def engine():
    """Makes engines, and closes them."""
    with ExitStack() as stack:

        def make(urls: list[str], folder: Path, out: Path, **server) -> VLLMEngine:
            section = RolloutConfig(engine="vllm", urls=urls, server={"patience": 5, **server})
            made = VLLMEngine(language_model(folder), section, out, PROMPTS[:2])
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def asking():
    """Makes `Servers`, and closes them."""
    with ExitStack() as stack:

        def make(url: str, **section) -> Servers:
            made = Servers(ServerConfig(**section), [url], "teacher")
            stack.callback(made.close)
            return made

        yield make


def ask(server: Server):
    return server.ask("/v1/models")


# ------------------------------------------------------------------ requests


def test_an_address_holds_nothing_secret_and_nothing_strange():
    assert checked_url("http://127.0.0.1:8000/v1/") == "http://127.0.0.1:8000"
    for secret in ("http://me:hunter2@host", "http://host?key=hunter2", "https://hunter2@host/v1"):
        with pytest.raises(RecipeError, match="KIBITZ_API_KEY") as caught:
            config.load({"student": {"model": "s"}, "data": {"world": "arithmetic"},
                         "rollout": {"engine": "vllm", "urls": [secret]}})  # fmt: skip
        assert "hunter2" not in str(caught.value)
    for strange in (
        "",
        "host:8000",
        "file:///etc/passwd",
        "http://",
        "http://a b",
        "http://h\x1b[31m",
        "http://h:99999999",
    ):
        with pytest.raises(ValueError, match="not the address of a server"):
            checked_url(strange)


def test_keys_come_from_the_environment_and_openai_gets_only_its_own(monkeypatch):
    monkeypatch.delenv("KIBITZ_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    assert api_key("https://api.openai.com") == "sk-openai"
    for other in ("http://api.openai.com", "https://api.openai.com.evil.org", "http://127.0.0.1:8000"):
        assert api_key(other) is None
    monkeypatch.setenv("KIBITZ_API_KEY", "sk-kibitz")
    assert api_key("http://127.0.0.1:8000") == "sk-kibitz"


def test_a_key_is_sent_and_never_repeated(engine, two_models, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("KIBITZ_API_KEY", "sk-very-secret")

    def bend(path, answer):
        return (401, {"error": {"message": "bad key sk-very-secret \x1b[31m"}}) if path == "/v1/completions" else answer

    with Stub(two_models[0], bend=bend) as stub:
        with pytest.raises(ServerError, match=r"refused .*bad key \*\*\*") as caught:
            engine([stub.url], two_models[0], tmp_path).generate(PROMPTS, SAMPLING)
        assert all(headers["Authorization"] == "Bearer sk-very-secret" for _, headers, _ in stub.asked)
    assert "sk-very-secret" not in str(caught.value) + caplog.text and "\x1b" not in str(caught.value)


def test_no_file_of_a_run_holds_the_key(two_models, tmp_path, monkeypatch):
    monkeypatch.setenv("KIBITZ_API_KEY", "sk-very-secret")
    with Stub(two_models[0]) as stub:
        rollout = {"engine": "vllm", "urls": [stub.url]}
        kibitz.train(recipe(two_models[0], two_models[1], tmp_path / "run", rollout=rollout, steps=1))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(b"sk-very-secret" in path.read_bytes() for path in files)


def test_failures_that_pass_are_tried_again_and_others_are_not(asking, two_models, caplog):
    failures = iter([(503, {"error": "loading"}), None, (500, {}), b'{"data": [', (429, {"detail": "slow down"})])
    with Stub(two_models[0], bend=lambda path, answer: next(failures, answer)) as stub:
        servers = asking(stub.url, patience=600)
        with caplog.at_level(logging.WARNING):
            (answer,) = servers.gather([servers.submit(ask)])
        assert answer["data"][0]["id"] == "stub" and len(stub.asked) == 6
        assert "answered 503: loading" in caplog.text and "is back" in caplog.text
        stub.bend = lambda path, answer: (400, {"error": {"message": "no such thing"}})
        with pytest.raises(ServerError, match="the teacher at http://127.0.0.1:.* refused /v1/models: no such thing"):
            servers.gather([servers.submit(ask)])
        assert len(stub.asked) == 7


def test_a_server_that_stays_down_is_named(asking, two_models):
    with Stub(two_models[0]) as stub:
        url = stub.url
    servers = asking(url, patience=0.6)
    with pytest.raises(ServerError, match=f"the teacher at {url} cannot be reached.*for 0.6 seconds.*--resume"):
        servers.gather([servers.submit(ask)])


def test_a_server_that_breaks_off_every_time_is_named(asking, two_models):
    with Stub(two_models[0], bend=lambda path, answer: b'{"data"') as stub:
        servers = asking(stub.url, patience=5)
        with pytest.raises(ServerError, match="not JSON, or that breaks off.*3 times in a row"):
            servers.gather([servers.submit(ask)])


def test_a_server_that_is_too_slow_is_named(asking, two_models):
    with Stub(two_models[0], bend=lambda path, answer: time.sleep(1.0) or answer) as stub:
        servers = asking(stub.url, patience=0.2, timeout=0.2)
        with pytest.raises(ServerError, match="did not answer in time"):
            servers.gather([servers.submit(ask)])


def test_a_mistake_ends_the_other_requests(asking, two_models):
    over = threading.Event()

    def bend(path, answer):
        if len(stub.asked) > 1:  # under way, or sent before the mistake is heard of: it would take ever so long
            over.wait(600)
        return (400, {"error": "no"})

    with Stub(two_models[0], bend=bend) as stub:
        servers = asking(stub.url, in_flight=1)
        with pytest.raises(ServerError, match="refused"):
            servers.gather([servers.submit(ask) for _ in range(50)])
        assert len(stub.asked) <= 2
        over.set()
        servers.close()


def test_a_mistake_ends_those_who_wait_in_other_threads(asking, two_models):
    """One thread's mistake closes the servers; another one's requests, which had not begun, and its later ones, are not answered:
    it hears of that, and does not wait for ever."""
    begun, answers, over = threading.Event(), threading.Event(), threading.Event()

    def bend(path, answer):
        wait = answers if not begun.is_set() else over
        begun.set()
        wait.wait(600)
        return (400, {"error": "no"})

    with Stub(two_models[0], bend=bend) as stub:
        servers, heard = asking(stub.url, in_flight=1), []
        first = servers.submit(ask)
        assert begun.wait(300)
        others = [servers.submit(ask) for _ in range(3)]

        def wait() -> None:
            with pytest.raises(ServerError, match="is not asked any more") as caught:
                servers.gather(others)
            heard.append(str(caught.value))

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        answers.set()
        with pytest.raises(ServerError, match="refused"):
            servers.gather([first])
        thread.join(300)
        assert len(heard) == 1
        with pytest.raises(ServerError, match="is not asked any more"):
            servers.gather([servers.submit(ask)])
        over.set()


# ------------------------------------------------------------------ rollouts


def test_rollouts_come_in_the_order_of_the_prompts_whoever_wrote_them(engine, two_models, tmp_path):
    def slow(path, answer):  # the first prompts last
        time.sleep(0.02 if path == "/v1/completions" else 0.0)
        return answer

    with Stub(two_models[0]) as one, Stub(two_models[0], bend=slow) as other:
        both = engine([one.url, other.url], two_models[0], tmp_path / "both")
        rollouts = both.generate(PROMPTS, SAMPLING)
        assert [(r.prompt.key, r.sample) for r in rollouts] == [(p.key, s) for p in PROMPTS for s in range(3)]
        for stub in (one, other):
            assert (
                sum("seed" in body and body["n"] == 3 for path, _, body in stub.asked if path == "/v1/completions") >= 2
            )
        alone = engine([one.url], two_models[0], tmp_path / "alone").generate(PROMPTS[3:5], SAMPLING)
        assert [r.response_ids for r in alone] == [r.response_ids for r in rollouts[9:15]]
    theirs_T = torch.cat([r.logp_T for r in rollouts])
    assert torch.allclose(score(language_model(two_models[0]), rollouts), theirs_T, atol=1e-4)
    assert {r.finished for r in rollouts} == {True, False}
    assert all(r.finished == (r.response_ids[-1] == 2) for r in rollouts)


def test_each_server_is_met_once(engine, two_models, tmp_path):
    with Stub(two_models[0]) as one, Stub(two_models[0]) as other:
        writer = engine([one.url, other.url], two_models[0], tmp_path)
        writer.generate(PROMPTS, SAMPLING)
        for stub in (one, other):
            assert [path for path, _, _ in stub.asked].count("/v1/models") == 1


def test_rollouts_are_ready_prompt_by_prompt_and_counted_together(engine, two_models, tmp_path):
    with Stub(two_models[0]) as stub:
        writer, ready, read = engine([stub.url], two_models[0], tmp_path), [], []
        written = writer.generate(
            PROMPTS, SAMPLING, ready.append, lambda model, rollouts: read.append((model, rollouts))
        )
    assert sorted(len(group) for group in ready) == [3] * len(PROMPTS)
    assert sorted(id(r) for group in ready for r in group) == sorted(map(id, written))
    assert read == [(writer.student, written)]


def test_another_seed_or_prompt_key_gives_other_requests(engine, two_models, tmp_path):
    with Stub(two_models[0]) as stub:
        writer = engine([stub.url], two_models[0], tmp_path)
        writer.generate(PROMPTS, SAMPLING)
        first = {body["seed"] for path, _, body in stub.asked if path == "/v1/completions"}
        stub.asked.clear()
        writer.generate(PROMPTS, Sampling(max_tokens=12, stop_ids=(2,), seed=6))
        second = {body["seed"] for path, _, body in stub.asked if path == "/v1/completions"}
    assert len(first) == 7 and len(second) == 6 and not first & second  # the probe's is the seventh


def test_truncated_rollouts_need_log_probs_of_what_was_sampled_from(engine, two_models, tmp_path):
    def raw(path, answer):  # a server in raw mode tells the probability before truncation
        if path == "/v1/completions":
            for choice in answer["choices"]:
                choice["logprobs"]["token_logprobs"] = [-0.5] * len(choice["token_ids"])
        return answer

    sampling = Sampling(max_tokens=4, top_k=5, stop_ids=(2,))
    with Stub(two_models[0]) as stub:
        assert engine([stub.url], two_models[0], tmp_path / "a").generate(PROMPTS, sampling)
        writer = engine([stub.url], two_models[0], tmp_path / "b")
        writer.generate(PROMPTS, SAMPLING)
        stub.bend = raw
        with pytest.raises(ServerError, match="--logprobs-mode processed_logprobs, or write rollout.temperature=1"):
            writer.generate(PROMPTS, sampling)


@pytest.mark.parametrize(
    ("bend", "sentence"),
    [
        (lambda c: c.update(index=7), "numbered a response 7 of 3"),
        (lambda c: c.update(token_ids=None), "text without token ids"),
        (lambda c: c.update(token_ids=[]), "wrote 0 tokens where 1 to 12"),
        (lambda c: c.update(token_ids=[3] * 99), "wrote 99 tokens where 1 to 12"),
        (lambda c: c.update(token_ids=[10**9]), "it serves another model"),
        (lambda c: c.update(token_ids=[True]), "where token ids should be"),
        (lambda c: c.update(token_ids=[2, 3], logprobs={"token_logprobs": [-1, -1]}), "wrote on behind a stop token"),
        (lambda c: c.update(token_ids=[3], logprobs={"token_logprobs": [-1]}), "--max-model-len"),
        (lambda c: c.update(logprobs=None), "logprobs should be an object"),
        (lambda c: c["logprobs"].update(token_logprobs=[-1.0]), "log-probabilities should be"),
        (lambda c: c["logprobs"].update(token_logprobs=[float("nan")] * len(c["token_ids"])), "sent nan where"),
        (lambda c: c["logprobs"].update(token_logprobs=[3.5] * len(c["token_ids"])), "above 0"),
    ],
)
def test_rollouts_that_cannot_be_are_refused(engine, two_models, tmp_path, bend, sentence):
    def bent(path, answer):
        if path == "/v1/completions" and len(answer["choices"]) == 3:
            bend(answer["choices"][1])
        return answer

    sampling = Sampling(max_tokens=12, num_samples=3, stop_ids=(2,), seed=1)
    with Stub(two_models[0], bend=bent) as stub, pytest.raises(ServerError, match=sentence) as caught:
        engine([stub.url], two_models[0], tmp_path).generate(PROMPTS, sampling)
    assert stub.url in str(caught.value)


def test_what_vllm_cannot_do_is_refused_in_the_recipe(two_models, tmp_path):
    base = recipe(two_models[0], two_models[1], tmp_path)
    for rollout, sentence in (
        ({"urls": ["http://127.0.0.1:1"]}, "urls belong to engine: vllm"),
        ({"engine": "vllm", "urls": ["http://127.0.0.1:1"], "epsilon": 0.1}, "drop rollout.epsilon"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            config.load({**base, "rollout": {**base["rollout"], **rollout}})


# ------------------------------------------------------------------ weights


def test_new_weights_arrive_and_are_looked_at(engine, two_models, tmp_path):
    with Stub(two_models[0]) as one, Stub(two_models[0]) as other:
        writer = engine([one.url, other.url], two_models[0], tmp_path)
        writer.sync(new := language_model(two_models[1]))
        rollouts = writer.generate(PROMPTS, SAMPLING)
        assert torch.allclose(score(new, rollouts), torch.cat([r.logp_T for r in rollouts]), atol=1e-4)
        salts = {body["cache_salt"] for path, _, body in one.asked if path == "/v1/completions"}
        writer.sync(new)
        writer.generate(PROMPTS, SAMPLING)
        later = {body["cache_salt"] for path, _, body in one.asked if path == "/v1/completions"} - salts
    assert len(later) == 1, "the prefix cache of old weights must not be found again"
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["version-000002"]


def test_a_server_that_keeps_old_weights_stops_the_run(engine, two_models, tmp_path):
    with Stub(two_models[0]) as stub:
        writer = engine([stub.url], two_models[0], tmp_path)
        writer.generate(PROMPTS, SAMPLING)
        stub.loads = False
        with pytest.raises(ServerError, match=f"the student at {stub.url} does not hold the student's weights"):
            writer.sync(language_model(two_models[1]))


def test_a_small_step_that_did_not_arrive_is_seen_too(engine, two_models, tmp_path):
    """Smaller than the tolerance: the server's answers are the very same, and the student's own moved."""
    student = language_model(two_models[0])
    with Stub(two_models[0]) as stub:
        writer = engine([stub.url], two_models[0], tmp_path)
        writer.sync(student)
        stub.loads = False
        writer.sync(student)  # nothing has changed: nothing is wrong
        with torch.no_grad():
            for parameter in student.model.parameters():
                parameter.mul_(1 + 1e-3)  # the embedding of padding stays 0
        with pytest.raises(ServerError, match="kept its old weights"):
            writer.sync(student)


def test_a_server_that_lost_its_weights_gets_them_again(engine, two_models, tmp_path):
    """Killed and started again it holds the base: no rollout may come from that."""
    new = language_model(two_models[1])
    with Stub(two_models[0]) as stub:
        port = stub.port
        writer = engine([stub.url], two_models[0], tmp_path, patience=600)
        writer.sync(new)
        before = writer.generate(PROMPTS, SAMPLING)
    with pytest.raises(OSError, match="refused"):
        __import__("socket").create_connection(("127.0.0.1", port))
    found = []
    thread = threading.Thread(target=lambda: found.extend(writer.generate(PROMPTS, SAMPLING)))
    thread.start()
    with Stub(two_models[0], port=port):
        thread.join(600)
    assert [r.response_ids for r in found] == [r.response_ids for r in before]
    assert torch.allclose(score(new, found), torch.cat([r.logp_T for r in found]), atol=1e-4)


def test_a_model_that_is_not_served_is_named(engine, two_models, tmp_path):
    with Stub(two_models[0]) as stub:
        with pytest.raises(ServerError, match="serves stub and not qwen"):
            engine([stub.url], two_models[0], tmp_path, model="qwen")
        with pytest.raises(ValueError, match="lora carries an adapter"):
            engine([stub.url], two_models[0], tmp_path, sync="lora")


def test_training_on_a_servers_rollouts(two_models, tmp_path):
    """The embedded engine and a server with the same weights teach the same things: both runs lower the divergence."""
    runs = {}
    with Stub(two_models[0]) as stub:
        for name, rollout in {"torch": {}, "vllm": {"engine": "vllm", "urls": [stub.url]}}.items():
            tree = recipe(two_models[0], two_models[1], tmp_path / name, rollout=rollout, optim={"lr": 0.02}, steps=6)
            runs[name] = kibitz.train(tree)
    for run in runs.values():
        losses = [row["loss"] for row in run.metrics]
        assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    saved = yaml.safe_load((tmp_path / "vllm" / "recipe.yaml").read_text())
    assert saved["rollout"]["urls"] == [stub.url]
