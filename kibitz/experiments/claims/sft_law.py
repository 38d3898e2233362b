"""Fine-tuning improves with the logarithm of its data: a line fitted on the smaller sizes, and larger ones really trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import hypot, inf, log2

from kibitz.experiments.budgets import curve, points, rungs
from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.claims import cost
from kibitz.experiments.evidence import Finding, Verdict
from kibitz.experiments.results import Results, sequences
from kibitz.experiments.statistics import bootstrap, line

Estimate = tuple[float, float, float]
"""A value and its 95% interval."""
Points = Sequence[tuple[float, float]]
"""Sequences and accuracy."""

CHECKED = 2
"""So many of the largest sizes are not fitted: the line is held against them."""
MOST_DOUBLINGS = 20
"""A million times the data: what costs more is out of reach."""
PUBLISHED_GAIN, PUBLISHED_FACTOR = 0.10, 5


def find(results: Results) -> Finding:
    """The line, what it says of sizes beyond those it was fitted on, and what these brought."""
    whole = dict(sorted(curve(results, "sft", sequences).items()))
    problems = results.runs(rungs(results, "sft")[0])[0]["test"]["num_prompts"]
    part = {size: whole[size] for size in list(whole)[:-CHECKED] or list(whole)}
    slope = bootstrap(part, problems, lambda drawn: fit(drawn)[1])
    factor = bootstrap(part, problems, lambda drawn: growth(drawn, PUBLISHED_GAIN))
    checks = [
        Check(
            size,
            bootstrap(part, problems, lambda drawn, at=size: foretold(drawn, at)),
            bootstrap({size: whole[size]}, problems, lambda drawn: drawn[0][1]),
        )
        for size in list(whole)[-CHECKED:]
    ]
    last, sizes = checks[-1], {sequences(results.runs(arm)[0]): results.accuracy(arm) for arm in rungs(results, "sft")}
    numbers = {
        "smallest": min(part),
        "largest": max(part),
        "slope": slope,
        "factor": factor,
        "checks": checks,
        "needed": needed(part, problems, last),
        "took": last.size / max(part),
        "fitted": {size: share for size, share in sizes.items() if size in part},
        "sizes": sizes,
    }
    return Finding(verdict(slope, factor, checks), numbers, [_panel(results, part, checks)])


@dataclass(frozen=True)
class Check:
    """A size beyond the fit: the accuracy that the line foretells, and the one that was reached."""

    size: float
    foretold: Estimate
    reached: Estimate

    @property
    def holds(self) -> bool:
        """Return True if the two accuracies differ by no more than their intervals allow."""
        gap = self.reached[0] - self.foretold[0]
        sides = (self.foretold[2] - self.foretold[0], self.reached[0] - self.reached[1])
        if gap < 0:
            sides = (self.foretold[0] - self.foretold[1], self.reached[2] - self.reached[0])
        return abs(gap) <= hypot(*sides)


def fit(drawn: Points) -> tuple[float, float]:
    """Accuracy of one sequence, and what each doubling adds; flat for a single size."""
    if len({size for size, _ in drawn}) < 2:
        return drawn[0][1], 0.0
    return line([log2(size) for size, _ in drawn], [accuracy for _, accuracy in drawn])


def foretold(drawn: Points, size: float) -> float:
    start, slope = fit(drawn)
    return start + slope * log2(size)


def growth(drawn: Points, gain: float) -> float:
    """Return the factor in data that a gain in accuracy costs by the fitted line; infinite if the line does not rise."""
    slope = fit(drawn)[1]
    return 2 ** (gain / slope) if slope > gain / MOST_DOUBLINGS else inf


def needed(part: Mapping[float, Sequence[float]], problems: int, check: Check) -> Estimate:
    """Return the data that the line needs for a larger size's accuracy, as a multiple of the largest fitted size."""
    largest = max(part)
    return bootstrap(part, problems, lambda drawn: growth(drawn, max(0.0, check.reached[0] - foretold(drawn, largest))))


def verdict(slope: Estimate, factor: Estimate, checks: Sequence[Check]) -> Verdict:
    """Reproduced if more data helps, the line foretells what was not fitted, and ten points cost the published factor
    or more; partly if more data helps; else not."""
    if slope[1] <= 0:
        return "not"
    return "reproduced" if all(c.holds for c in checks) and factor[2] >= PUBLISHED_FACTOR else "partly"


def _panel(results: Results, part: Mapping[float, Sequence[float]], checks: Sequence[Check]) -> Panel:
    drawn = [(size, sum(shares) / len(shares)) for size, shares in part.items()]
    ends = (min(part), max(check.size for check in checks))
    return Panel(
        "accuracy against data", "the teacher's texts", "accuracy",
        [
            Line("line through the smaller sizes", [(x, foretold(drawn, x), 0.0) for x in ends], dashed=True),
            Line("foretold", [(c.size, c.foretold[0], (c.foretold[2] - c.foretold[1]) / 2) for c in checks], joined=False),
            Line("trained", points(results, "sft", sequences), joined=False),
        ],
        {"teacher": results.level("teacher")}, log_x=True,
        ticks={size: f"{size:,.0f}" for size in (*part, *(c.size for c in checks))},
    )  # fmt: skip


EXPERIMENT = replace(
    cost.EXPERIMENT,
    name="sft-law",
    question="Does SFT improve with the logarithm of its data, and does the line foretell what more data brings?",
    arms=cost.arms_of("sft", cost.BUDGETS["sft"]),
    quick_arms=("sft-640-b8", "sft-1280-b8"),
    runs_in=cost.EXPERIMENT.name,
    find=find,
)
