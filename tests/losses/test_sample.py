"""Metrics that cost as much as the loss are those of a sample of tokens; the loss and all else is of every token."""

import pytest
import torch

from kibitz.losses.chunked import over_chunks
from kibitz.losses.criteria import Divergence, PolicyGradient
from kibitz.losses.divergences import jsd
from kibitz.losses.supports import rest_beside
from kibitz.signals import Dense, Tokens, TopK
from kibitz.training.means import sums_of

T, D, V = 60, 8, 50
OF_SAMPLE = {"student_entropy", "teacher_entropy", "top_k_overlap", "overlap_mass", "reverse_kl"}


def case(every: int, kind: str) -> tuple[torch.Tensor, torch.nn.Module, Tokens]:
    generator = torch.Generator().manual_seed(3)
    hidden, theirs = (torch.randn(T, D, generator=generator) for _ in range(2))
    heads = [torch.nn.Linear(D, V, bias=False) for _ in range(2)]
    with torch.no_grad():
        for head in heads:
            head.weight.copy_(torch.randn(V, D, generator=generator))
        signal: Dense | TopK = Dense(theirs, heads[1])
        if kind == "top_k":
            logp_TV = heads[1](theirs).log_softmax(-1)
            best = logp_TV.topk(5)
            signal = TopK(best.indices, best.values, rest_logp_T=rest_beside(logp_TV, best.indices))
    weight_T = (torch.rand(T, generator=generator) > 0.3).float()
    token_T = torch.randint(V, (T,), generator=generator)
    return hidden.requires_grad_(), heads[0], Tokens(token_T, weight_T, -torch.ones(T), signal, every=every, first=2)


CASES = {
    "reverse KL": (Divergence(), "dense", OF_SAMPLE - {"reverse_kl"}),
    "another": (Divergence(jsd), "dense", OF_SAMPLE),
    "baseline": (PolicyGradient(baseline=True), "dense", OF_SAMPLE - {"reverse_kl"}),
    "warm": (Divergence(temperature=2.0), "dense", OF_SAMPLE),
    "top k": (Divergence(support="teacher", top_k=5), "top_k", {"student_entropy", "reverse_kl"}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [7, 64])
def test_a_sample_is_of_the_same_numbers_and_the_loss_of_all(name, chunk):
    criterion, kind, sampled = CASES[name]
    results = []
    for every in (1, 4):
        hidden, head, tokens = case(every, kind)
        total, values = over_chunks(criterion, hidden, head, tokens, chunk)
        total.backward()
        results.append((total.detach(), values, hidden.grad, head.weight.grad))
    (total, whole, *grads), (same_total, some, *same_grads) = results
    assert torch.equal(total, same_total)
    assert all(torch.equal(one, other) for one, other in zip(grads, same_grads, strict=True))
    assert {name for name, value in some.items() if len(value) < T} == sampled
    for name, value in some.items():
        wanted = whole[name][2::4] if name in sampled else whole[name]
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)


def test_the_sum_of_a_sample_is_its_mean_times_the_learnt_tokens():
    """So that what is equal everywhere has that mean exactly, and micro-batches weigh by their tokens."""
    weight_T = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    tokens = Tokens(
        torch.zeros(8, dtype=torch.long), weight_T, torch.zeros(8), every=3, first=1
    )  # 1, 4, 7: one is learnt
    sums = sums_of({"loss": torch.arange(8.0), "of three": torch.tensor([90.0, torch.nan, 5.0])}, tokens)
    assert sums == {"loss": 0.0 + 2 + 3 + 5 + 6 + 7, "of three": 5.0 * 6}
    idle = Tokens(torch.zeros(8, dtype=torch.long), torch.zeros(8), torch.zeros(8), every=3, first=1)
    assert sums_of({"of three": torch.ones(3)}, idle) == {"of three": 0.0}


def test_the_sample_of_a_chunk_is_the_samples_part():
    tokens = Tokens(torch.arange(23), torch.ones(23), torch.zeros(23), every=5, first=3)
    parts = [tokens[slice(start, start + 4)] for start in range(0, 23, 4)]
    assert torch.cat([part.token_T[part.sample] for part in parts]).tolist() == [3, 8, 13, 18]
