"""Intervals and estimates for shares of correct answers."""

import math


def wilson(successes: float, num: int, z: float = 1.96) -> tuple[float, float]:
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
