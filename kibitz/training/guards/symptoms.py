"""One number of a run over time, and how each guard reads it: how bad things are, and in words."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import NamedTuple

from kibitz.config import GuardConfig

CERTAIN = 0.01
"""Nats per token. A KL or an entropy below it is as good as zero: its ratios mean nothing."""

CALM = 0.5
"""A problem begins at severity 1 and is over below this."""

CLEAR = 2.0
"""Deviations that tell a gain, or a movement, from noise."""


@dataclass
class Series:
    """The history of one number: its first values, its last two windows, the lowest and the highest window's median."""

    window: int
    num_early: int
    early: list[float] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    extremes: list[float] = field(default_factory=list)
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        if len(self.early) < self.num_early:
            self.early.append(value)
        self.recent = [*self.recent, value][-2 * self.window :]
        if self.ready and (self.count - self.num_early) % self.window == 0:  # windows that do not overlap
            levels = [*self.extremes, self.now if self.extremes else self.start]
            self.extremes = [min(levels), max(levels)]

    @property
    def ready(self) -> bool:
        return self.count >= self.num_early

    @property
    def start(self) -> float:
        return median(self.early)

    @property
    def now(self) -> float:
        return median(self.recent[-self.window :])

    @property
    def stands_still(self) -> bool:
        """Return whether the last two windows are full and do not differ."""
        before = self.recent[: -self.window]
        return len(before) == self.window and abs(self.sigmas(self.now - median(before))) <= CLEAR

    @property
    def lowest(self) -> float:
        return self.extremes[0]

    @property
    def highest(self) -> float:
        return self.extremes[1]

    def sigmas(self, change: float, log: bool = False) -> float:
        """A difference of two medians in units of its own deviation, sqrt(pi / window) times that of one step.

        One step's deviation comes from the differences of neighbours, which a trend leaves alone: the mean of the
        smaller 90% of them, over 0.930 for normal noise. (Their median would do badly on rewards, which come in a few
        sizes.) `log` is for a change of logarithms. In a series without noise any change is infinitely clear."""
        parts = (self.early, self.recent)
        if log:
            parts = tuple([math.log(max(value, 1e-12)) for value in part] for part in parts)
        steps = sorted(abs(b - a) for part in parts for a, b in pairwise(part))
        deviation = fmean(steps[: math.ceil(0.9 * len(steps))]) / 0.930 * math.sqrt(math.pi / self.window)
        if deviation == 0:
            return math.copysign(math.inf, change) if change else 0.0
        return change / deviation


Numbers = Mapping[str, Series]
"""Those with a whole early window."""


class Reading(NamedTuple):
    """The severity of a symptom, 1 being the threshold, and the symptom in words."""

    severity: float
    symptom: str = ""


NOTHING = Reading(0.0)


def _reading(
    effect: float, change: float, series: Series, config: GuardConfig, text: str, log: bool = False
) -> Reading:
    """`effect` is the change in units of its threshold; the noise is looked at only where that calls for it."""
    if effect < CALM:
        return NOTHING
    return Reading(min(effect, series.sigmas(change, log) / config.sigmas), text)


def _better(series: Series | None, sign: int) -> bool:
    """Return whether a number, if the run has it, is clearly better than at the start."""
    return series is not None and series.sigmas(sign * (series.now - series.start)) > CLEAR


def _log_ratio(a: float, b: float) -> float:
    return math.log(max(a, 1e-12) / max(b, 1e-12))


def length_inflation(run: Numbers, config: GuardConfig) -> Reading:
    """Growth is what a long-winded teacher teaches, so it must come without gain: of reward, or else of reverse KL.
    Where responses are stopped on purpose, their length says where, and nothing of the student."""
    if "shortened" in run and max(run["shortened"].start, run["shortened"].now) > 0:
        return NOTHING
    length, judge = run["response_tokens"], next((name for name in ("reward", "reverse_kl") if name in run), None)
    growth = _log_ratio(length.now, length.start)
    if growth <= 0 or (judge and _better(run[judge], 1 if judge == "reward" else -1)):
        return NOTHING
    text = f"responses grew from {length.start:.3g} to {length.now:.3g} tokens"
    text += {"reward": ", and the reward did not rise", "reverse_kl": ", and the reverse KL did not fall", None: ""}[
        judge
    ]
    return _reading(growth / math.log(config.length_ratio), growth, length, config, text, log=True)


def cut_off(run: Numbers, config: GuardConfig) -> Reading:
    share = run["cut_off"]
    rise = share.now - share.start
    text = f"{share.now:.0%} of the responses are cut off at the token limit; at first it was {share.start:.0%}"
    return max(
        _reading(rise / config.cut_off_rise, rise, share, config, text), Reading(share.now / config.cut_off_share, text)
    )


def repetition(run: Numbers, config: GuardConfig) -> Reading:
    share, n = run["repetition"], config.repetition_ngram
    rise = share.now - share.start
    text = (
        f"{share.now:.0%} of the tokens repeat {n} tokens or more of their response; at first it was {share.start:.0%}"
    )
    return _reading(rise / config.repetition_rise, rise, share, config, text)


def entropy_collapse(run: Numbers, config: GuardConfig) -> Reading:
    """A student that becomes as certain as its teacher is what was wanted: the lesser of the two is the measure. With
    neither a teacher nor a reward the run is supervised, and being certain of the data's text is what it is for."""
    student, teacher = run["student_entropy"], run.get("teacher_entropy")
    if "reverse_kl" not in run and "reward" not in run:
        return NOTHING
    normal = student.start if teacher is None else min(student.start, teacher.now)
    if normal < CERTAIN:
        return NOTHING
    fall = _log_ratio(normal, student.now)
    whose = "at first it was" if normal == student.start else "the teacher's is"
    text = f"the student's entropy is {student.now:.3g} nats a token; {whose} {normal:.3g}"
    return _reading(fall / -math.log(config.entropy_share), fall, student, config, text, log=True)


def overlap_falling(run: Numbers, config: GuardConfig) -> Reading:
    share = run["top_k_overlap"]
    fall = share.highest - share.now
    text = (
        f"{share.now:.0%} of the student's likeliest tokens are among the teacher's; at best it was {share.highest:.0%}"
    )
    return _reading(fall / config.overlap_drop, fall, share, config, text)


def kl_rising(run: Numbers, config: GuardConfig) -> Reading:
    """A student that surpasses its teacher moves away from it, so it must come without more reward."""
    kl = run["reverse_kl"]
    if kl.now < kl.lowest + CERTAIN or _better(run.get("reward"), 1):
        return NOTHING
    rise = _log_ratio(kl.now, max(kl.lowest, CERTAIN))
    text = f"the reverse KL to the teacher is {kl.now:.3g} nats a token; at best it was {kl.lowest:.3g}"
    return _reading(rise / math.log(config.kl_ratio), rise, kl, config, text, log=True)


def reward_falling(run: Numbers, config: GuardConfig) -> Reading:
    reward = run["reward"]
    fall = reward.highest - reward.now
    text = f"the reward is {reward.now:.3g}; at best it was {reward.highest:.3g}"
    return _reading(fall / max(config.reward_drop * abs(reward.highest), 1e-12), fall, reward, config, text)


def student_stuck(run: Numbers, config: GuardConfig) -> Reading:
    """Nothing moves and nothing pushes. A distance of nearly zero is not stuck but learnt."""
    reward, groups, norm = run.get("reward"), run.get("equal_groups"), run["grad_norm"].now
    distance = run.get("reverse_kl") or (None if reward else run.get("loss"))
    if distance is not None and distance.now < CERTAIN:
        return NOTHING
    goals = [series for series in (distance, reward) if series is not None]
    if not all(series.stands_still for series in goals):
        return NOTHING
    if norm <= config.stuck_grad_norm:
        return Reading(1.0, f"the gradient's norm is {norm:.1g} and nothing moves, though there is something to learn")
    if distance is None and groups is not None and groups.now >= config.stuck_equal_groups:
        return Reading(
            1.0, f"{groups.now:.0%} of the prompts have samples of equal reward, and the reward stands still"
        )
    return NOTHING
