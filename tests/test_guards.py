"""Collapse guards: silent on healthy runs however noisy, quick on every collapse, the same after a break."""

import json
import math
import random
import time

import pytest
import torch

from kibitz import config
from kibitz.config import GuardConfig
from kibitz.guards import GUARDS, Alarm, Guards, repetition, rollout_metrics, without_cut_off
from kibitz.losses.overlap import top_k_overlap
from kibitz.types import Prompt, Rollout, Scored

# ------------------------------------------------------------------ runs made up


class Noise:
    """Autocorrelated (phi 0.3) and heavy-tailed (Student's t, 5 degrees): what metrics of successive batches look like."""

    def __init__(self, rng: random.Random, phi: float = 0.3):
        self.rng, self.phi, self.last = rng, phi, 0.0

    def __call__(self) -> float:
        heavy = self.rng.gauss(0, 1) / math.sqrt(self.rng.gammavariate(2.5, 2.0) / 5)
        self.last = self.phi * self.last + math.sqrt(1 - self.phi**2) * heavy / math.sqrt(5 / 3)
        return self.last


def share(rng: random.Random, p: float, num: int) -> float:
    """A share among `num` samples: binomial, in the normal approximation where that is good."""
    if num * p * (1 - p) > 10:
        return min(1.0, max(0.0, round(rng.gauss(num * p, math.sqrt(num * p * (1 - p)))) / num))
    return sum(rng.random() < p for _ in range(num)) / num


def healthy_run(seed: int, steps: int = 200) -> list[dict]:
    """Rows of a run that works: the KL falls, the reward rises (or was high before), the entropy nears the teacher's.

    Levels, rates and noise are drawn anew for each run, from below what toy runs show (64 rollouts a step: KL +-22%,
    length +-6%, reward +-0.06) to above it; Adam's first steps overshoot; one step in fifty is an outlier.
    """
    rng = random.Random(seed)
    noise = {name: Noise(rng) for name in ("kl", "length", "entropy", "teacher", "overlap", "grad", "reward")}
    kl_first, kl_last, pace = rng.uniform(0.1, 0.8), rng.uniform(0.01, 0.1), rng.uniform(10, 120)
    kl_noise, length_noise = rng.uniform(0.05, 0.25), rng.uniform(0.02, 0.08)
    reward_first = rng.uniform(0.1, 0.8)
    reward_gain = rng.uniform(0, 0.9 - reward_first) if reward_first < 0.9 else 0.0
    length, drift = math.exp(rng.uniform(2, 8)), rng.uniform(-0.1, 0.1)
    entropy, teacher = rng.uniform(0.1, 0.6), rng.uniform(0.04, 0.3)
    overlap, num = rng.uniform(0.6, 0.8), rng.choice([64, 128, 256])
    cut, repeated = rng.choice([0.0, 0.02, 0.1, 0.4]), rng.choice([0.0, 0.01, 0.1])
    rows = []
    for step in range(1, steps + 1):
        done = 1 - math.exp(-step / pace)
        overshoot = 1 + 8 * math.exp(-(step - 2) / 2) if step >= 2 else 1.0
        outlier = rng.uniform(2, 8) if rng.random() < 0.02 else 1.0
        kl = (kl_first + (kl_last - kl_first) * done) * overshoot * outlier * math.exp(kl_noise * noise["kl"]())
        rows.append(
            {
                "step": step,
                "loss": kl,
                "reverse_kl": kl,
                "grad_norm": 5 * kl_first * (1 - 0.8 * done) * overshoot * outlier * math.exp(0.35 * noise["grad"]()),
                "reward": share(rng, reward_first + reward_gain * done + 0.02 * noise["reward"](), num),
                "equal_groups": share(rng, 0.3 + 0.4 * done, num // 4),
                "response_tokens": length * (1 + drift * done) * math.exp(length_noise * noise["length"]()),
                "cut_off": share(rng, cut, num),
                "repetition": max(0.0, repeated * (1 + 0.3 * rng.gauss(0, 1))),
                "student_entropy": (entropy + (teacher - entropy) * done) * math.exp(0.1 * noise["entropy"]()),
                "teacher_entropy": teacher * math.exp(0.1 * noise["teacher"]()),
                "top_k_overlap": overlap + 0.15 * done + 0.01 * noise["overlap"](),
            }
        )
    return rows


def healthy_evals(seed: int, num: int = 10) -> list[dict]:
    """pass@8 on 256 prompts stays or rises while the KL falls: nothing but sampling noise moves it down."""
    rng = random.Random(seed)
    level, gain = rng.uniform(0.2, 0.9), rng.uniform(0, 0.08)
    return [
        {
            "step": 20 * i,
            "num_prompts": 256,
            "pass_at_k": {"1": level / 2, "8": share(rng, level + gain * i / num, 256)},
            "reverse_kl": 0.5 * 0.8**i,
        }
        for i in range(num + 1)
    ]


def alarms_of(rows: list[dict], guards: Guards | None = None) -> list[Alarm]:
    guards = guards or Guards(GuardConfig())
    return [alarm for row in rows for alarm in guards.watch_step(row)]


def changed(rows: list[dict], start: int, **values) -> list[dict]:
    """The same rows with some numbers replaced from step `start` on: `name=f(old, steps since)`."""
    return [
        row | {name: f(row[name], row["step"] - start) for name, f in values.items()} if row["step"] >= start else row
        for row in rows
    ]


# ------------------------------------------------------------------ healthy runs


def test_healthy_runs_raise_nothing():
    """At most 1 of 200 healthy runs of 200 steps, with their evaluations, may raise an alarm.

    None of MEASURED did, so the rate is below RATE (95%), and 2 of 200 would come by chance in less than ODDS."""
    runs = 200
    falsely = sum(
        bool(alarms_of(healthy_run(seed)) or [a for row in healthy_evals(seed) for a in evaluator(row)])
        for seed in range(runs)
        for evaluator in [Guards(GuardConfig()).watch_eval]
    )
    assert falsely <= 1
