"""What becomes of a run when a server of it is killed, hangs, sleeps, or comes back with other weights. The servers are stubs in
threads; those of tests/servers/test_hosted.py are processes."""

import logging
import threading
import time
from contextlib import ExitStack

import pytest
import torch
from safetensors.torch import load_file
from support.models import language_model, make_model
from support.vllm_stub import Stub

from kibitz.config import RolloutConfig
from kibitz.config.teachers import RemoteTeacherConfig
from kibitz.engines.sync import score
from kibitz.engines.untied import HEAD, add_head, untied_start
from kibitz.engines.vllm import VLLMEngine
from kibitz.servers import ServerError
from kibitz.signals import TopK
from kibitz.teachers import ScoreRequest
from kibitz.teachers.remote import remote_teacher
from kibitz.types import Prompt, Sampling

PROMPTS = [Prompt(ids=(1, 5 + i, 6, 7), text="", key=str(i)) for i in range(9)]
SAMPLING = Sampling(max_tokens=6, num_samples=2, stop_ids=(2,), seed=5)


@pytest.fixture
def engine(tmp_path):
    """Makes engines, and closes them."""
    with ExitStack() as stack:

        def make(stubs: list[Stub], folder, **server) -> VLLMEngine:
            section = RolloutConfig(
                engine="vllm", urls=[stub.url for stub in stubs], server={"patience": 600, **server}
            )
            made = VLLMEngine(language_model(folder), section, tmp_path / "run", PROMPTS[:2])
            stack.callback(made.close)
            return made

        yield make


def asked(stub: Stub, *paths: str) -> list[str]:
    return [path for path, _, body in stub.asked if path in paths and (path != "/v1/completions" or body["n"] == 2)]


def texts(rollouts) -> list[list[int]]:
    return [rollout.response_ids for rollout in rollouts]


def test_one_of_three_gone_neither_ends_the_sync_nor_the_rollouts(engine, two_models, caplog):
    new = language_model(two_models[1])
    with Stub(two_models[0]) as one, Stub(two_models[0]) as two:
        third = Stub(two_models[0])
        with third:
            writer = engine([one, two, third], two_models[0])
            writer.generate(PROMPTS, SAMPLING)
            third.bend = lambda path, answer: None  # what is connected already is cut off, too
        writer.sync(new)
        rollouts = writer.generate(PROMPTS, SAMPLING)
        assert "gets what is new when it is back" in caplog.text
        assert torch.allclose(score(new, rollouts), torch.cat([r.logp_T for r in rollouts]), atol=1e-4)
        with Stub(two_models[0], port=third.port) as back:
            until = time.monotonic() + 600
            while not asked(back, "/v1/completions") and time.monotonic() < until:
                assert texts(writer.generate(PROMPTS, SAMPLING)) == texts(rollouts)
            assert asked(back, "/collective_rpc", "/v1/completions")[0] == "/collective_rpc", "weights before rollouts"


def test_servers_are_synced_at_the_same_time(engine, two_models):
    """Each holds its answer until the other is asked, too."""
    met = threading.Barrier(2, timeout=300)

    def wait(path, answer):
        if path == "/collective_rpc":
            met.wait()
        return answer

    with Stub(two_models[0], bend=wait) as one, Stub(two_models[0], bend=wait) as two:
        writer = engine([one, two], two_models[0])
        writer.sync(language_model(two_models[1]))
        row = writer.metrics()["sync"]
        assert row["way"] == "reload" and {"publish_seconds", "push_seconds", "probe_seconds"} < row.keys()
        assert "sync" not in writer.metrics()


def test_rollouts_of_other_weights_are_written_again(engine, two_models, caplog):
    """A server is started again between the probe and the rollouts, with its base, and nobody noticed: no request had failed."""
    student = language_model(two_models[1])
    with Stub(two_models[0]) as stub:
        writer = engine([stub], two_models[0])
        writer.sync(student)
        expected = texts(writer.generate(PROMPTS, SAMPLING))
        stub.model.model.load_state_dict(load_file(two_models[0] / "model.safetensors"), strict=False)
        with caplog.at_level(logging.WARNING):
            rollouts = writer.generate(PROMPTS, SAMPLING)
        assert "does not hold the student's weights any more" in caplog.text
        assert texts(rollouts) == expected
        assert torch.allclose(score(student, rollouts), torch.cat([r.logp_T for r in rollouts]), atol=1e-4)


def test_a_server_that_will_not_keep_the_weights_ends_the_run(engine, two_models):
    student = language_model(two_models[1])
    base = load_file(two_models[0] / "model.safetensors")
    with Stub(two_models[0]) as stub:
        writer = engine([stub], two_models[0])
        writer.sync(student)

        def forget(path, answer):
            if path == "/v1/completions" and len(answer["choices"]) == 1:  # after it answered the probe
                stub.model.model.load_state_dict(base, strict=False)
            return answer

        stub.bend = forget
        writer.weights.forget(writer.servers.servers[0])
        with pytest.raises(ServerError, match=f"the student at {stub.url}.*(3 times in a row|does not hold)"):
            writer.generate(PROMPTS, SAMPLING)


def test_a_server_that_hangs_is_left_to_the_others(engine, two_models, caplog):
    """The one that keeps a request is asked no more for as long as a request may take; what it kept is asked of the other."""
    hangs, over = threading.Event(), threading.Event()

    def hang(path, answer):
        if hangs.is_set() and path == "/v1/completions":
            over.wait(600)
        return answer

    with Stub(two_models[0], bend=hang) as bad, Stub(two_models[0]) as good:
        writer = engine([bad, good], two_models[0], in_flight=2)
        expected = texts(writer.generate(PROMPTS, SAMPLING))
        first = writer.servers.servers[0]
        first.timeout = first._connection._timeout = 1.0  # the other one may be slow, on a machine in use
        hangs.set()
        before = len(asked(bad, "/v1/completions"))
        assert texts(writer.generate(PROMPTS, SAMPLING)) == expected
        assert "did not answer in time" in caplog.text and "others do its work" in caplog.text
        assert len(asked(bad, "/v1/completions")) - before <= 4, "of nine prompts, those that were under way"
        over.set()


def test_servers_sleep_while_others_work_and_wake_before_weights_and_prompts(engine, two_models):
    with Stub(two_models[0]) as stub:
        writer = engine([stub], two_models[0], sleep=True)
        writer.generate(PROMPTS[:1], SAMPLING)
        writer.sync(language_model(two_models[1]))
        writer.generate(PROMPTS[:1], SAMPLING)
        writer.generate(PROMPTS[:1], SAMPLING)
        order = asked(stub, "/sleep", "/wake_up", "/collective_rpc", "/v1/completions")
    assert order == ["/collective_rpc", "/v1/completions", "/sleep", "/wake_up", "/collective_rpc", "/v1/completions", "/sleep",
                     "/wake_up", "/v1/completions", "/sleep"]  # fmt: skip


def test_a_teacher_sleeps_between_two_scorings(two_models):
    student = language_model(two_models[0])
    from kibitz.engines.torch import TorchEngine

    rollouts = TorchEngine(student).generate(PROMPTS[:2], SAMPLING)
    with Stub(two_models[1]) as stub:
        teacher = remote_teacher(RemoteTeacherConfig(url=stub.url, sleep=True), student.tokenizer)
        try:
            scorer = teacher.scorer(ScoreRequest("top_k", top_k=4))
            assert all(isinstance(signal, TopK) for _ in range(2) for signal in scorer.score(rollouts))
        finally:
            teacher.close()
        order = [
            path for path, _, body in stub.asked if path in ("/sleep", "/wake_up") or "prompt_logprobs" in str(body)
        ]
    kinds = [path for path in order if path in ("/sleep", "/wake_up")]
    assert kinds == ["/sleep", "/wake_up", "/sleep", "/wake_up", "/sleep"]
    assert order[-6:-1] == ["/wake_up", *["/inference/v1/generate"] * 4]


def test_a_server_that_cannot_sleep_says_what_it_needs(engine, two_models):
    def refuse(path, answer):
        return (404, {"detail": "Not Found"}) if path == "/sleep" else answer

    with Stub(two_models[0], bend=refuse) as stub, pytest.raises(ServerError, match="--enable-sleep-mode"):
        engine([stub], two_models[0], sleep=True).generate(PROMPTS[:1], SAMPLING)


def test_a_tied_student_is_sent_with_its_output_head(engine, tmp_path):
    """From the start and at each sync: the embeddings stand in the folder twice, under the name that an untied model has."""
    folder = make_model(tmp_path / "tied", kind="llama", tie_word_embeddings=True)
    assert HEAD not in load_file(folder / "model.safetensors")
    section = type("Section", (), {"model": str(folder), "trust_remote_code": False})()
    start = untied_start(section, tmp_path / "weights")
    student = language_model(folder)
    with Stub(type(folder)(start)) as stub:
        assert not stub.model.model.config.tie_word_embeddings
        writer = engine([stub], folder)
        writer.sync(student)
        written = load_file(next((tmp_path / "run" / "weights").glob("version-*")) / "output-head.safetensors")
        assert torch.equal(written[HEAD], student.model.get_input_embeddings().weight.detach())
    add_head(writer.weights.carrier.folder.path)  # a second time changes nothing
    assert len(list(writer.weights.carrier.folder.path.glob("*.safetensors"))) == 2
