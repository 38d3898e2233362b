"""Constraints on the form of a response."""

import pytest

from kibitz import graders
from kibitz.types import Prompt


def a_prompt(**columns) -> Prompt:
    return Prompt((1,), "q", "k", columns=columns)


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        ({"type": "min_words", "count": 3}, "one two three", "one two"),
        ({"type": "max_words", "count": 2}, " one two ", "one two three"),
        ({"type": "min_characters", "count": 3}, "日本語", "日本  "),
        ({"type": "max_characters", "count": 3}, "  日本語  ", "日本語だ"),
        ({"type": "num_sentences", "count": 2}, 'It costs 3.50. "Really?!"', "One."),
        ({"type": "num_sentences", "count": 2}, "很好。真的吗？", "很好。"),
        ({"type": "num_sentences", "count": 2}, "The first. And the last one without an end", "The first."),
        ({"type": "num_bullets", "count": 3}, "- a\n * b\n2. c", "- a\n-b\nc - d"),
        ({"type": "num_paragraphs", "count": 2}, "a\nb\n \nc", "a\nb"),
        ({"type": "num_lines", "count": 2}, "a\n\n b", "a"),
        ({"type": "contains", "keywords": ["Tea", "milk"]}, "TEA with Milk", "tea only"),
        ({"type": "contains", "keywords": ["tea"], "whole_words": True}, "a cup of tea.", "a team"),
        ({"type": "not_contains", "keywords": ["cat"]}, "dog", "concatenate"),
        ({"type": "not_contains", "keywords": ["c++"], "whole_words": True}, "abc++", "I like C++."),
        ({"type": "num_occurrences", "keyword": "ja", "count": 2}, "ja ja", "ja"),
        ({"type": "starts_with", "prefix": "Dear"}, "\nDear Ada", "dear Ada"),
        ({"type": "ends_with", "suffix": "Bye."}, "So long. Bye.\n", "Bye. So long."),
        ({"type": "regex", "pattern": r"\d{3}"}, "abc 123", "12 3"),
        ({"type": "regex", "pattern": r"\d+", "whole": True}, "123", "123a"),
        ({"type": "all_lowercase"}, "it is 5 o'clock, é", "It is"),
        ({"type": "all_uppercase"}, "IT IS 5", "IT is"),
        ({"type": "json"}, '```json\n{"a": [1, null]}\n```', "{'a': 1}"),
        ({"type": "json"}, "[1e3]", "[NaN]"),
        ({"type": "json"}, "5", "[" * 100_000),
    ],
)
def test_each_constraint_tells_good_from_bad(constraint, good, bad):
    rewards = [graders.constraints(a_prompt(constraints=[constraint]), text) for text in (good, bad, " \n")]
    assert rewards == [1, 0, 0]


def test_a_share_or_all_of_them():
    short = {"type": "max_words", "count": 2, "keywords": None}  # a table fills the gaps of a row with None
    prompt = a_prompt(constraints=[short, {"type": "all_lowercase"}, {"type": "contains", "keywords": ["x"]}])
    assert graders.constraints(prompt, "an X") == pytest.approx(2 / 3)
    assert graders.constraints_strict(prompt, "an X") == 0
    assert graders.constraints_strict(prompt, "an x") == 1


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (None, "prompt k: no constraints"),
        ("max_words", "no constraints"),
        (
            [{"type": "max_word", "count": 1}],
            "prompt k: constraints: there is no constraint 'max_word': did you mean max_words?",
        ),
        ([{"type": "zzzzz"}], "there are min_words, "),
        ([{"count": 1}], 'a constraint is {"type"'),
        ([{"type": "max_words"}], "the constraint max_words takes count: int: missing"),
        ([{"type": "max_words", "count": 1, "prefix": "a"}], "takes count: int: got an unexpected"),
        ([{"type": "json", "text": "5"}], "takes no options"),
        ([{"type": "max_words", "count": "5"}], "count = '5': write a whole number"),
        ([{"type": "max_words", "count": True}], "write a whole number"),
        ([{"type": "contains", "keywords": "tea"}], "keywords = 'tea': write a list of texts"),
        ([{"type": "contains", "keywords": [""]}], "write a list of texts"),
        ([{"type": "regex", "pattern": "("}], "no regular expression, '\\('"),
    ],
)
def test_a_constraint_that_is_none_is_an_error(constraints, message):
    with pytest.raises(ValueError, match=message):
        graders.constraints(a_prompt(constraints=constraints), "text")
