"""Privileged context writes text: what in a row is none is refused, with what to write instead."""

import json

import pytest
from support.models import tokenizer

from kibitz.config import ContextConfig, DataConfig
from kibitz.data import load_prompts
from kibitz.teachers.context import Rendering, check_context

TURNS = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}, {"role": "user", "content": "4+5"}]
ROW = {"prompt": TURNS, "completion": [{"role": "assistant", "content": "9"}], "answer": "9", "hints": ["a", "b"]}


def prompts(tmp_path, row=ROW, **columns):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row) + "\n")
    names = {"response": "completion", **columns}
    return load_prompts(DataConfig(prompts=str(path), columns=names), tokenizer(), demonstrations=True)


def said(template: str, tmp_path, row=ROW, **columns) -> str:
    (prompt,) = prompts(tmp_path, row, **columns)
    return Rendering(ContextConfig(prompt=template), None).messages(prompt)[-1]["content"]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ prompt }}", "4+5"),
        ("{{ prompt }} {{ response }} {{ answer }}", "4+5 9 9"),
        ("{{ hints | join(', ') }}", "a, b"),
        ("{{ hints | tojson }}", '["a", "b"]'),
        ("{% for m in completion %}{{ m.content }}{% endfor %}", "9"),
        ("[{{ attempt }}{{ success }}{{ reward }}]", "[]"),
    ],
)
def test_messages_are_written_as_text(template, text, tmp_path):
    assert said(template, tmp_path) == text


@pytest.mark.parametrize(
    ("template", "kind"),
    [("{{ completion }}", "a list"), ("{{ hints }}", "a list"), ("{{ completion[0] }}", "an object")],
)
def test_a_list_or_an_object_is_refused_and_never_written_as_python_does(template, kind, tmp_path):
    with pytest.raises(ValueError, match=rf"row of the prompt '4\+5': it writes {kind}, which is no text.*tojson"):
        check_context(ContextConfig(prompt=template), prompts(tmp_path))


def test_a_renamed_prompt_that_is_a_list_is_refused_by_its_own_name(tmp_path):
    row = {"question": TURNS, "completion": "9"}
    assert said("{{ prompt }}", tmp_path, row, prompt="question") == "4+5"
    with pytest.raises(ValueError, match="write {{ prompt }} for the text of the last message"):
        said("{{ question }}", tmp_path, row, prompt="question")
