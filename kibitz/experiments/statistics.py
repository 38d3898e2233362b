"""The arithmetic of findings: cost at equal accuracy, fits, bootstrap intervals. Deterministic: every draw has a seed."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

Curve = Mapping[float, Sequence[float]]
"""cost -> accuracy of each seed at that cost."""
NUM_DRAWS = 2000
Estimate = tuple[float, float]
"""A mean, and half its 95% interval."""


def cost_at(points: Sequence[tuple[float, float]], target: float) -> float:
    """The cost at which accuracy first reaches the target, with log cost linear in accuracy between two points; infinite if it
    never does. A point below an earlier one counts as that one: one could have stopped there. A target below the first point
    costs no less than that one: what is cheaper was not run."""
    ordered = sorted(points)
    best = -math.inf
    before: tuple[float, float] | None = None
    for cost, accuracy in ordered:
        if accuracy >= target:
            if before is None:
                return cost
            share = (target - before[1]) / (accuracy - before[1])
            return math.exp(math.log(before[0]) + share * (math.log(cost) - math.log(before[0])))
        if accuracy > best:
            best, before = accuracy, (cost, accuracy)
        elif before is not None:
            before = (cost, best)
    return math.inf


def part_way(start: float, end: float, share: float) -> float:
    """The accuracy that lies so much of the way from one to another."""
    return start + share * (end - start)


def resampled(curve: Curve, num_problems: int, rng: random.Random) -> list[tuple[float, float]]:
    """One draw of a curve: seeds with replacement at each cost, and the noise of a finite number of problems."""
    found = []
    for cost, shares in curve.items():
        mean = fmean(rng.choices(list(shares), k=len(shares)))
        found.append((cost, mean + rng.gauss(0.0, math.sqrt(max(0.0, mean * (1 - mean)) / num_problems))))
    return found


def means(curve: Curve) -> list[tuple[float, float]]:
    return [(cost, fmean(shares)) for cost, shares in curve.items()]


def interval(draws: Sequence[float]) -> tuple[float, float]:
    """The middle 95% of draws; an end may be infinite."""
    ordered = sorted(draws)
    last = len(ordered) - 1
    return ordered[round(0.025 * last)], ordered[round(0.975 * last)]


def cost_ratio(
    dear: Curve, cheap: Curve, target: float, num_problems: int, seed: int = 0
) -> tuple[float, float, float]:
    """Return the ratio of the costs of `dear` and `cheap` up to a target accuracy, and its 95% bootstrap interval over seeds and
    problems. It is infinite where `dear` does not get there; a draw in which neither gets there counts as 1."""
    rng = random.Random(seed)

    def ratio(above: Sequence[tuple[float, float]], below: Sequence[tuple[float, float]]) -> float:
        first, second = cost_at(above, target), cost_at(below, target)
        return 1.0 if first == second else first / second

    draws = [ratio(resampled(dear, num_problems, rng), resampled(cheap, num_problems, rng)) for _ in range(NUM_DRAWS)]
    return ratio(means(dear), means(cheap)), *interval(draws)


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope by least squares."""
    x_mean, y_mean = fmean(xs), fmean(ys)
    square = sum((x - x_mean) ** 2 for x in xs)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / square
    return y_mean - slope * x_mean, slope


def bootstrap(
    curve: Curve, num_problems: int, value: Callable[[list[tuple[float, float]]], float], seed: int = 0
) -> tuple[float, float, float]:
    """Any figure of a curve's means, with its 95% interval over seeds and problems."""
    rng = random.Random(seed)
    draws = [value(resampled(curve, num_problems, rng)) for _ in range(NUM_DRAWS)]
    return value(means(curve)), *interval(draws)


def apart(above: Estimate, below: Estimate) -> bool:
    """Return True if one mean is above another by more than the 95% interval of their difference."""
    return above[0] - below[0] > math.hypot(above[1], below[1])


def share_of_way(start: float, end: Estimate, top: float) -> Estimate:
    """Return the share of the gap from `start` to `top` that an arm closed, and half its interval; 0 where there is no gap."""
    way = top - start
    return ((end[0] - start) / way, abs(end[1] / way)) if way else (0.0, 0.0)
