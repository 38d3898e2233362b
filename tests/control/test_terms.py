"""The teacher's terms: against torch's own distributions, their limits, and an optimum that is known."""

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal, kl_divergence

pytest.importorskip("stable_baselines3")

from kibitz.control import terms

G = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def test_gaussian_kl_is_torchs_and_zero_for_equal_ones():
    mean, other, std, other_std = normal(7, 3), normal(7, 3), normal(7, 3).exp(), normal(7, 3).exp()
    wanted = kl_divergence(Independent(Normal(mean, std), 1), Independent(Normal(other, other_std), 1))
    torch.testing.assert_close(terms.gaussian_kl(mean, std, other, other_std), wanted)
    assert terms.gaussian_kl(mean, std, mean, std).abs().max() < 1e-12


def test_categorical_kl_and_cross_entropy_are_torchs():
    logp, other = normal(7, 4).log_softmax(-1), normal(7, 4).log_softmax(-1)
    wanted = kl_divergence(Categorical(logits=logp), Categorical(logits=other))
    torch.testing.assert_close(terms.categorical_kl(logp, other), wanted)
    entropy = Categorical(logits=other).entropy()
    torch.testing.assert_close(terms.cross_entropy(logp, other), entropy + terms.categorical_kl(other, logp))


def test_an_action_that_is_never_taken_adds_nothing():
    never = torch.tensor([[0.0, -torch.inf]])
    torch.testing.assert_close(terms.categorical_kl(never, torch.tensor([[0.5, 0.5]]).log()), torch.tensor([0.6931472]))


def test_squared_and_absolute_are_means_over_the_numbers_of_an_action():
    mean, action = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert terms.squared(mean, action).tolist() == [2.5]
    assert terms.absolute(mean, action).tolist() == [1.5]


def test_the_proximal_weight_is_the_ratio_above_the_clip():
    ratio = torch.tensor([0.5, 0.9, 1.5], requires_grad=True)
    found = terms.proximal(torch.ones(3), ratio, 0.2)
    assert found.tolist() == pytest.approx([0.8, 0.9, 1.5])
    found.sum().backward()
    assert ratio.grad.tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(("done", "wanted"), [(0.0, 1.0), (0.25, 0.5), (0.5, 0.0), (0.9, 0.0)])
def test_lambda_falls_by_half_a_cosine(done, wanted):
    assert terms.cosine(done, 0.5) == pytest.approx(wanted)
    assert terms.cosine(done, None) == 1.0


def test_reward_and_reverse_kl_meet_at_the_known_optimum():
    """max E r - lambda KL(S, T) is solved by S ~ T exp(r / lambda), in each of two states."""
    reward, weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64), 0.7
    teacher = torch.tensor([[0.3, 0.7], [0.9, 0.1]], dtype=torch.float64).log()
    logits = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logp = logits.log_softmax(-1)
        loss = (weight * terms.categorical_kl(logp, teacher) - (logp.exp() * reward).sum(-1)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    wanted = (teacher + reward / weight).log_softmax(-1)
    torch.testing.assert_close(logits.detach().log_softmax(-1), wanted, atol=1e-6, rtol=0)
