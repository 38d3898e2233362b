"""Prompts: every source gives the same types, and every mistake names its line."""

import datetime
import json
import math
import random

import pytest
from support.models import make_model, tokenizer
from support.runs import recipe
from support.tokenizers_zoo import qwen_tokenizer
from tokenizers.processors import TemplateProcessing

import kibitz
from kibitz import graders
from kibitz.config import DataConfig
from kibitz.data import PromptStream, encode_prompt, encode_response, load_grader, load_prompts, turn_end
from kibitz.data.once import reading_once
from kibitz.types import Prompt


def write(path, *rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def prompts(path, **options):
    return load_prompts(DataConfig(prompts=path, **options), tokenizer())


def test_prompt_and_messages_render_alike(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "1+2", "answer": 3},
        {"messages": [{"role": "user", "content": "1+2"}], "answer": "3"},
    )
    first, second = prompts(path)
    assert first.ids == second.ids
    assert first.key == second.key
    assert first.answer == second.answer == "3"
    assert tokenizer().decode(first.ids).count("1+2") == 1


def test_parquet_holds_the_same_prompts(tmp_path):
    import datasets

    rows = [{"prompt": "1+2", "answer": "3"}, {"prompt": "4*2", "answer": "8"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    path = write(tmp_path / "p.jsonl", *rows)
    assert [p.ids for p in prompts(str(tmp_path / "p.parquet"))] == [p.ids for p in prompts(path)]


def test_columns_system_and_responses(tmp_path):
    chat = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}]
    path = write(tmp_path / "p.jsonl", {"messages": chat}, {"question": "1+2", "solution": "3"})
    first, second = load_prompts(
        DataConfig(prompts=path, columns={"prompt": "question", "response": "solution"}),
        tokenizer(),
        demonstrations=True,
    )
    assert first.ids == second.ids
    assert first.response == second.response == "3"
    tok = tokenizer()
    assert encode_response(tok, "3") == [*tok.encode("3", add_special_tokens=False), tok.eos_token_id]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"prompt": "1+2"}', '{"prompt": '], "line 2 is not JSON"),
        (['["1+2"]'], "line 1 is not an object"),
        ([{"question": "1+2"}], "line 1 has no column 'prompt'; it has 'question': write data.columns.prompt=NAME"),
        ([{"prompt": "1"}, {"prompt": "  "}], "line 2 has an empty prompt"),
        ([{"messages": []}], "line 1: messages must be a list"),
        ([{"messages": [{"role": "assistant", "content": "3"}]}], "messages hold nothing before"),
        ([], "holds no prompts"),
        ([{"prompt": "1+" * 60 + "1"}], "line 1: the prompt has .* tokens, the limit is 100"),
    ],
)
def test_mistakes_name_their_line(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        prompts(write(tmp_path / "p.jsonl", *rows), max_prompt_tokens=100)


def test_missing_files_and_responses(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        prompts(str(tmp_path / "no.jsonl"))
    with pytest.raises(ValueError, match="cannot read .*no.parquet"):
        prompts(str(tmp_path / "no.parquet"))
    path = write(tmp_path / "p.jsonl", {"prompt": "1+2"})
    with pytest.raises(ValueError, match="needs a column 'response'.*for sft, write method.source=teacher"):
        load_prompts(DataConfig(prompts=path), tokenizer(), demonstrations=True)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="not UTF-8"):
        prompts(str(tmp_path / "latin.jsonl"))
    with pytest.raises(ValueError, match="data.options"):
        load_prompts(DataConfig(world="arithmetic", options={"colour": 1}), tokenizer())


def stream(position: int = 0, shuffle: bool = True) -> PromptStream:
    return PromptStream([Prompt((i,), str(i), str(i)) for i in range(7)], seed=3, shuffle=shuffle, position=position)


def test_each_epoch_holds_every_prompt_once_in_a_new_order():
    taken = [p.text for p in stream().take(21)]
    epochs = [taken[0:7], taken[7:14], taken[14:21]]
    assert all(sorted(epoch) == sorted("0123456") for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [p.text for p in stream(shuffle=False).take(9)] == list("012345601")


def test_a_stream_goes_on_from_its_position():
    whole = [p.text for p in stream().take(30)]
    part = stream()
    head = [p.text for p in part.take(11)]
    tail = [p.text for p in stream(position=part.position).take(19)]
    assert head + tail == whole


def a_prompt(answer: str | None) -> Prompt:
    return Prompt((1,), "q", "k", answer=answer)


@pytest.mark.parametrize(
    ("grader", "answer", "text", "reward"),
    [
        (graders.exact, "7", " 7\n", 1),
        (graders.exact, "7", "7.", 0),
        (graders.math, "Half of it.\n#### 18", "She makes 9 * 2 = $18 every day. The answer is 18", 1),
        (graders.math, "18", "I think it is \\boxed{17}", 0),
        (graders.math, "\\frac{1}{2}", "so the result is $0.5$", 1),
        (graders.math, "1,234", "it is 1234", 1),
        (graders.math, "3", "no idea", 0),
        (graders.choice, "B", "The answer is (B).", 1),
        (graders.choice, "(b)", "A is wrong, so B", 1),
        (graders.choice, "B", "Because of this: C", 0),
        (graders.choice, "A", "nothing here", 0),
    ],
)
def test_graders(grader, answer, text, reward):
    assert grader(a_prompt(answer), text) == reward


def test_picking_a_grader():
    assert graders.pick("auto", [a_prompt(None)]) is None
    assert graders.pick("auto", [a_prompt("3")]) is graders.math
    assert graders.pick("choice", []) is graders.choice
    with pytest.raises(ValueError, match="there is no grader 'mats'"):
        graders.pick("mats", [])
    with pytest.raises(ValueError, match="no answer"):
        graders.exact(a_prompt(None), "3")
    data = DataConfig(world="arithmetic")
    rows = load_prompts(data.model_copy(update={"limit": 3}), tokenizer())
    grader = load_grader(data, rows)
    assert [grader(row, "1=" + row.answer) for row in rows] == [1, 1, 1]


def test_long_prompts_are_refused_or_left_out(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "1+1"}, {"prompt": "(((1+1)))"}, {"prompt": "2"})
    whole = load_prompts(DataConfig(prompts=str(path)), tokenizer())
    limit = sorted(len(p.ids) for p in whole)[1]
    with pytest.raises(ValueError, match="too_long=drop"):
        load_prompts(DataConfig(prompts=str(path), max_prompt_tokens=limit), tokenizer())
    kept = load_prompts(DataConfig(prompts=str(path), max_prompt_tokens=limit, too_long="drop"), tokenizer())
    assert [p.text for p in kept] == ["1+1", "2"]
    with pytest.raises(ValueError, match="raise data.max_prompt_tokens"):
        load_prompts(DataConfig(prompts=str(path), max_prompt_tokens=1, too_long="drop"), tokenizer())


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_random_rows_are_the_same_every_time_and_keep_their_order(suffix, tmp_path):
    rows = [{"prompt": f"{i}+{i}"} for i in range(9)]
    path = write(tmp_path / "rows.jsonl", *rows)
    if suffix == "parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path := tmp_path / "rows.parquet")
    first, again = (load_prompts(DataConfig(prompts=str(path), limit=4, pick="random"), tokenizer(), s) for s in (0, 1))
    texts = [p.text for p in first]
    assert texts == [p.text for p in again]
    assert texts == sorted(texts)
    assert len(texts) == 4
    assert texts != [row["prompt"] for row in rows[:4]]
    head = load_prompts(DataConfig(prompts=str(path), limit=4), tokenizer())
    assert [p.text for p in head] == [row["prompt"] for row in rows[:4]]


def test_conversations_of_from_and_value_are_messages(tmp_path):
    turns = [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]
    path = write(tmp_path / "c.jsonl", {"conversations": turns})
    (prompt,) = load_prompts(DataConfig(prompts=str(path)), tokenizer(), demonstrations=True)
    assert (prompt.text, prompt.response) == ("1+1", "2")
    bad = write(tmp_path / "b.jsonl", {"conversations": [{"from": "human", "value": 3}]})
    with pytest.raises(ValueError, match="both of them text"):
        load_prompts(DataConfig(prompts=str(bad)), tokenizer())


# ------------------------------------------------------------------ what stands in a row

TALK = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER, SAID = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
THOUGHT = SAID | {"reasoning_content": "two and two"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def chat_tokenizer(template: str | None = TALK):
    """Of a base model: text ends with one token, and a turn of the chat template with another."""
    tok = qwen_tokenizer()
    tok.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]})
    tok.chat_template, tok.eos_token = template, "<|endoftext|>"
    return tok


def random_value(draw: random.Random, depth: int = 0):
    plain = [None, True, False, 0, -3, 10**400, 2.5, math.nan, math.inf, "", " ", "4", "two\n", "\ud83d", "[1]"]
    if depth < 2 and draw.random() < 0.4:
        inner = [random_value(draw, depth + 1) for _ in range(draw.randint(0, 3))]
        keys = draw.sample(["role", "content", "from", "value", "text", "x"], len(inner))
        return draw.choice([inner, dict(zip(keys, inner, strict=True)), [USER], [USER, SAID], [SAID]])
    return draw.choice(plain)


def test_any_value_is_used_as_what_it_is_or_refused_with_its_row(tmp_path):
    draw, tok, used = random.Random("rows"), chat_tokenizer(), 0
    names = ["prompt", "answer", "response", "task", "route", "messages", "conversations", "tools"]
    for _ in range(1000):
        row = {"prompt": "2+2?"} | {name: random_value(draw) for name in draw.sample(names, draw.randint(1, 3))}
        prompt, refusal = read(write(tmp_path / "p.jsonl", row), tok)
        if prompt is None:
            assert "p.jsonl, line 1" in refusal, row
            continue
        used += 1
        spoken = [turn["content"] for turn in prompt.messages] + [prompt.response]
        for text in (*spoken, prompt.answer, prompt.task, prompt.route):
            assert text is None or text in texts_of(row) | {"default"}, (text, row)
    assert 200 < used < 800


def read(path: str, tok) -> tuple[Prompt | None, str]:
    """The only prompt of a file, or why it was refused."""
    try:
        (prompt,) = load_prompts(DataConfig(prompts=path), tok)
    except ValueError as error:
        return None, str(error)
    return prompt, ""


def texts_of(value) -> set[str]:
    """Every text and number that stands anywhere in a value."""
    if isinstance(value, dict | list):
        return {text for inner in (value.values() if isinstance(value, dict) else value) for text in texts_of(inner)}
    if isinstance(value, str):
        return {value}
    is_text = isinstance(value, int) if not isinstance(value, float) else math.isfinite(value)
    return {json.dumps(value)} if is_text and not isinstance(value, bool) else set()


def test_a_prompt_of_messages_is_a_conversation(tmp_path):
    """As TRL and verl write it, the answer inside an object, the response as a message of its own."""
    row = {"prompt": [USER], "completion": [SAID], "reward_model": {"style": "rule", "ground_truth": 4}, "task": None}
    columns = {"answer": "reward_model.ground_truth", "response": "completion"}
    (prompt,) = prompts(write(tmp_path / "p.jsonl", row), columns=columns)
    (plain,) = prompts(write(tmp_path / "q.jsonl", {"prompt": "2+2?"}))
    assert (prompt.ids, prompt.key, prompt.messages) == (plain.ids, plain.key, plain.messages)
    assert (prompt.answer, prompt.response, prompt.task) == ("4", "4", "default")
    with pytest.raises(ValueError, match=r"line 1: answer must be .* is an object: .*such as answer\.ground"):
        prompts(write(tmp_path / "r.jsonl", {"prompt": "1", "answer": {"ground": "4"}}))
    with pytest.raises(ValueError, match="text stands before .ground_truth"):
        prompts(write(tmp_path / "s.jsonl", {"prompt": "1", "reward_model": "4"}), columns=columns)


def test_values_that_only_tables_hold(tmp_path):
    import datasets

    def table(**row):
        datasets.Dataset.from_list([row]).to_parquet(path := tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet")
        return str(path)

    when = datetime.datetime(2023, 1, 1)
    (prompt,) = prompts(table(messages=[USER | {"timestamp": when}]))  # the template does not write it
    assert prompt.messages == (USER,)
    for value, shown in ((when, "a datetime"), (b"4", "a bytes"), (math.nan, "not a finite number"), (True, "true or")):
        with pytest.raises(ValueError, match=f"row 1: answer must be text or a finite number, and is {shown}"):
            prompts(table(prompt="1", answer=value))


def test_thoughts_and_tools_are_rendered_by_the_template(tmp_path):
    tok, path = chat_tokenizer(), write(tmp_path / "p.jsonl", {"messages": [USER, THOUGHT], "tools": json.dumps(TOOLS)})
    (prompt,) = load_prompts(DataConfig(prompts=path), tok, demonstrations=True)
    whole = tok.apply_chat_template([USER, THOUGHT], tools=TOOLS, tokenize=False)
    assert tok.decode([*prompt.ids, *encode_response(tok, prompt.response)]) + "\n" == whole
    assert "two and two" in prompt.response
    with pytest.raises(ValueError, match="line 1: there are tools, and the chat template does not write any"):
        prompts(write(tmp_path / "t.jsonl", {"prompt": "2+2?", "tools": TOOLS}))
    with pytest.raises(
        ValueError, match="line 1: messages have reasoning_content, which the chat template does not write"
    ):
        prompts(write(tmp_path / "m.jsonl", {"messages": [USER, THOUGHT]}))
    forgetful = TALK.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\nSo: {% endif %}")
    with pytest.raises(ValueError, match="line 1: the chat template opens the assistant's turn otherwise"):
        load_prompts(DataConfig(prompts=path), chat_tokenizer(forgetful), demonstrations=True)


def test_a_prompt_keeps_its_beginning_and_gets_no_end():
    tok = chat_tokenizer(None)
    bare = encode_prompt(tok, [USER], {})
    begin, end = (tok.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|endoftext|>"))
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>", special_tokens=[("<|im_start|>", begin), ("<|endoftext|>", end)]
    )
    assert encode_prompt(tok, [USER], {}) == [begin, *bare]
    assert tok("1").input_ids[-1] == end


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TALK, "<|im_end|>"),
        (TALK.replace("<|im_end|>", ""), "<|endoftext|>"),
        ("{{ raise_exception('no') }}", "<|endoftext|>"),
        (None, "<|endoftext|>"),
    ],
)
def test_a_turn_ends_as_the_template_ends_it(template, end):
    tok = chat_tokenizer(template)
    assert turn_end(tok) == encode_response(tok, "4")[-1] == tok.convert_tokens_to_ids(end)


def test_one_of_several_configurations(tmp_path):
    write(tmp_path / "a.jsonl", {"prompt": "1"})
    write(tmp_path / "b.jsonl", {"prompt": "2"})
    names = "- config_name: main\n  data_files: a.jsonl\n- config_name: other\n  data_files: b.jsonl\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{names}---\n")
    assert [p.text for p in prompts(str(tmp_path), subset="other")] == ["2"]
    with pytest.raises(ValueError, match="write data.subset=NAME"):
        prompts(str(tmp_path))
    with pytest.raises(ValueError, match="data.subset: .* is one file"):
        prompts(str(tmp_path / "a.jsonl"), subset="other")


@pytest.mark.parametrize("method", [{"type": "sft"}, {"type": "gkd"}, {"type": "opd", "replay": 1.0}])
def test_demonstrations_longer_than_the_model_are_refused_or_left_out(method, tmp_path):
    rows = [{"prompt": "1+1", "response": "2" * 200}, *({"prompt": f"{i}+1", "response": "2"} for i in range(2, 9))]
    data = {"prompts": write(tmp_path / "d.jsonl", *rows), "world": None, "limit": None}
    student = make_model(tmp_path / "s")
    teacher = None if method["type"] == "sft" else make_model(tmp_path / "t", seed=1)
    made = recipe(student, teacher, tmp_path / "run", data=data, method=method, steps=1)
    with pytest.raises(
        ValueError, match="the prompt '1[+]1': prompt and response have 20. tokens, and a model has 128"
    ):
        kibitz.train(made)
    run = kibitz.train({**made, "data": {**data, "too_long": "drop"}})
    assert run.metrics[-1]["step"] == 1


def test_the_saved_model_ends_where_the_rollouts_did(tmp_path):
    rollout = {"stop": ["="]}
    run = kibitz.train(
        recipe(make_model(tmp_path / "s"), None, tmp_path / "run", method={"type": "sft"}, rollout=rollout, steps=1)
    )
    saved = json.loads((run.checkpoint / "generation_config.json").read_text())["eos_token_id"]
    assert set(saved) == {tokenizer().eos_token_id, tokenizer().encode("=", add_special_tokens=False)[0]}


@pytest.mark.parametrize("depth", [65, 500, 9000])
@pytest.mark.parametrize("brackets", ["[]", ['{"a":', "}"]])
def test_a_row_that_is_nested_too_deep_is_named(tmp_path, depth, brackets):
    path, (begin, end) = tmp_path / "deep.jsonl", brackets
    rows = [{"prompt": "1+2", "more": [[[{}]]]}, '{"prompt": "1+2", "more": ' + begin * depth + "1" + end * depth + "}"]
    path.write_text(json.dumps(rows[0]) + "\n" + rows[1] + "\n")
    with pytest.raises(ValueError, match=r"deep.jsonl, line 2 is nested too deep: lists and objects go 64 deep"):
        load_prompts(DataConfig(prompts=str(path)), tokenizer())


@pytest.mark.parametrize(
    ("row", "name", "answer"),
    [
        ({"rm": {"gt": ["3", "4"]}}, "rm.gt.0", "3"),
        ({"rm": {"gt": ["3", "4"]}}, "rm.gt.1", "4"),
        ({"rm": {"g.t": "3"}}, "rm.g.t", "3"),
        ({"rm.x": {"t": "3"}}, "rm.x.t", "3"),
        ({"rm.x": "3", "rm": {"x": "4"}}, "rm.x", "3"),
        ({"a": [{"b.c": [{"d": "3"}]}]}, "a.0.b.c.0.d", "3"),
    ],
)
def test_a_dotted_column_goes_into_lists_and_keys_with_dots(tmp_path, row, name, answer):
    path = write(tmp_path / "p.jsonl", {"prompt": "1", **row}, {"prompt": "2"})
    assert [p.answer for p in prompts(path, columns={"answer": name})] == [answer, None]
    with pytest.raises(ValueError, match="a list stands before .x"):
        prompts(write(tmp_path / "q.jsonl", {"prompt": "1", "rm": [1]}), columns={"answer": "rm.x"})


@pytest.mark.parametrize("name", ["anwser", "rm.g", "rm.gt.1"])
def test_a_column_that_was_named_and_that_no_row_has_is_refused(tmp_path, name):
    config = DataConfig(
        prompts=write(tmp_path / "p.jsonl", {"prompt": "1", "rm": {"gt": ["3"]}}), columns={"answer": name}
    )
    rows = load_prompts(config, tokenizer())
    with pytest.raises(ValueError, match=f"data.columns.answer: no row .* {name!r}; the first one has 'prompt', 'rm'"):
        load_grader(config, rows)


def test_a_column_of_prompts_that_was_named_is_read_before_messages(tmp_path):
    told = [{"role": "user", "content": "other"}]
    path = write(tmp_path / "p.jsonl", {"question": "1+2", "messages": told}, {"messages": told})
    assert [p.text for p in prompts(path, columns={"prompt": "question"})] == ["1+2", "other"]
    with pytest.raises(ValueError, match="line 1: prompt is null"):
        prompts(write(tmp_path / "q.jsonl", {"prompt": None}))


def test_parts_of_text_are_text(tmp_path):
    def said(*parts):
        return [{"role": "user", "content": list(parts)}]

    one, two = {"type": "text", "text": "1+"}, {"type": "text", "text": "2", "image": None}
    path = write(tmp_path / "p.jsonl", {"prompt": "1+2"}, {"prompt": said(one, two)}, {"messages": said(one, two)})
    plain, *others = prompts(path)
    assert all((other.ids, other.key, other.text) == (plain.ids, plain.key, plain.text) for other in others)
    for part, what in (({"type": "image"}, "of type 'image'"), ("1+2", "text"), ({"type": "text"}, "of type 'text'")):
        with pytest.raises(ValueError, match=f"line 1: prompt hold a part of content that is {what}"):
            prompts(write(tmp_path / "q.jsonl", {"prompt": said(one, part)}))


def test_speakers_of_sharegpt_are_known_or_refused(tmp_path):
    def talk(speaker):
        return {"conversations": [{"from": speaker, "value": "1+2"}, {"from": "GPT", "value": "3"}]}

    (prompt,) = load_prompts(
        DataConfig(prompts=write(tmp_path / "p.jsonl", talk("Human"))), tokenizer(), demonstrations=True
    )
    assert (prompt.text, prompt.response) == ("1+2", "3")
    with pytest.raises(ValueError, match="line 1: conversations are from 'bing', who is none of human"):
        prompts(write(tmp_path / "q.jsonl", talk("bing")))


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+2"}\n', encoding="utf-8-sig")
    assert [p.text for p in prompts(str(tmp_path / "p.jsonl"))] == ["1+2"]
    with pytest.raises(ValueError, match="it begins a list; write one object a line"):
        prompts(write(tmp_path / "q.json", "[", {"prompt": "1"}, "]"))


def test_answers_of_the_evaluation_alone_are_graded(small_models, tmp_path):
    from kibitz.training.setup import prepare

    train = write(tmp_path / "p.jsonl", {"prompt": "1+2"})
    held = write(tmp_path / "e.jsonl", {"prompt": "1+3", "sum": "4"})
    data = {"world": None, "prompts": train, "limit": None, "columns": {"answer": "sum"}}
    tree = recipe(
        small_models / "student", small_models / "teacher", tmp_path / "run", data=data, eval={"prompts": held}
    )
    setup = prepare(tree)
    assert setup.grader is graders.math
    row, _ = setup.evaluator.run()
    assert row["sampled"]["num"] == 1


def test_an_end_that_a_demonstration_spells_is_learnt_once():
    tok = qwen_tokenizer()
    end = tok.convert_ids_to_tokens(turn_end(tok))
    assert encode_response(tok, f"3{end}") == encode_response(tok, "3") == [*tok.encode("3"), turn_end(tok)]
    assert encode_response(tok, "") == encode_response(tok, end) == [turn_end(tok)]


def test_many_prompts_are_read_as_each_alone(tmp_path, monkeypatch):
    """Those that spell a control token, those with tools and those between them, in calls of three rows."""
    monkeypatch.setattr("kibitz.data.TOGETHER", 3)
    tok = chat_tokenizer()
    texts = ["1+1", f"what is {tok.eos_token}?", "", "a", "b\n c", "é", "long " * 9, "z"]
    rows = [{"messages": [{"role": "user", "content": text}]} for text in texts if text]
    path = write(tmp_path / "p.jsonl", *rows)
    found = load_prompts(DataConfig(prompts=path), tok)
    assert [list(p.ids) for p in found] == [encode_prompt(tok, row["messages"], {}) for row in rows]


def test_a_template_that_refuses_one_row_names_it(tmp_path):
    """Though all are rendered by one call."""
    refusing = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not that') }}{% endif %}{{ messages[0]['content'] }}"
    path = write(tmp_path / "p.jsonl", *({"prompt": text} for text in ("yes", "no", "yes again")))
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2: .*not that"):
        load_prompts(DataConfig(prompts=path), chat_tokenizer(refusing))


def test_a_command_reads_the_same_prompts_once(tmp_path):
    """Its check and its run ask for the same; a file that changes between two commands is read again."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1+2"}\n')
    data = DataConfig(prompts=str(path))
    with reading_once():
        first = load_prompts(data, tokenizer())
        path.write_text('{"prompt": "3+4"}\n')
        first.append(first[0])
        assert [prompt.text for prompt in load_prompts(data, tokenizer())] == ["1+2"]
        assert [prompt.text for prompt in load_prompts(data, qwen_tokenizer())] == ["3+4"]
        assert [prompt.text for prompt in load_prompts(data, tokenizer(), room=9)] == ["3+4"]
    assert [prompt.text for prompt in load_prompts(data, tokenizer())] == ["3+4"]
