"""Prompts: every source gives the same nouns, and every mistake names its line."""

import json

import pytest
from support.models import tokenizer

from kibitz import graders
from kibitz.config import DataConfig
from kibitz.data import PromptStream, encode_response, load_grader, load_prompts
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
