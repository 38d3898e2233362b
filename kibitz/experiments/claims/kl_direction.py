"""Reverse KL seeks modes and forward KL covers them; and both who writes and which direction matter."""

import math
from collections.abc import Sequence
from functools import cache

import torch

from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.claims.methods import METHODS
from kibitz.experiments.design import Claim, Experiment
from kibitz.experiments.evidence import Finding, percent
from kibitz.experiments.results import Results
from kibitz.experiments.tables import table
from kibitz.losses.divergences import forward_kl, reverse_kl

ARMS = {
    ("student", "reverse"): "opd",
    ("student", "forward"): "opd-fkl",
    ("teacher", "reverse"): "kd-rkl",
    ("teacher", "forward"): "kd-fkl",
}
PLACES = 41  # of the two-mode example: 70% around one, 30% around another
DIVERGENCES = {"reverse": reverse_kl, "forward": forward_kl}


def find(results: Results) -> Finding:
    """Who is best of the four corners, and what a student of one hill makes of a teacher of two."""
    shares = {corner: results.accuracy(arm) for corner, arm in ARMS.items()}
    best, *rest = sorted(shares, key=lambda corner: -shares[corner][0])
    apart = all(shares[best][0] - shares[c][0] > math.hypot(shares[best][1], shares[c][1]) for c in rest)
    both = best == ("student", "reverse")
    rows = [
        (f"{writer}'s text", *(percent(shares[writer, kl]) for kl in ("reverse", "forward")))
        for writer in ("student", "teacher")
    ]
    hills = {kl: one_hill(kl) for kl in DIVERGENCES}
    free = {kl: unconstrained(kl) for kl in DIVERGENCES}
    on_one, spread = (percent(near(hills[kl], 0)) for kl in DIVERGENCES)
    why = (
        f"Of the four corners, {best[0]}'s text with {best[1]} KL is the best{', apart from all others' if apart else ''}. "
        f"A student that can represent one hill only, against a teacher of two (70% and 30%), sets {on_one}% of its mass on "
        f"the larger one under reverse KL, and {spread}% under forward KL, which puts its hill between them. A student that "
        f"can represent both has {percent(near(free['reverse'], 0))}% and {percent(near(free['forward'], 0))}% there: with "
        "enough capacity the direction decides nothing, unlike what is often told."
    )
    return Finding(
        "reproduced" if both and apart else "partly" if both else "not",
        f"{percent(shares['student', 'reverse'])} on the student's text with reverse KL; the other corners "
        f"{', '.join(percent(shares[c][0]) for c in ARMS if c != ('student', 'reverse'))}",
        why,
        (table(("accuracy, %", "reverse KL", "forward KL"), rows),),
        (
            Panel(
                "one hill against two", "place", "probability",
                [Line("teacher", _points(teacher()), dashed=True),
                 *(Line(f"{kl} KL", _points(found)) for kl, found in hills.items())],
            ),
            Panel(
                "who writes, which direction", "", "accuracy",
                [Line(f"{kl} KL", [(x, *shares[writer, kl]) for x, writer in enumerate(("student", "teacher"))])
                 for kl in DIVERGENCES],
                ticks={0: "student's text", 1: "teacher's text"},
            ),
        ),
    )  # fmt: skip


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


EXPERIMENT = Experiment(
    name="kl-direction",
    question="Is it the text or the direction of the KL that matters, and what does each direction make of two modes?",
    world=METHODS.world,
    recipe=METHODS.recipe,
    arms=tuple(METHODS.arm(name) for name in ARMS.values()),
    rates=METHODS.rates,
    reference="opd",
    seeds=5,
    runs_in=METHODS.name,
    claim=Claim(
        says="Reverse KL seeks modes, forward KL covers them; learning on one's own text and reverse KL are both needed.",
        source="[Thinking Machines 2025](https://thinkingmachines.ai/blog/on-policy-distillation/), "
        "[GKD](https://arxiv.org/abs/2306.13649)",
        short="reverse KL seeks modes; on-policy and reverse are both needed",
    ),
    find=find,
)
