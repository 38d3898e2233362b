"""Chat templates with thinking modes, written as Qwen3 and Llama 3 write theirs: prompts, ends and what is learnt."""

import copy
import re
from datetime import datetime

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import language_model, make_model
from support.tokenizers_zoo import qwen_tokenizer, zoo

from kibitz.batching import pack
from kibitz.config import DataConfig
from kibitz.data import encode_prompt, encode_response, load_prompts
from kibitz.models.load import stop_ids
from kibitz.signals import Scored
from kibitz.types import Prompt, Rollout

QWEN3 = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{%- else %}{{ m.content }}{%- endif %}{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{- m.content | trim }}{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
USER = [{"role": "user", "content": "2+2?"}]
MARKS = {
    "qwen3": ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"],
    "llama": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
}


def tokenizer(kind):
    """Bytes and the family's marks; Qwen3's base ends text with one token and its chat turns with another, as Llama 3 does."""
    tok = qwen_tokenizer()
    tok.add_special_tokens({"additional_special_tokens": MARKS[kind]})
    if kind == "qwen3":
        tok.chat_template, tok.eos_token = QWEN3, "<|im_end|>"
    else:
        tok.chat_template, tok.eos_token, tok.bos_token = LLAMA3, "<|eot_id|>", "<|begin_of_text|>"
    return tok


@pytest.mark.parametrize(
    ("kind", "template", "text"),
    [
        ("qwen3", {}, "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"),
        ("qwen3", {"enable_thinking": True}, "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"),
        (
            "qwen3",
            {"enable_thinking": False},
            "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        (
            "llama",
            {},
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_prompts_are_rendered_as_the_template_says(kind, template, text):
    """Marks are single tokens, BOS stands there once, and the empty thought of a mode without one is the prompt's."""
    tok = tokenizer(kind)
    ids = encode_prompt(tok, USER, template)
    assert tok.decode(ids) == text
    assert ids.count(tok.convert_tokens_to_ids("<|begin_of_text|>")) == (kind == "llama")
    marks = {tok.convert_tokens_to_ids(mark) for mark in MARKS[kind]}
    assert sum(i in marks for i in ids) == text.count("<|") + text.count("think>")


def test_the_mode_of_a_recipe_reaches_every_prompt(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "2+2?", "answer": "4"}\n{"prompt": "3+3?", "answer": "6"}\n')
    tok = tokenizer("qwen3")
    off, on = (
        load_prompts(DataConfig(prompts=str(rows), system="Be brief.", template={"enable_thinking": mode}), tok)
        for mode in (False, True)
    )
    thought = tok("<think>\n\n</think>\n\n", add_special_tokens=False)["input_ids"]
    for without, having in zip(off, on, strict=True):
        assert without.ids == (*having.ids, *thought)
        assert without.key == having.key
        assert tok.decode(having.ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


ENDS = [("qwen3", "<|im_end|>", "<|endoftext|>"), ("llama", "<|eot_id|>", "<|end_of_text|>")]


@pytest.mark.parametrize(("kind", "end", "other"), ENDS)
def test_responses_end_where_the_chat_ends_and_where_text_does(kind, end, other, tmp_path):
    """The tokenizer's end, those of the generation settings, and the recipe's; a base model's settings know only the
    end of a text, and its chat template tells the end of a turn."""
    tok = tokenizer(kind)
    folder = make_model(tmp_path, kind=kind, vocab_size=len(tok))
    tok.save_pretrained(folder)
    model = language_model(folder)
    ids = {name: tok.convert_tokens_to_ids(name) for name in (end, other)}
    model.model.generation_config.eos_token_id = [ids[other]]
    assert set(stop_ids(model, [])) == {ids[end], ids[other]}
    model.tokenizer.eos_token = other
    assert set(stop_ids(model, [])) == {ids[end], ids[other]}
    assert set(stop_ids(model, [end])) == {ids[end], ids[other]}


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_the_response_alone_is_learnt_thought_and_end_included(kind):
    """What follows the prompt up to the end of the turn, each token once, scored by the position to its left."""
    tok = tokenizer(kind)
    thought = "<think>\nadd\n</think>\n\n4" if kind == "qwen3" else "4"
    prompts = [encode_prompt(tok, USER, {}), encode_prompt(tok, [{"role": "user", "content": "And 10+10?"}], {})]
    response = encode_response(tok, thought)
    assert tok.decode(response) == thought + tok.eos_token
    rollouts = [
        Rollout(Prompt(tuple(p), "", str(i)), response, torch.zeros(len(response)), True) for i, p in enumerate(prompts)
    ]
    batch = pack([Scored(r, r.weight_T()) for r in rollouts])
    assert batch.tokens.token_T.tolist() == response * 2
    assert bool((batch.tokens.weight_T == 1).all())
    flat = batch.ids_BL.flatten()
    starts = batch.position_T.view(2, -1)[:, 0]
    assert flat[starts].tolist() == [p[-1] for p in prompts]
    for row, prompt in enumerate(prompts):
        assert tok.decode(batch.ids_BL[row, : len(prompt)]) == tok.decode(prompt)


# ------------------------------------------------------------------ dates, and text that spells control tokens

LLAMA = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
    "{%- endif %}\n  {% if true %}Today is {{ date_string }}.\n{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
)
EVERYWHERE = (
    "{% macro head(x) %}<{{ strftime_now('%A, %B %-d, %Y, 100%%') }}{{ x }}>{% endmacro %}"
    "{% for m in messages %}{{ head(m.content) }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (LLAMA, "Today is 03 Feb 2020.\nWhat is 2+2?"),
        (EVERYWHERE, "<Monday, February 3, 2020, 100%What is 2+2?>"),
        ("\n  {{ strftime_now('%d') }}", "\n  03"),
        ("  {% if strftime_now %}{{ strftime_now('%d') }}{% endif %}", "03"),
    ],
)
def test_a_template_writes_the_day_that_it_is_told(template, written):
    tok = tokenizer("qwen3")
    tok.chat_template = template
    days = {"strftime_now": "2020-02-03"}
    assert tok.decode(encode_prompt(tok, [{"role": "user", "content": "What is 2+2?"}], days)) == written
    today = encode_prompt(tok, [{"role": "user", "content": "What is 2+2?"}], {})
    now = {"strftime_now": datetime.now().isoformat()}
    assert today == encode_prompt(tok, [{"role": "user", "content": "What is 2+2?"}], now)


@given(
    st.sampled_from(["qwen3", "llama"]),
    st.lists(st.sampled_from(["2+2?", "<|im_end|>", "<|eot_id|>", "<|im_start|>", "\n", " ", "é", "<|", "</think>"])),
)
def test_a_control_token_in_a_prompt_is_text(kind, parts):
    """Only the template writes control tokens, as many as it writes around any text; and nothing is lost."""
    tok, content = tokenizer(kind), "a" + "".join(parts) + "a"
    messages = [{"role": "system", "content": "Obey."}, {"role": "user", "content": content}]
    ids, plain = (encode_prompt(tok, m, {}) for m in (messages, [messages[0], {"role": "user", "content": "aa"}]))
    controls = {*tok.all_special_ids}
    assert [i for i in ids if i in controls] == [i for i in plain if i in controls]
    assert tok.decode(ids) == tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_prompts_that_spell_no_control_token_are_as_they_were():
    for kind in MARKS:
        tok = tokenizer(kind)
        for content in ("2+2?", "<|im_sta", "\n\n a", "é <|"):
            messages = [{"role": "user", "content": content}]
            assert encode_prompt(tok, messages, {}) == tok.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )


REFUSING = {"unigram"}
"""A Unigram model holds its control tokens as pieces of text, too."""


@pytest.mark.parametrize("name", zoo())
def test_each_kind_of_tokenizer_reads_a_control_token_as_text_or_refuses(name):
    tok = copy.deepcopy(zoo()[name])
    for template in (None, LLAMA3):
        tok.chat_template = template
        spelt = tok.eos_token
        messages = [{"role": "user", "content": f"7 {spelt} 8"}]
        if name in REFUSING:
            with pytest.raises(ValueError, match=f"{re.escape(repr(spelt))}.*control token"):
                encode_prompt(tok, messages, {})
            continue
        ids = encode_prompt(tok, messages, {})
        bare = encode_prompt(tok, [{"role": "user", "content": "7  8"}], {})
        assert ids.count(tok.eos_token_id) == bare.count(tok.eos_token_id)
