"""Packing: nothing lost, nothing twice, everything at its position."""

import random

import pytest
import torch

from kibitz.batching import group, micro_batches, pack
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
