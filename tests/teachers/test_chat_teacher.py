"""A teacher of which only text can be had, behind a real HTTP server in a thread."""

from pathlib import Path
from typing import Any

import pytest
from support.chat_stub import Endpoint, says
from support.models import tokenizer
from support.runs import recipe
from support.tokenizers_zoo import zoo

import kibitz
from kibitz.config import RecipeError, load
from kibitz.config.teachers import ChatTeacherConfig
from kibitz.servers import ServerError
from kibitz.servers.http import Server
from kibitz.teachers import ScoreRequest
from kibitz.teachers.chat import as_text, chat_teacher
from kibitz.types import Prompt, Sampling


def teacher_at(url: str, **settings: Any):
    return chat_teacher(ChatTeacherConfig(chat=url, patience=0.0, **settings), tokenizer())


BRIEF = {"role": "system", "content": "Be short."}
PROMPTS = [
    Prompt(ids=(3,), text="1+2", key="a", messages=(BRIEF, {"role": "user", "content": "1+2"})),
    Prompt(ids=(4,), text="2*3", key="b"),
]  # fmt: skip


def test_messages_go_out_as_they_are_and_text_comes_back_as_the_students_tokens():
    with Endpoint(lambda body: says(f"{body['messages'][-1]['content']}=3")) as endpoint:
        teacher = teacher_at(endpoint.url)
        rollouts = teacher.writer(lambda _: pytest.fail("no model is loaded")).generate(
            PROMPTS, Sampling(max_tokens=9, num_samples=2, temperature=0.7, top_p=0.9, seed=5)
        )
        teacher.close()
    assert [(r.prompt.key, r.sample) for r in rollouts] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    tok = tokenizer()
    assert tok.decode(rollouts[0].response_ids, skip_special_tokens=True).replace(" ", "") == "1+2=3"
    assert all(r.finished and r.response_ids[-1] == tok.eos_token_id for r in rollouts)
    assert all(r.logp_T.tolist() == [0.0] * r.num_tokens for r in rollouts)
    by_text = {body["messages"][-1]["content"]: body for body in endpoint.asked}
    assert by_text["1+2"]["messages"][0] == {"role": "system", "content": "Be short."}
    assert by_text["2*3"]["messages"] == [{"role": "user", "content": "2*3"}]
    assert {(b["model"], b["temperature"], b["top_p"], b["max_tokens"]) for b in endpoint.asked} == {
        ("big", 0.7, 0.9, 9)
    }
    assert len({body["seed"] for body in endpoint.asked}) == 4


def test_the_same_step_asks_for_the_same_samples():
    with Endpoint(lambda body: says(str(body["seed"] % 10))) as endpoint:
        engine = teacher_at(endpoint.url).writer(lambda _: None)
        first, again, other = (engine.generate(PROMPTS, Sampling(max_tokens=4, seed=seed)) for seed in (1, 1, 2))
    assert [r.response_ids for r in first] == [r.response_ids for r in again]
    assert [r.response_ids for r in first] != [r.response_ids for r in other]


def test_what_was_cut_off_has_no_invented_end():
    answers = iter([says("1+2+3", "length"), says("1+2+3+4+5")])
    with Endpoint(lambda _: next(answers)) as endpoint:
        engine = teacher_at(endpoint.url, in_flight=1).writer(lambda _: None)
        by_server, by_us = engine.generate(PROMPTS, Sampling(max_tokens=5))
    eos = tokenizer().eos_token_id
    assert not by_server.finished
    assert not by_us.finished
    assert by_us.num_tokens == 5
    assert eos not in by_server.response_ids + by_us.response_ids


def says_also(**more: Any) -> dict[str, Any]:
    """A good answer with other entries in its message."""
    tree = says("1")
    tree["choices"][0]["message"] |= more
    return tree


MALFORMED = [
    {}, [], None, {"choices": []}, {"choices": [{}]}, {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]},
    {"choices": [{"message": {"content": 3}, "finish_reason": "stop"}]}, says("1", None), says("1", "content_filter"),
    says("1", "tool_calls"), {"choices": "1"}, {"error": "\x1b[2Jboo"}, b'{"choices": [', b"\xff\xfe", b"", says("", "length"),
    says(["1"]), says("1", True), says("half a sign: \ud800"), says("1") | {"model": "evil"}, says("1") | {"model": None},
    says("1") | {"model": ["big"]}, {"choices": says("1")["choices"]}, {**says("1"), "choices": says("1")["choices"] * 2},
    {**says("1"), "choices": says("1")["choices"][0]}, says_also(content=None, refusal="no"),
    says_also(tool_calls=[{"id": "a"}]), [says("1")], {**says("1"), "choices": [{"message": "1", "finish_reason": "stop"}]},
    says("1") | {"model": "big-2"}, says("1") | {"model": "bigger"}, says("1") | {"model": "big\n"}, says("1") | {"model": "Big"},
]  # fmt: skip


@pytest.mark.parametrize("answer", MALFORMED, ids=lambda answer: repr(answer)[:40])
def test_a_malformed_answer_is_a_sentence_with_the_address(answer):
    with Endpoint(lambda _: answer) as endpoint:
        teacher = teacher_at(endpoint.url)
        with pytest.raises(ServerError, match="127.0.0.1") as refusal:
            teacher.writer(lambda _: None).generate(PROMPTS[:1], Sampling(max_tokens=5))
        teacher.close()
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("model", ["big", "big-0613", "big-20240806", "big-2024-08-06"])
def test_a_dated_name_is_the_same_model(model):
    with Endpoint(lambda _: says("1") | {"model": model}) as endpoint:
        (rollout,) = teacher_at(endpoint.url).writer(lambda _: None).generate(PROMPTS[:1], Sampling(max_tokens=5))
    assert rollout.text == "1"


def test_another_model_is_named_with_what_to_write():
    with Endpoint(lambda _: says("1") | {"model": "small"}) as endpoint:
        engine = teacher_at(endpoint.url).writer(lambda _: None)
        with pytest.raises(ServerError, match="answered as 'small', and 'big' was asked.*as teacher.model"):
            engine.generate(PROMPTS[:1], Sampling(max_tokens=5))


@pytest.mark.parametrize("name", ["byte-level", "llama-3", "qwen", "llama-2", "characters"])
def test_control_tokens_in_a_text_are_text(name):
    """A teacher that writes `<|im_end|>` has written ten characters, and the student learns those, not the end of a turn."""
    student = zoo()[name]
    controls = [token for token in student.all_special_tokens if token != student.unk_token]
    assert student.eos_token in controls
    server = Server("http://127.0.0.1:1", "teacher", 1.0)
    for text in [f"5+{token}4 ({token}{token}" for token in controls] + controls:
        ids = as_text(server, text, student)
        assert not {student.convert_tokens_to_ids(token) for token in controls} & set(ids)
        assert student.decode(ids).strip() == text or student.unk_token_id in ids
    server.close()


def test_a_control_token_that_cannot_be_spelt_is_refused():
    """A Unigram model holds its control tokens as pieces of text too, and takes them for those."""
    student, server = zoo()["unigram"], Server("http://127.0.0.1:1", "teacher", 1.0)
    assert student.eos_token_id not in as_text(server, "the student </ s>", student)
    with pytest.raises(
        ServerError, match="wrote '</s>', which the student's tokenizer can only read as a control token"
    ):
        as_text(server, "the </s> student", student)
    server.close()


def test_a_spelt_end_is_no_end():
    """The end of a demonstration is the student's own, once, and stands last."""
    with Endpoint(lambda _: says("1<eos>2")) as endpoint:
        teacher = teacher_at(endpoint.url)
        (rollout,) = teacher.writer(lambda _: None).generate(PROMPTS[:1], Sampling(max_tokens=20))
        teacher.close()
    assert rollout.response_ids.count(tokenizer().eos_token_id) == 1
    assert rollout.response_ids[-1] == tokenizer().eos_token_id


METHODS = [{"type": "sft", "source": "teacher"}, {"type": "gad", "source": "teacher"}]


def run_of(small_models: Path, url: str, output: Path, **sections: Any):
    tree = recipe(small_models / "student", None, output, steps=2, **sections)
    return tree | {"teacher": {"chat": url, "patience": 0.0}}


@pytest.mark.parametrize("method", METHODS, ids=["sft", "gad"])
def test_a_run_learns_from_text_alone(method, small_models, tmp_path, monkeypatch):
    monkeypatch.setenv("KIBITZ_API_KEY", "sk-very-secret")
    with Endpoint(lambda body: says(f"{body['seed'] % 7}+1=2")) as endpoint:
        run = kibitz.train(run_of(small_models, endpoint.url, tmp_path / "run", method=method))
    assert len(run.metrics) == 2
    assert all(row["loss"] == row["loss"] and row["num_tokens"] > 0 for row in run.metrics)
    assert endpoint.headers[0]["Authorization"] == "Bearer sk-very-secret"
    written = [path for path in run.folder.rglob("*") if path.is_file()]
    assert not any(b"sk-very-secret" in path.read_bytes() for path in written)
    if method["type"] == "sft":
        assert {row["teacher_written"] for row in run.metrics} == {1.0}
        assert len(endpoint.asked) == 2 * 8 * 2


def test_what_needs_scores_is_refused_before_anything_loads(small_models, tmp_path):
    with pytest.raises(RecipeError, match="none: choose one that scores tokens"):
        load(run_of(small_models, "http://127.0.0.1:9", tmp_path / "run"), [])
    writes = run_of(small_models, "http://127.0.0.1:9", tmp_path / "run", method=METHODS[0])
    with pytest.raises(RecipeError, match=r"drop teacher\.store"):
        load(writes | {"teacher": {"chat": "http://127.0.0.1:9", "store": "x"}}, [])
    with Endpoint(lambda _: says("1")) as endpoint, pytest.raises(ValueError, match="no log-probabilities"):
        teacher_at(endpoint.url).scorer(ScoreRequest())


def test_an_endpoint_that_is_down_or_has_another_model_is_named(tmp_path):
    with pytest.raises(ServerError, match="127.0.0.1:9 cannot be reached"):
        teacher_at("http://127.0.0.1:9")
    with Endpoint(lambda _: says("1")) as endpoint, pytest.raises(ServerError, match="serves big and not small"):
        teacher_at(endpoint.url, model="small")
