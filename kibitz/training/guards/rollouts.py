"""Measures of a step's rollouts that guards watch, and the choice of those that are masked."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from kibitz.config import GuardConfig
from kibitz.types import Rollout


def repetition(response_ids: Sequence[int], n: int = 8) -> float:
    """The share of tokens that lie inside an n-gram which stood earlier in the same response. Time is linear.

    The first occurrence does not count: text without repeats gives 0, and T tokens of a loop of period p give
    (T - p) / T as soon as T >= p + n."""
    seen: set[tuple[int, ...]] = set()
    num_repeated, covered = 0, 0  # tokens before `covered` are counted, or are not repeated
    for start, gram in enumerate(zip(*(response_ids[i:] for i in range(n)), strict=False)):
        if gram in seen:
            num_repeated += start + n - max(start, covered)
            covered = start + n
        else:
            seen.add(gram)
    return num_repeated / len(response_ids) if response_ids else 0.0


def rollout_metrics(rollouts: Sequence[Rollout], config: GuardConfig) -> dict[str, float]:
    """`repetition`, the mean over responses; and `equal_groups`, the share of prompts whose samples all have one
    reward, where there are groups and rewards. Both belong into the step's row."""
    groups: dict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        if rollout.reward is not None:
            groups[rollout.prompt.key].append(rollout.reward)
    several = [rewards for rewards in groups.values() if len(rewards) > 1]
    metrics = {"repetition": fmean(repetition(r.response_ids, config.repetition_ngram) for r in rollouts)}
    return metrics | ({"equal_groups": fmean(len(set(rewards)) == 1 for rewards in several)} if several else {})


def shows_symptom(rollout: Rollout, config: GuardConfig, longest: float | None) -> bool:
    """Return whether a guard whose action is `mask` takes this rollout out. `longest` is the longest response of the first steps,
    None while these go on. A rollout that was shortened on purpose is not cut off; one that joins the method's own, as gold
    responses do, is never left out."""
    if rollout.objective:
        return False
    return (
        (config.cut_off == "mask" and rollout.cut_off)
        or (config.repetition == "mask" and _repeats(rollout, config))
        or (config.length_inflation == "mask" and longest is not None and _inflated(rollout, config, longest))
    )


def _repeats(rollout: Rollout, config: GuardConfig) -> bool:
    return repetition(rollout.response_ids, config.repetition_ngram) > config.repetition_share


def _inflated(rollout: Rollout, config: GuardConfig, longest: float) -> bool:
    return rollout.num_tokens > config.length_ratio * longest
