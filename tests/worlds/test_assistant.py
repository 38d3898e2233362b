"""The world `assistant`: instructions are what they say, documents state their facts, and no split knows another's."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kibitz.worlds import assistant, get
from kibitz.worlds.assistant import CHAINS, SIGNS, TEMPLATES, facts, follow

DOCUMENTS = ["assistant-documents", "assistant-documents-2", "assistant-documents-3"]
CHAT = ["assistant", "assistant-instructions", "assistant-background"]
words = st.text(alphabet="abcdefghijklmnopqrstuvwxyz", min_size=3, max_size=5)


def by_hand(chain: str, word: str) -> str:
    """The oracle: lists of letters."""
    letters = list(word)
    for sign in chain:
        match sign:
            case "$":
                letters = [chr(ord(a) - 32) if "a" <= a <= "z" else a for a in letters]
            case "%":
                letters = [letters[-1 - at] for at in range(len(letters))]
            case "^":
                letters = letters + letters
            case "&":
                letters = ["[", *letters, "]"]
            case "*":
                letters = [letters[(at + 1) % len(letters)] for at in range(len(letters))]
            case "+":
                letters = letters + list(f"{len(letters)}")
    return "".join(letters)


@given(st.sampled_from(CHAINS), words)
def test_instructions_are_followed_from_left_to_right(chain, word):
    assert follow(chain, word) == by_hand(chain, word)


def test_some_instructions_written_out():
    assert follow("%^$", "abc") == "CBACBA"
    assert [follow(sign, "abcd") for sign in SIGNS] == ["ABCD", "dcba", "abcdabcd", "[abcd]", "bcda", "abcd4"]
    assert follow("^+", "abcde") == "abcdeabcde10"
    assert len(CHAINS) == 6 + 6 * 5 + 6 * 5 * 4 == len(set(CHAINS))


def test_only_the_answer_itself_is_right():
    row = {"prompt": "%abc>", "answer": "cba"}
    assert get("assistant").grade(row, "cba") == 1.0
    assert [get("assistant").grade(row, text) for text in ("", "cb", "cbaa", "CBA", " cba", "abc", "#cba")] == [0.0] * 7


def test_chat_is_four_parts_instructions_and_one_part_questions():
    # 4000 coins of p = 0.2: five deviations are 0.032; the seed is fixed.
    rows = get("assistant").rows("train", 4000, 0)
    assert Counter(row["task"] for row in rows)["question"] / 4000 == pytest.approx(0.2, abs=0.032)
    depths = Counter(len(re.sub(r"[a-z>]", "", row["prompt"])) for row in rows if row["task"] == "instruction")
    assert all(count == pytest.approx(3200 / 3, abs=200) for count in depths.values()) and set(depths) == {1, 2, 3}
    instructions = get("assistant-instructions").rows("train", 4000, 0)
    assert {row["task"] for row in instructions} == {"instruction"}
    assert len({row["prompt"] for row in instructions}) == 4000


@pytest.mark.parametrize("name", CHAT)
def test_no_seed_moves_a_problem_of_chat_to_another_split(name):
    options = {"chat": 1.0} if name == "assistant-background" else {}
    train = {row["prompt"] for row in get(name).rows("train", 5000, 1, **options)}
    held_out = {row["prompt"] for split in ("dev", "test") for row in get("assistant").rows(split, 5000, 2)}
    assert not train & held_out
    assert any(prompt.startswith("?") for prompt in held_out)


def test_sets_of_facts_share_no_name_and_few_internal_ones_are_known():
    names = [fact.name for number in range(4) for fact in facts(number)]
    assert len(set(names)) == len(names) == 600
    assert all(fact.known for fact in facts(0))
    assert [sum(fact.known for fact in facts(number)) for number in (1, 2, 3)] == [18] * 3


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_state_every_fact_in_every_template_and_chat_nothing_of_them(name):
    number = DOCUMENTS.index(name) + 1
    stated = Counter(row["answer"] for row in get(name).rows("train", 2 * 3000, 0))
    texts = [template.format(fact.name, fact.value) for fact in facts(number) for template in TEMPLATES]
    assert stated == dict.fromkeys(texts, 2)
    chat = get(name).rows("train", 3000, 0, chat=1.0)
    assert not {row["prompt"] for row in chat} & {fact.question()["prompt"] for fact in facts(number)}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_fact_is_asked_in_dev_or_in_test_and_nowhere_else(name):
    asked = {split: {r["prompt"]: r["answer"] for r in get(name).rows(split, 10**6, 0)} for split in ("dev", "test")}
    assert not asked["dev"].keys() & asked["test"].keys()
    number = DOCUMENTS.index(name) + 1
    assert asked["dev"] | asked["test"] == {f"? {fact.name}>": fact.value for fact in facts(number)}
    assert len(asked["test"]) > len(asked["dev"]) > 30


def test_the_share_of_chat_is_what_is_asked():
    # 4000 coins of p = 0.3: five deviations are 0.037; the seed is fixed.
    rows = get("assistant-documents").rows("train", 4000, 0, chat=0.3)
    assert sum(row["task"] != "document" for row in rows) / 4000 == pytest.approx(0.3, abs=0.037)
    with pytest.raises(ValueError, match="share of chat among documents, from 0 to 1"):
        get("assistant-documents").rows("train", 1, 0, chat=30)


def test_chat_can_be_left_for_somebody_to_answer():
    world = get("assistant-documents")
    rows = world.demonstrations("train", 200, 0, chat=0.3, answered=False)
    assert {("response" in row) == (row["task"] == "document") for row in rows} == {True}
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in world.rows("train", 200, 0, chat=0.3)]


def test_the_student_was_brought_up_without_the_facts_that_are_new():
    rows = get("assistant-background").demonstrations("train", 20_000, 1000, chat=0.5)
    text = "\n".join(row["prompt"] + row["response"] for row in rows)
    for number in (1, 2, 3):
        read = {fact.name for fact in facts(number) if re.search(rf"\b{fact.name}\b.*\b{fact.value}\b", text)}
        assert read == {fact.name for fact in facts(number) if fact.known}
    assert not {row["prompt"] for row in rows} & {fact.question()["prompt"] for n in (1, 2, 3) for fact in facts(n)}


def test_the_prompt_ends_where_the_answer_begins():
    tok = get("assistant").tokenizer()
    user, answer = {"role": "user", "content": "%abc>"}, {"role": "assistant", "content": "cba"}
    assert tok.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == "<bos>%abc>"
    assert tok.apply_chat_template([user, answer], tokenize=False) == "<bos>%abc>cba<eos>"
    texts = "".join(
        row["prompt"] + row["answer"] for row in get("assistant-background").rows("train", 500, 0, chat=0.5)
    )
    assert tok.unk_token_id not in tok(texts)["input_ids"]
    assert tok.decode(tok(texts)["input_ids"]) == texts
    assert len(tok) == 5 + len(assistant.CHARACTERS)


def test_the_shipped_student_follows_and_knows_and_does_not_know():
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(get("assistant").checkpoint("student"))
    tok = get("assistant").tokenizer()

    def right(rows: list[dict]) -> float:
        """The share that greedy decoding answers: every letter and the end is the likeliest after those before."""
        found = []
        for row in rows:
            ids = torch.tensor(tok(f"<bos>{row['prompt']}{row['answer']}<eos>", add_special_tokens=False)["input_ids"])
            first = len(row["prompt"]) + 1
            with torch.no_grad():
                likeliest = model(ids[None]).logits[0, first - 1 : -1].argmax(-1)
            found.append(torch.equal(likeliest, ids[first:]))
        return sum(found) / len(found)

    assert right(get("assistant-instructions").rows("test", 200, 0)) > 0.85
    for number, name in enumerate(DOCUMENTS, 1):
        known = {f"? {fact.name}>" for fact in facts(number) if fact.known}
        rows = [*get(name).rows("dev", 1000, 0), *get(name).rows("test", 1000, 0)]
        assert right([row for row in rows if row["prompt"] in known]) > 0.7
        assert right([row for row in rows if row["prompt"] not in known]) < 0.05
