"""Intervals and estimates for shares of correct answers and for mean rewards."""

import math
from collections.abc import Sequence
from statistics import fmean, variance

Z = 1.959964
"""The 97.5% quantile of the normal distribution."""
# The same of Student's t, for 1 to 30 degrees of freedom.
T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def t_quantile(df: int) -> float:
    """The 97.5% quantile of Student's t with `df` degrees of freedom, to 1e-3 (beyond 30 by Fisher's expansion in 1/df);
    infinite for none."""
    if df < 1:
        return math.inf
    if df <= len(T):
        return T[df - 1]
    return Z + (Z**3 + Z) / (4 * df) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * df**2)


def interval(groups: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """The mean over prompts of each one's mean reward, and the ends of its 95% interval.

    A prompt is one observation, however many samples it has. Rewards in [0, 1] have Wilson's interval; with several samples
    a prompt it is that of the effective number of observations (Korn and Graubard 1998): the one that has the variance seen
    between prompts, at least the number of prompts and at most that of samples. Other rewards have the interval of
    Student's t."""
    means = [fmean(group) for group in groups]
    mean, num = fmean(means), len(means)
    between = variance(means) / num if num > 1 else 0.0
    if not all(0.0 <= value <= 1.0 for value in means):
        half = t_quantile(num - 1) * math.sqrt(between) if num > 1 else math.inf
        return mean, mean - half, mean + half
    num_samples = sum(map(len, groups))
    effective = float(num)
    if num_samples > num and between > 0.0:
        effective = mean * (1 - mean) / between * (Z / t_quantile(num - 1)) ** 2
        effective = min(max(effective, num), num_samples)
    return mean, *wilson(mean * effective, effective)


def wilson(successes: float, num: float, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927): it stays inside [0, 1] and is honest near the ends."""
    if num == 0:
        return 0.0, 1.0
    share, spread = successes / num, z * z / num
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(num: int, correct: int, k: int) -> float:
    """Unbiased estimate from `num` samples of which `correct` are right (Chen et al. 2021, 2107.03374, eq. 1)."""
    if num - correct < k:
        return 1.0
    return 1.0 - math.comb(num - correct, k) / math.comb(num, k)
