"""Packing: nothing lost, nothing twice, everything at its position."""

import itertools
import math
import random
from collections.abc import Iterator

import pytest
import torch

from kibitz.batching import OVERHEAD, group, micro_batches, pack
from kibitz.signals import Dense, Sampled, Scored, TopK
from kibitz.types import Prompt, Rollout, Writer


def random_rollouts(rng: random.Random, num: int) -> list[Rollout]:
    rollouts = []
    for index in range(num):
        prompt = Prompt(tuple(rng.randrange(1, 50) for _ in range(rng.randrange(1, 9))), "", str(index))
        response = [rng.randrange(1, 50) for _ in range(rng.randrange(1, 12))]
        rollouts.append(Rollout(prompt, response, torch.rand(len(response)), finished=True))
    return rollouts


def test_groups_hold_each_rollout_once_and_respect_the_bound():
    rng = random.Random(0)
    for max_tokens in (1, 20, 64, 10_000):
        rollouts = random_rollouts(rng, 40)
        groups = group(rollouts, max_tokens)
        assert sorted(index for members in groups for index in members) == list(range(40))
        for members in groups:
            longest = max(len(rollouts[i].prompt.ids) + rollouts[i].num_tokens for i in members)
            assert len(members) == 1 or len(members) * longest <= max_tokens
    assert len(group(rollouts, 10_000)) == 1


def of_length(length: int) -> Rollout:
    return Rollout(Prompt((1,), "", "p"), [1] * (length - 1), torch.zeros(length - 1), finished=True)


def every_cut(lengths: list[int]) -> Iterator[list[list[int]]]:
    """All ways to cut a list in pieces."""
    for chosen in itertools.product([False, True], repeat=len(lengths) - 1):
        pieces = [[lengths[0]]]
        for cut, length in zip(chosen, lengths[1:], strict=True):
            if cut:
                pieces.append([])
            pieces[-1].append(length)
        yield pieces


@pytest.mark.parametrize("max_tokens", [700, 2_500, 100_000])
def test_groups_are_cut_where_fewest_positions_are_computed_in_vain(max_tokens):
    rng = random.Random(0)
    for _ in range(20):
        lengths = sorted((int(rng.expovariate(1 / 300)) + 2 for _ in range(9)), reverse=True)
        rollouts = [of_length(length) for length in lengths]
        groups = group(rollouts, max_tokens)

        def cost(pieces: list[list[int]]) -> float:
            if any(len(piece) > 1 and len(piece) * piece[0] > max_tokens for piece in pieces):
                return math.inf
            return sum(len(piece) * piece[0] + OVERHEAD for piece in pieces)

        assert cost([[lengths[i] for i in members] for members in groups]) == min(map(cost, every_cut(lengths)))
        for members in groups:
            assert len(group([rollouts[i] for i in members], max_tokens)) == 1


def test_a_long_response_does_not_pad_the_short_ones():
    lengths = [2000, *[100] * 40]
    assert group([of_length(length) for length in lengths], 16_384) == [[0], list(range(1, 41))]
    spread = [of_length(length) for length in range(20, 276)]
    computed = sum(len(members) * spread[members[0]].num_tokens for members in group(spread, 16_384))
    assert computed < 1.15 * sum(r.num_tokens for r in spread)


def test_each_position_scores_the_token_to_its_right():
    """For every response token: the flat position holds the token before it, and the next one is the token itself."""
    rollouts = random_rollouts(random.Random(1), 20)
    batch = pack([Scored(r, r.weight_T()) for r in rollouts])
    flat = batch.ids_BL.flatten()
    assert torch.equal(flat[batch.position_T + 1], batch.tokens.token_T)
    before = [
        ([*r.prompt.ids, *r.response_ids])[len(r.prompt.ids) - 1 + i] for r in rollouts for i in range(r.num_tokens)
    ]
    assert flat[batch.position_T].tolist() == before


def test_signals_stay_with_their_tokens_and_slices_agree():
    rollouts = random_rollouts(random.Random(2), 6)

    def head(hidden):
        return hidden

    kinds = {
        "sampled": lambda r: Sampled(torch.tensor(r.response_ids).float()),
        "top_k": lambda r: TopK(
            torch.tensor(r.response_ids)[:, None], torch.tensor(r.response_ids)[:, None].float(), 2.0
        ),
        "dense": lambda r: Dense(torch.tensor(r.response_ids)[:, None].float(), head),
    }
    for make in kinds.values():
        tokens = pack([Scored(r, r.weight_T(), make(r)) for r in rollouts]).tokens
        part = tokens[slice(3, 9)]
        match part.signal:
            case Sampled(logp_T):
                seen = logp_T
            case TopK(ids_TK, _, temperature):
                seen = ids_TK[:, 0]
                assert temperature == 2.0
            case Dense(hidden_TD, _):
                seen = hidden_TD[:, 0]
        assert torch.equal(seen.long(), part.token_T)
        assert len(part.weight_T) == len(part.logp_T) == 6


def test_nobody_learns_from_the_environment():
    writer_T = torch.tensor([Writer.STUDENT, Writer.ENVIRONMENT, Writer.TEACHER, Writer.DATASET], dtype=torch.uint8)
    rollout = Rollout(Prompt((1,), "", "a"), [2, 3, 4, 5], torch.zeros(4), True, writer_T=writer_T)
    assert rollout.weight_T().tolist() == [1, 0, 1, 1]


def test_a_micro_batch_holds_one_objective_and_its_numbers_stay_with_their_tokens():
    rollouts = random_rollouts(random.Random(3), 5)
    scored = [
        Scored(r, torch.ones(r.num_tokens), numbers={"n": torch.arange(r.num_tokens) + 10.0 * i}, objective="ab"[i % 2])
        for i, r in enumerate(rollouts)
    ]
    found = micro_batches(scored, 1000)
    assert sorted(sorted(indices) for indices in found) == [[0, 2, 4], [1, 3]]
    batch = pack([scored[i] for i in found[0]])
    assert batch.objective == scored[found[0][0]].objective
    want = torch.cat([scored[i].numbers["n"] for i in found[0]])
    assert torch.equal(batch.tokens.numbers["n"], want)
    assert torch.equal(batch.tokens[2:4].numbers["n"], want[2:4])
    with pytest.raises(AssertionError, match="mixes objectives"):
        pack(scored)
