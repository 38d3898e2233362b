"""The search for contexts: it finds what was planted and nothing in noise; sums and shares are those of a loop."""

import random

import numpy
import pytest

from kibitz.preflight import forks
from kibitz.preflight.forks import Answer, by_task, by_token, contexts, patterns_before, share_of_worst


def answer(tokens: list[str], nats: list[float], **more) -> Answer:
    given = {"task": "t", "before": [], "instead": ["!"] * len(tokens), "penalty": nats, "reward": None, **more}
    return Answer(tokens=tokens, nats=nats, **given)


def texts(num: int, length: int, seed: int, planted=lambda before: False) -> list[Answer]:
    """Random letters; the two differ by 2 nats, give or take, where `planted` says so of the letters before, else hardly."""
    rng, found = random.Random(seed), []
    for _ in range(num):
        tokens = [rng.choice("abcdefgh") for _ in range(length)]
        nats = [
            rng.uniform(1, 3) if planted(tokens[max(0, t - 16) : t]) else rng.uniform(0, 0.02) for t in range(length)
        ]
        found.append(answer(tokens, nats))
    return found


def has_hole(before: list[str]) -> bool:
    return any(a == "c" and b == "f" for a, b in zip(before, before[2:], strict=False))


def test_a_pair_with_a_hole_is_found_wherever_it_stood_before():
    first, *_ = contexts(texts(60, 20, seed=0, planted=has_hole))
    assert first.patterns == [("near", "c", None, "f")]
    assert first.share > 0.9
    assert first.nats == pytest.approx(2.0, abs=0.2)
    assert first.elsewhere < 0.1


def test_what_stands_directly_before_is_found_as_such():
    first, *_ = contexts(texts(60, 20, seed=1, planted=lambda before: before[-2:] == ["b", "e"]))
    assert first.patterns[0] == ("after", "b", "e")


def test_a_conjunction_is_found_and_then_what_it_leaves():
    def both(before):
        return (before[-1:] == ["a"] and "d" in before) or before[-1:] == ["g"]

    found = contexts(texts(150, 20, seed=2, planted=both))
    assert found[0].patterns == [("after", "g")]
    assert set(found[1].patterns) >= {("after", "a")}
    assert sum(one.share for one in found) > 0.9


def test_noise_has_no_context():
    """Thousands of patterns at 5 standard errors: a random one comes up in less than 1 of 1,000 seeds."""
    assert contexts(texts(60, 20, seed=3)) == []
    assert contexts([answer(["a"] * 20, [0.0] * 20)] * 10) == []
    assert contexts([]) == []
    assert contexts([answer([], [])]) == []


def test_a_token_that_the_teacher_excludes_does_not_speak_for_all():
    """One token of 500 nats in a rare context against 2 nats in each of a common one."""
    found = texts(60, 20, seed=0, planted=has_hole)
    found[0] = answer(["h", "h", "h", "a"] * 5, [500.0] + [0.0] * 19)
    assert contexts(found)[0].patterns == [("near", "c", None, "f")]


def test_patterns_are_those_of_prompt_and_answer_together():
    one = answer(["x", "y"], [0.0, 0.0], before=["p", "q"])
    assert patterns_before(one, 1) == {
        ("after", "x"), ("after", "q", "x"), ("after", "p", "q", "x"),
        ("near", "p"), ("near", "q"), ("near", "x"),
        ("near", "p", "q"), ("near", "q", "x"), ("near", "p", None, "x"),
    }  # fmt: skip
    long = answer([str(i) for i in range(40)], [0.0] * 40)
    assert ("near", "13") not in patterns_before(long, 30)
    assert ("near", "14") in patterns_before(long, 30)


def test_explained_is_the_sum_of_squares_between():
    found = texts(20, 12, seed=4, planted=has_hole)
    places = [(a, t) for a, one in enumerate(found) for t in range(12)]
    nats = numpy.array([found[a].nats[t] for a, t in places])
    index = forks._Index(found, places)
    everything = numpy.ones(len(places), dtype=bool)
    scores = index._explained(nats, everything, everything)
    for name in random.Random(0).sample(range(len(index.names)), 30):
        inside = numpy.array([index.names[name] in patterns_before(found[a], t) for a, t in places])
        within, rest, mean = nats[inside], nats[~inside], nats.mean()
        between = len(within) * (within.mean() - mean) ** 2 + len(rest) * (rest.mean() - mean) ** 2
        assert scores[name] == pytest.approx(between if within.mean() > mean else 0.0)


def test_examples_are_the_worst_places_one_of_an_answer():
    found = [answer(["c", "a", "f", "a", "b"], [0.0, 0.0, 0.0, 2.0 + i, 1.5], instead=list("zzzzz")) for i in range(40)]
    first, *_ = contexts(found)
    assert first.places == [(i, 3) for i in (39, 38, 37, 36, 35)]
    assert first.said[0][:2] in {("a", "z"), ("b", "z")}


def test_forking_tokens_are_counted_with_what_the_teacher_would_say():
    rows = by_token(
        [answer(["a", "b", "a"], [3.0, 0.5, 2.0], instead=["x", "y", "x"]), answer(["a"], [4.5], instead=["z"])]
    )
    assert [(row["said"], row["instead"], row["num"], row["penalty"]) for row in rows] == [
        ("a", "x", 2, 2.5),
        ("a", "z", 1, 4.5),
    ]
    assert [row["share"] for row in rows] == [0.5, 0.45]
    assert [row["places"] for row in rows] == [[(0, 0)], [(1, 0)]]


def test_tasks_share_the_divergence():
    rows = by_task(
        [
            answer(["a"], [3.0], task="u", reward=1.0),
            answer(["a", "b"], [0.5, 0.5]),
            answer(["a"], [0.0], task="u", reward=0.0),
        ]
    )
    assert rows == [
        {"task": "u", "num": 2, "accuracy": 0.5, "nats": 1.5, "share": 0.75},
        {"task": "t", "num": 2 - 1, "accuracy": None, "nats": 0.5, "share": 0.25},
    ]


def test_the_worst_part_of_the_tokens_holds_so_much():
    nats = [float(i) for i in range(200)]
    assert share_of_worst([answer(["a"] * 200, nats)]) == pytest.approx((199 + 198) / sum(nats))
    assert share_of_worst([answer(["a", "b"], [1.0, 3.0])]) == 0.75  # at least one token
    assert share_of_worst([answer(["a"], [0.0])]) == 0.0


def test_the_fork_is_the_token_that_is_punished_most_if_any_is():
    assert answer(["a", "b", "c"], [0, 0, 0], penalty=[1.5, 2.5, -3.0]).fork == 1
    assert answer(["a", "b"], [0, 0], penalty=[0.9, 0.5]).fork is None
