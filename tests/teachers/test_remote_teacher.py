"""A teacher behind a server says what the same model says in this process; and nothing that cannot be is learnt from."""

import copy
import json
import random
import threading
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import language_model, make_model
from support.runs import recipe as small_recipe
from support.vllm_stub import Stub

import kibitz
from kibitz import config
from kibitz.batching import pack
from kibitz.config import RecipeError
from kibitz.config.servers import ServerConfig
from kibitz.config.teachers import RemoteTeacherConfig
from kibitz.engines.torch import TorchEngine, _Flight
from kibitz.losses.chunked import over_chunks
from kibitz.losses.criteria import Divergence
from kibitz.methods.candidates import student_top_k
from kibitz.servers import ServerError
from kibitz.servers.http import Servers
from kibitz.signals import Sampled, Scored
from kibitz.teachers import ScoreRequest
from kibitz.teachers.local import local_teacher
from kibitz.teachers.remote import GENERATE, RemoteScorer, Served, remote_teacher
from kibitz.training.setup import prepare
from kibitz.training.trainer import NullProgress, Trainer
from kibitz.types import Prompt, Sampling

PROMPTS = [Prompt(ids=(1, 5 + i, 6, 7), text="", key=str(i)) for i in range(4)]


@pytest.fixture(scope="module")
def student(two_models):
    return language_model(two_models[0])


@pytest.fixture(scope="module")
def rollouts(student):
    return TorchEngine(student).generate(PROMPTS, Sampling(max_tokens=9, stop_ids=(2,), num_samples=2))


@pytest.fixture
def teacher(student):
    with ExitStack() as stack:

        def make(stub, **section):
            made = remote_teacher(RemoteTeacherConfig(url=stub.url, **{"patience": 0.5, **section}), student.tokenizer)
            stack.callback(made.close)
            return made

        yield make


@pytest.mark.parametrize("path", ["generate", "completions"])
def test_numbers_are_those_of_the_same_model_in_this_process(two_models, rollouts, teacher, path):
    closed = (lambda p, a: (403, {"error": "scale-out is off"})) if path == "completions" else None
    local = local_teacher(language_model(two_models[1], "teacher"))
    with Stub(two_models[1], bend=lambda p, a: closed(p, a) if closed and "generate" in p else a) as stub:
        remote = teacher(stub)
        for ours, theirs in zip(
            *(t.scorer(ScoreRequest("sampled")).score(rollouts) for t in (local, remote)), strict=True
        ):
            assert torch.allclose(ours.logp_T, theirs.logp_T, atol=1e-5)
        for k in (1, 5, 10**6):
            ask = ScoreRequest("top_k", top_k=k)
            for rollout, ours, theirs in zip(
                rollouts, *(t.scorer(ask).score(rollouts) for t in (local, remote)), strict=True
            ):
                assert torch.equal(ours.ids_TK, theirs.ids_TK[:, :-1])
                assert torch.allclose(ours.logp_TK, theirs.logp_TK[:, :-1], atol=1e-5)
                assert theirs.ids_TK[:, -1].tolist() == rollout.response_ids


def test_the_students_tokens_give_the_loss_that_a_local_teacher_gives(two_models, student, rollouts, teacher):
    """support: top_k of the student needs the teacher's log-probabilities of the student's tokens: the loss, token for token,
    is that of a teacher whose whole distribution is at hand."""
    local = local_teacher(language_model(two_models[1], "teacher"))
    criterion, losses = Divergence(support="student", top_k=3), []
    with Stub(two_models[1]) as stub:
        ask = ScoreRequest("named", top_k=3, candidates=partial(student_top_k, student, 3, 999))
        for signals in (local.scorer(ScoreRequest("dense")).score(rollouts), teacher(stub).scorer(ask).score(rollouts)):
            batch = pack([Scored(r, r.weight_T(), s) for r, s in zip(rollouts, signals, strict=True)])
            _, values = student(batch, lambda h, head, b=batch: over_chunks(criterion, h, head, b.tokens, 64))
            losses.append(values["loss"])
        bodies = [body["sampling_params"] for path, _, body in stub.asked if "generate" in path]
    assert torch.allclose(*losses, atol=1e-5) and losses[0].mean() > 0.1
    assert all(len(body["prompt_logprob_token_ids"][0]) == 4 for body in bodies[-len(rollouts) :])


def test_a_confident_teacher_gives_the_same_loss(tmp_path, two_models, student, teacher):
    """The written token is named beside the K likeliest, and may be one of them: with p = 0.9 it must not count as 1.8."""
    sharp = make_model(tmp_path / "sharp", seed=0)
    weights = load_file(sharp / "model.safetensors")
    save_file(
        {**weights, "model.norm.weight": 3 * weights["model.norm.weight"]},
        sharp / "model.safetensors",
        {"format": "pt"},
    )
    own = language_model(sharp, "teacher")
    rollouts = TorchEngine(own).generate(PROMPTS, Sampling(max_tokens=9, stop_ids=(2,), num_samples=2))
    local, criterion, losses = local_teacher(own), Divergence(support="student", top_k=3), []
    with Stub(sharp) as stub:
        ask = ScoreRequest("named", top_k=3, candidates=partial(student_top_k, student, 3, 999))
        named = teacher(stub).scorer(ask).score(rollouts)
    for signals in (local.scorer(ScoreRequest("dense")).score(rollouts), named):
        batch = pack([Scored(r, r.weight_T(), s) for r, s in zip(rollouts, signals, strict=True)])
        _, values = student(batch, lambda h, head, b=batch: over_chunks(criterion, h, head, b.tokens, 64))
        losses.append(values["loss"])
    # A server tells K log-probabilities, and what is left of 1 after 0.999 has three digits less.
    assert torch.allclose(*losses, atol=1e-3) and losses[0].mean() > 0.1
    twice = [signal.logp_TK[(signal.ids_TK[:, 1:] == signal.ids_TK[:, :1]).any(-1), 0] for signal in named]
    assert torch.cat(twice).exp().max() > 0.8, "a written token that is likely, and among the student's likeliest"


def test_a_server_that_scores_no_named_tokens_falls_back_loudly(two_models, student, rollouts, teacher, caplog):
    with Stub(two_models[1], generous=False) as stub:
        signals = teacher(stub).scorer(ScoreRequest("named", top_k=3)).score(rollouts)
    assert "its own 3 likeliest take the place of the student's" in caplog.text
    assert all(signal.named and signal.ids_TK.shape[1] == 4 for signal in signals)


def test_what_is_scored_early_is_the_same(two_models, rollouts, teacher):
    with Stub(two_models[1]) as stub:
        scorer = teacher(stub).scorer(ScoreRequest("top_k", top_k=3))
        later = scorer.score(rollouts)
        stub.asked.clear()
        scorer.prefetch(rollouts[::-1])
        early = scorer.score(rollouts)
        assert len(stub.asked) == len(rollouts)
    assert all(
        torch.equal(a.logp_TK, b.logp_TK) and torch.equal(a.ids_TK, b.ids_TK) for a, b in zip(early, later, strict=True)
    )


def test_a_text_that_stands_twice_in_a_step_is_asked_about_once(two_models, rollouts, teacher):
    with Stub(two_models[1]) as stub:
        scorer = teacher(stub).scorer(ScoreRequest("top_k", top_k=3))
        stub.asked.clear()
        twice = scorer.score([*rollouts, *rollouts])
        assert len(stub.asked) == len(rollouts)
    for one, other in zip(twice[: len(rollouts)], twice[len(rollouts) :], strict=True):
        assert torch.equal(one.logp_TK, other.logp_TK)


def test_what_does_not_fit_is_refused_with_its_name(two_models, teacher, tmp_path):
    with Stub(two_models[1]) as stub:
        with pytest.raises(ServerError, match="serves stub and not qwen"):
            teacher(stub, model="qwen")
        with pytest.raises(ValueError, match="temperature 1"):
            teacher(stub).scorer(ScoreRequest("top_k", temperature=2.0))
        with pytest.raises(ValueError, match="--max-model-len"):
            teacher(stub).check(PROMPTS, 124)
        teacher(stub).check(PROMPTS, 123)
        stub.bend = lambda path, answer: {"tokens": [1]} if path == "/tokenize" else answer
        with pytest.raises(ServerError, match="other tokens than the student"):
            teacher(stub)
    base = small_recipe(two_models[0], None, tmp_path)
    with pytest.raises(RecipeError, match="write method.support=top_k"):
        config.load({**base, "teacher": {"url": "http://127.0.0.1:1"}})
    with pytest.raises(RecipeError, match="lets the teacher write"):
        config.load({**base, "teacher": {"url": "http://127.0.0.1:1"}, "method": {"type": "sft", "source": "teacher"}})


@pytest.mark.parametrize("method", [{"support": "top_k", "top_k": 5}, {"support": "top_k", "top_k": 5, "top_k_of": "teacher"},
                                    {"support": "sampled"}])  # fmt: skip
def test_training_goes_as_with_a_local_teacher(two_models, tmp_path, method):
    """The same seeds, the same losses: to 1e-4 over a few steps of learning."""
    losses = []
    with Stub(two_models[1]) as stub:
        for name, teacher in {"local": {"model": str(two_models[1])}, "remote": {"url": stub.url}}.items():
            tree = small_recipe(
                two_models[0], None, tmp_path / name, method={"type": "opd", **method}, eval={"num_prompts": 1}
            )
            losses.append([row["loss"] for row in kibitz.train({**tree, "teacher": teacher}).metrics])
    if method.get("top_k_of") != "teacher":  # there the server adds the written token to the K
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert len(losses[1]) == 4


def test_the_teacher_begins_while_others_are_still_written(two_models, tmp_path):
    """The last rollouts of a step are held back until the teacher has been asked about others: it would wait for ever if it
    were asked only when all are written. And the losses are those of the embedded order."""
    asked, held = threading.Event(), 0

    def hold(path, answer):
        nonlocal held
        if path == "/v1/completions" and student.asked[-1][2]["n"] == 2:
            with lock:
                held += 1
                mine = held
            if mine == 8 and not asked.wait(300):
                return 400, {"error": "the teacher was not asked"}
        return answer

    def notice(path, answer):
        if "generate" in path:
            asked.set()
        return answer

    lock = threading.Lock()
    with Stub(two_models[0], bend=hold) as student, Stub(two_models[1]) as teacher:
        tree = small_recipe(
            two_models[0], None, tmp_path / "run", steps=1,
            rollout={"engine": "vllm", "urls": [student.url]},
            method={"type": "opd", "support": "sampled"}, eval={"num_prompts": 1, "samples": 1},
        )  # fmt: skip
        teacher.bend = notice
        setup = prepare({**tree, "teacher": {"url": teacher.url}})
        asked.clear()
        Trainer(setup, NullProgress()).step()
        setup.close()
    assert held == 8 and asked.is_set()


def test_the_teacher_begins_beside_the_embedded_engine(two_models, tmp_path, monkeypatch):
    """The last rollouts of a step are held back until the teacher has been asked about others. Each text is asked about
    once, and the loss is that of a teacher that waits for all."""
    losses, asked, release = [], [], _Flight.release
    begun, seen = threading.Event(), []

    def hold(flight, done):
        if len(flight.rollouts) + len(done) == len(flight.jobs) == 16:  # 8 prompts of 2 samples
            seen.append(begun.wait(300 if not losses else 0))
        release(flight, done)

    def notice(path, answer):
        if "generate" in path:
            begun.set()
            asked.append(path)
        return answer

    for name in ("early", "late"):
        with Stub(two_models[1]) as teacher:
            tree = small_recipe(
                two_models[0], None, tmp_path / name, steps=1, rollout={"max_rows": 3},
                method={"type": "opd", "support": "sampled"}, eval={"num_prompts": 1, "samples": 1},
            )  # fmt: skip
            setup = prepare({**tree, "teacher": {"url": teacher.url}})
            trainer, teacher.bend = Trainer(setup, NullProgress()), notice
            begun.clear()
            asked.clear()
            with monkeypatch.context() as patch:
                patch.setattr(_Flight, "release", hold)
                trainer.step()
            setup.close()
            assert len(asked) <= 16
            losses.append(trainer.folder.metrics.read()[-1]["loss"])
        monkeypatch.setattr(RemoteScorer, "prefetch", lambda self, rollouts: None)
    assert seen == [True, False] and losses[0] == losses[1]


def test_the_pass_that_names_tokens_is_the_students(two_models, tmp_path):
    """A server is asked about the student's likeliest tokens, which takes one more pass of the student: a third of what
    forward and backward cost. What the teacher's server computes nobody knows."""
    flops = []
    with Stub(two_models[1]) as stub:
        for of in ("student", "teacher"):
            method = {"type": "opd", "support": "top_k", "top_k": 5, "top_k_of": of}
            tree = small_recipe(two_models[0], None, tmp_path / of, steps=1, method=method, eval={"num_prompts": 1})
            flops.append(kibitz.train({**tree, "teacher": {"url": stub.url}}).metrics[0]["flops"])
    assert flops[0]["student_training"] == pytest.approx(4 / 3 * flops[1]["student_training"])
    assert all(row.keys() == {"student_training", "student_sampling"} for row in flops)


# ------------------------------------------------------------------ answers that cannot be

VALUES = [
    None,
    True,
    float("nan"),
    float("inf"),
    -float("inf"),
    1e30,
    -1e30,
    10**300,
    "x",
    "-1.0",
    [],
    {},
    [1],
    {"a": 1},
    5,
    0.5,
]


def bend_somewhere(tree, rng: random.Random):
    """One random mutation: a value replaced, dropped, doubled or put in another place; or the text of it cut or smeared."""
    if rng.random() < 0.15:
        data = json.dumps(tree).encode()
        cut = rng.randrange(len(data))
        return data[:cut] if rng.random() < 0.5 else data[:cut] + bytes([rng.randrange(256)]) + data[cut + 1 :]
    tree = copy.deepcopy(tree)
    places = []

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(tree)
    node, key = rng.choice(places)
    match rng.randrange(5):
        case 0 | 1:
            node[key] = rng.choice(VALUES)
        case 2:
            del node[key]
        case 3 if isinstance(node, list):
            node.insert(key, copy.deepcopy(node[key]))
        case 4 if isinstance(node[key], float):
            node[key] = -node[key]
        case _ if isinstance(node, dict):
            node[rng.choice(["-1", "999999", "x", "", "7" * 5000])] = node.pop(key)
        case _:
            node[key] = rng.choice(VALUES)
    return tree


@pytest.mark.parametrize("kind", ["top_k", "sampled", "named"])
def test_no_mutated_answer_trains_silently(two_models, student, rollouts, teacher, kind):
    """100 mutations for each kind of question, 300 in all: either a sentence with the address, or numbers that are within the
    truth, because what was changed says nothing of them (a rank, a decoded token, the text of a choice)."""
    rng, refused = random.Random(kind), 0
    ask, one = ScoreRequest(kind, top_k=3, candidates=partial(student_top_k, student, 3, 999)), rollouts[:1]
    with Stub(two_models[1]) as stub:
        for number in range(101):
            servers = Servers(ServerConfig(patience=0), [stub.url], "teacher")
            scorer = RemoteScorer(Served(servers, "stub", student.vocab_size, None, GENERATE, True), ask)
            caught = None
            try:
                (signal,) = scorer.score(one)
            except ServerError as error:
                caught = error
            servers.close()
            if number == 0:
                truth = signal
                stub.bend = lambda path, answer: bend_somewhere(answer, rng)
            elif caught is not None:
                assert stub.url in str(caught) and str(caught).isprintable()
                refused += 1
            else:
                assert num_wrong_rows(signal, truth) <= 1, "a mutation touches one number, and no other token's"
    assert refused > 20


def num_wrong_rows(signal, truth) -> int:
    ours, theirs = ((s.logp_T[:, None] if isinstance(s, Sampled) else s.logp_TK) for s in (signal, truth))
    assert ours.shape == theirs.shape and ours.isfinite().all() and (ours <= 0).all()
    return int(((ours - theirs).abs() > 1e-3).any(-1).sum())


def test_a_teacher_that_writes_0_for_everything_trains_nothing(two_models, tmp_path):
    """`sampled` has one number a token, and certainty about all of them is no teacher's."""

    def zeros(path, answer):
        for row in (answer.get("prompt_logprobs") or []) if isinstance(answer, dict) else []:
            for entry in (row or {}).values():
                entry |= {"logprob": 0.0, "rank": 1}
        return answer

    with Stub(two_models[1], bend=zeros) as stub:
        tree = small_recipe(
            two_models[0], None, tmp_path / "run", method={"type": "opd", "support": "sampled"}, steps=1
        )
        with pytest.raises(ServerError, match=f"{stub.url} finds every token certain"):
            kibitz.train({**tree, "teacher": {"url": stub.url}})
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not metrics.exists() or metrics.read_text() == ""
