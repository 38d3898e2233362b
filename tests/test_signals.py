"""Signals as columns: whatever is joined, cut, moved or measured, each token keeps what was said of it."""

from itertools import pairwise

import pytest
import torch

from kibitz.signals import Anchor, Columns, Dense, FirstTokens, Sampled, Scored, Spans, TopK, cat_signals, locked
from kibitz.types import Prompt, Rollout

HEAD = torch.nn.Linear(3, 5)
SIZES = (4, 1, 0, 3)


def numbers(size, *shape, seed=0):
    return torch.randn(size, *shape, generator=torch.Generator().manual_seed(seed + size))


def dense(size):
    return Dense(numbers(size, 3), HEAD)


def spans(size, first=False):
    """Spans of two tokens; the last may be of one."""
    logps = [numbers(size, seed=seed) for seed in (1, 2)]
    span_T = torch.arange(size) // 2
    made = Spans(span_T, torch.ones(size), torch.full((size,), 2.0), *logps, torch.ones(size))
    shared = torch.tensor([1, 2]), torch.tensor([3, 4])  # made anew for each rollout
    made.first = FirstTokens(dense(size), numbers(size, seed=3), shared) if first else None
    return made


KINDS = {
    "dense": dense,
    "top_k": lambda size: TopK(torch.arange(2 * size).view(size, 2), numbers(size, 2), 2.0, named=True),
    "top_k_and_rest": lambda size: TopK(
        torch.arange(2 * size).view(size, 2), numbers(size, 2), rest_logp_T=numbers(size)
    ),
    "sampled": lambda size: Sampled(numbers(size)),
    "spans": spans,
    "first_tokens": lambda size: spans(size, first=True),
    "anchor": lambda size: Anchor(dense(size), 0.5),
}


def leaves(signal, name=""):
    """Every tensor of a signal, however deep, by its path."""
    found = {}
    for key, column in signal.columns().items():
        found |= leaves(column, f"{name}{key}.") if isinstance(column, Columns) else {name + key: column}
    return found


def rest(signal):
    return {key: value for key, value in vars(signal).items() if key not in signal.columns()}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_the_whole_are_what_was_joined(kind):
    parts = [KINDS[kind](size) for size in SIZES]
    whole, starts = cat_signals(parts), torch.tensor([0, *SIZES]).cumsum(0).tolist()
    assert type(whole) is type(parts[0]) and rest(whole) == rest(parts[0])
    for part, (start, end) in zip(parts, pairwise(starts), strict=True):
        for again in (whole[start:end], whole[torch.arange(start, end)]):
            assert rest(again) == rest(part)
            for name, column in leaves(again).items():
                said = leaves(part)[name]
                if name == "span_T" and len(said):  # counted on in the batch
                    column = column - column[0]
                assert torch.equal(column, said), name


def test_spans_of_several_rollouts_are_counted_on():
    whole = cat_signals([spans(size) for size in SIZES])
    assert whole.span_T.tolist() == [0, 0, 1, 1, 2, 3, 3, 4]


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("dense", ["hidden_TD"]),
        ("top_k", ["ids_TK", "logp_TK"]),
        ("anchor", ["signal.hidden_TD"]),
        ("first_tokens", [*leaves(spans(0)), "first.dense.hidden_TD", "first.rest_logp_T"]),
        ("spans", ["span_T", "size_T", "bytes_T", "teacher_logp_T", "student_logp_T", "comparable_T"]),
    ],
)
def test_columns_are_the_tensors_with_an_entry_for_each_token(kind, columns):
    """The heads' weights and the ids that two vocabularies share belong to no token, and are neither cut nor counted."""
    found = leaves(KINDS[kind](4))
    assert list(found) == columns
    assert KINDS[kind](4).nbytes == sum(column.element_size() * column.numel() for column in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_all_columns_go_to_a_device_and_are_copied_for_a_signal_that_waits(kind):
    signal = KINDS[kind](4)
    assert all(column.is_meta for column in leaves(signal.to("meta")).values())
    assert not any(column.is_meta for column in leaves(signal).values())
    for name, copy in leaves(locked(signal)).items():
        assert torch.equal(copy, leaves(signal)[name])
        assert copy.data_ptr() != leaves(signal)[name].data_ptr()


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (Sampled(numbers(2)), "different kinds"),
        (Dense(numbers(2, 3), torch.nn.Linear(3, 5)), "different head"),
    ],
)
def test_what_one_batch_cannot_hold_is_refused(other, what):
    with pytest.raises(AssertionError, match=what):
        cat_signals([dense(2), other])


def test_top_k_at_two_temperatures_are_no_batch():
    with pytest.raises(AssertionError, match="different temperature"):
        cat_signals([TopK(torch.zeros(1, 1), torch.zeros(1, 1), temperature) for temperature in (1.0, 2.0)])


def test_what_waits_for_the_loss_is_signal_and_anchor():
    rollout = Rollout(Prompt((1,), "", "a"), [2, 3], torch.zeros(2), True)
    assert Scored(rollout, torch.ones(2)).signal_bytes == 0
    assert Scored(rollout, torch.ones(2), Sampled(numbers(2)), anchor=Anchor(dense(2), 0.1)).signal_bytes == 8 + 24


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory takes a GPU")
def test_what_is_page_locked_stays_so_when_it_is_joined():
    parts = [locked(spans(size, first=True).to("cuda")) for size in (4, 3)]
    for name, column in leaves(cat_signals(parts)).items():
        assert name == "span_T" or (column.is_pinned() and column.device.type == "cpu"), name
