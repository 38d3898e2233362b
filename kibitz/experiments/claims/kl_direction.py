"""Reverse KL seeks modes and forward KL covers them; and both who writes and which direction matter."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.claims.methods import METHODS
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.results import Results
from kibitz.experiments.shapes import compared, turned
from kibitz.experiments.statistics import Estimate, apart
from kibitz.losses.divergences import forward_kl, reverse_kl

ARMS = {
    "student": {"reverse": "opd", "forward": "opd-fkl"},
    "teacher": {"reverse": "kd-rkl", "forward": "kd-fkl"},
}
"""Who writes the text -> the direction of the KL -> the arm."""
PLACES = 41  # of the two-mode example: 70% around one, 30% around another
DIVERGENCES = {"reverse": reverse_kl, "forward": forward_kl}


def find(results: Results) -> Finding:
    """Compare the four pairs of writer and divergence, and fit a student with one mode to a teacher with two."""
    corners = {writer: {kl: results.accuracy(arm) for kl, arm in arms.items()} for writer, arms in ARMS.items()}
    hills = {kl: one_hill(kl) for kl in DIVERGENCES}
    numbers = {
        "corners": corners,
        "hill": {kl: near(hills[kl], 0) for kl in DIVERGENCES},
        "free": {kl: near(unconstrained(kl), 0) for kl in DIVERGENCES},
    }
    drawn = [Line("teacher", _points(teacher()), dashed=True), *(Line(f"{kl} KL", _points(hills[kl])) for kl in hills)]
    written = {
        f"{kl} KL": {f"{writer}'s text": share for writer, share in by.items()} for kl, by in turned(corners).items()
    }
    names = [f"{writer}'s text" for writer in ARMS]
    return Finding(
        verdict(corners),
        numbers,
        (
            Panel("one hill against two", "place", "probability", drawn),
            compared("who writes, which direction", "accuracy", names, written, joined=True),
        ),
    )


def verdict(corners: Mapping[str, Mapping[str, Estimate]]) -> Verdict:
    """Reproduced if the student's text with reverse KL is above each other corner by the interval of the difference; partly if
    its accuracy is the highest."""
    best, *rest = (share for by in corners.values() for share in by.values())
    if all(apart(best, other) for other in rest):
        return "reproduced"
    return "partly" if all(best[0] > other[0] for other in rest) else "not"


def teacher() -> torch.Tensor:
    """70% around place 10, 30% around place 30, as log-probabilities."""
    return torch.logaddexp(math.log(0.7) + hill(10.0, 2.0), math.log(0.3) + hill(30.0, 2.0))


def hill(centre: float | torch.Tensor, width: float | torch.Tensor) -> torch.Tensor:
    places = torch.arange(PLACES, dtype=torch.float64)
    return torch.log_softmax(-0.5 * ((places - centre) / width) ** 2, dim=-1)


@cache
def one_hill(direction: str) -> torch.Tensor:
    """The best of all hills, by search: centre and width are its only freedom."""
    target, divergence = teacher(), DIVERGENCES[direction]
    candidates = [hill(c / 2, w / 2) for c in range(2 * PLACES) for w in range(2, 41)]
    return min(candidates, key=lambda found: float(divergence(found, target).sum()))


@cache
def unconstrained(direction: str, steps: int = 600) -> torch.Tensor:
    """A student with a logit for each place, by gradient descent from the uniform distribution."""
    logits = torch.zeros(PLACES, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        DIVERGENCES[direction](torch.log_softmax(logits, dim=-1), teacher()).sum().backward()
        optimizer.step()
    return torch.log_softmax(logits.detach(), dim=-1)


def near(logp: torch.Tensor, mode: int) -> float:
    """The mass on the half of the places around one of the two modes."""
    middle = PLACES // 2
    part = logp[:middle] if mode == 0 else logp[middle:]
    return float(part.exp().sum())


def _points(logp: torch.Tensor) -> Sequence[tuple[float, float, float]]:
    return [(float(place), float(value), 0.0) for place, value in enumerate(logp.exp())]


EXPERIMENT = replace(
    METHODS,
    name="kl-direction",
    question="Is it the text or the direction of the KL that matters, and what does each direction make of two modes?",
    arms=METHODS.choose([arm for by in ARMS.values() for arm in by.values()]),
    quick_arms=(),
    seeds=5,
    runs_in=METHODS.name,
    find=find,
)
