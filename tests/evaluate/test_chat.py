"""A conversation: what the model reads, what it remembers, and the command that reads lines."""

import io
import json

import pytest
from typer.testing import CliRunner

from kibitz import worlds
from kibitz.cli import app
from kibitz.evaluate.chat import Conversation
from kibitz.types import Sampling

TEACHER = str(worlds.get("arithmetic").checkpoint("teacher"))


def conversation(**options) -> Conversation:
    return Conversation.with_model(TEACHER, Sampling(max_tokens=64, temperature=0.0), **options)


def test_it_reads_the_whole_conversation_until_it_is_told_to_forget():
    talk, seen = conversation(), []
    generate = talk.engine.generate
    talk.engine.generate = lambda prompts, sampling: seen.append(prompts[0].ids) or generate(prompts, sampling)
    assert talk.ask("5+(2*3)-4") in ("5+6-4=1-4=7", "5+6-4=5+2=7")
    talk.ask("1+1")
    talk.forget()
    talk.ask("1+1")
    template = talk.model.tokenizer.apply_chat_template
    both = [{"role": "user", "content": "5+(2*3)-4"}, {"role": "assistant", "content": "5+6-4=1-4=7"}]
    last = {"role": "user", "content": "1+1"}
    assert seen[1] == tuple(template([*both, last], add_generation_prompt=True, return_dict=False))
    assert seen[2] == tuple(template([last], add_generation_prompt=True, return_dict=False))
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_where_the_room_ends_it_says_what_to_do():
    talk = conversation()
    with pytest.raises(ValueError, match="begin a new one"):
        talk.ask("1+" * 70 + "1")
    assert not talk.messages, "what was not answered was not said"
    with pytest.raises(ValueError, match="nothing to answer"):
        talk.ask("  ")


def test_lines_of_a_pipe_are_answered_one_by_one():
    answer = CliRunner().invoke(app, ["chat", TEACHER, "--single", "--json"], input="2*3\n\n/new\n4-1\n")
    assert answer.exit_code == 0, answer.output
    turns = json.loads(answer.stdout)["turns"]
    assert turns == [{"user": "2*3", "assistant": "6"}, {"user": "4-1", "assistant": "3"}]
    shown = CliRunner().invoke(app, ["chat", TEACHER], input="2*3\n").stdout
    assert shown == "you    2*3\nmodel  6\n"


def test_a_stream_is_the_greedy_answer_and_one_that_is_stopped_is_remembered_as_far_as_it_came():
    talk = conversation()
    pieces = list(talk.stream("5+(2*3)-4"))
    whole = "".join(pieces)
    assert len(pieces) > 2 and whole == conversation().ask("5+(2*3)-4")
    assert talk.messages[-1] == {"role": "assistant", "content": whole}
    talk.forget()
    stream = talk.stream("5+(2*3)-4")
    first = next(stream) + next(stream)
    stream.close()
    assert whole.startswith(first) and talk.messages[-1]["content"] == first


def test_ctrl_c_ends_the_answer_and_not_the_conversation(monkeypatch):
    from rich.console import Console

    from kibitz.cli import chat

    talk, console = conversation(), Console(record=True, width=80, file=io.StringIO())
    generate, calls = talk.engine.generate, []

    def stopped_once(prompts, sampling):
        calls.append(prompts)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(prompts, sampling)

    monkeypatch.setattr(talk.engine, "generate", stopped_once)
    said = chat._streamed(console, talk, "5+(2*3)-4")
    assert said.endswith(" (stopped)") and console.export_text().startswith("model  5+6")
    assert talk.messages[-1]["content"] == said.removesuffix(" (stopped)")
    assert chat._streamed(console, talk, "1+1")
