"""Chat templates with thinking modes, written as Qwen3 and Llama 3 write theirs: prompts, ends and what is learnt."""

import pytest
import torch
from support.models import language_model, make_model
from support.tokenizers_zoo import qwen_tokenizer

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
