"""Fine-tuning improves with the logarithm of its data: a line fitted on the smaller sizes, and larger ones really trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot, inf, log2

from kibitz.experiments.budgets import curve, points, rungs
from kibitz.experiments.charts import Line, Panel
from kibitz.experiments.claims import cost
from kibitz.experiments.design import Claim, Experiment
from kibitz.experiments.evidence import Finding, Verdict, times
from kibitz.experiments.results import Results, sequences
from kibitz.experiments.statistics import bootstrap, line
from kibitz.experiments.tables import table

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
    fitted = list(whole)[:-CHECKED] or list(whole)
    part = {size: whole[size] for size in fitted}
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
    last = checks[-1]
    return Finding(
        verdict(slope, factor, checks),
        f"{_points(slope)} a doubling, so +{100 * PUBLISHED_GAIN:.0f} points cost {_data(factor)}; "
        f"{last.size:,.0f} sequences were to bring {_percent(last.foretold)} and brought {_percent(last.reached)}",
        _why(fitted, slope, factor, checks, needed(part, problems, last)),
        (_table(results, checks),),
        (_panel(results, part, checks),),
    )


@dataclass(frozen=True)
class Check:
    """A size beyond the fit: the accuracy that the line foretells, and the one that was reached."""

    size: float
    foretold: Estimate
    reached: Estimate

    @property
    def holds(self) -> bool:
        """Whether the two differ by no more than their intervals allow."""
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
    """How many times the data a gain in accuracy costs, by the line; infinite if it does not rise."""
    slope = fit(drawn)[1]
    return 2 ** (gain / slope) if slope > gain / MOST_DOUBLINGS else inf


def needed(part: Mapping[float, Sequence[float]], problems: int, check: Check) -> Estimate:
    """How many times the largest fitted size the line asks for what a larger one really reached."""
    largest = max(part)
    return bootstrap(part, problems, lambda drawn: growth(drawn, max(0.0, check.reached[0] - foretold(drawn, largest))))


def verdict(slope: Estimate, factor: Estimate, checks: Sequence[Check]) -> Verdict:
    """Reproduced if more data helps, the line foretells what was not fitted, and ten points cost the published factor
    or more; partly if more data helps; else not."""
    if slope[1] <= 0:
        return "not"
    return "reproduced" if all(c.holds for c in checks) and factor[2] >= PUBLISHED_FACTOR else "partly"


# ------------------------------------------------------------------ words


def _why(fitted: Sequence[float], slope: Estimate, factor: Estimate, checks: Sequence[Check], asked: Estimate) -> str:
    told = " ".join(
        f"For {c.size:,.0f} sequences it foretells {_percent(c.foretold)}, and training on them brought "
        f"{_percent(c.reached)}: {'it holds' if c.holds else 'it does not hold'}."
        for c in checks
    )
    last = checks[-1]
    return (
        f"A line through accuracy against the logarithm of the number of the teacher's texts, fitted on "
        f"{fitted[0]:,.0f} to {fitted[-1]:,.0f} sequences, rises by {_points(slope)} a doubling; by it "
        f"+{100 * PUBLISHED_GAIN:.0f} points cost {_data(factor)} (published about {PUBLISHED_FACTOR}x, "
        f"extrapolated, not trained). {told} For what the largest size reached, the line asks for {_data(asked)} "
        f"of the largest fitted one; it took {last.size / fitted[-1]:.0f}x. Each size is a run of its own with its own decay, "
        "batch and rate. "
        "A line that goes on for ever cannot be right, because accuracy ends at the teacher's: "
        "extrapolate over one or two doublings, not ten."
    )


def _percent(share: Estimate) -> str:
    return f"{100 * share[0]:.1f}% ({100 * share[1]:.1f}–{100 * share[2]:.1f})"


def _points(slope: Estimate) -> str:
    return f"{100 * slope[0]:.1f} points ({100 * slope[1]:.1f}–{100 * slope[2]:.1f})"


def _data(factor: Estimate) -> str:
    return "more data than there is" if factor[0] == inf else f"{times(factor)} the data"


def _table(results: Results, checks: Sequence[Check]) -> str:
    beyond = {check.size: check for check in checks}
    rows = []
    for arm in rungs(results, "sft"):
        size = sequences(results.runs(arm)[0])
        mean, half = results.accuracy(arm)
        check = beyond.get(size)
        said = (_percent(check.foretold), "yes" if check.holds else "no") if check else ("fitted", "")
        rows.append((f"{size:,}", f"{100 * mean:.1f} ± {100 * half:.1f}", *said))
    return table(("the teacher's texts", "accuracy, %", "the line foretells", "holds"), rows, left=1)


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


EXPERIMENT = Experiment(
    name="sft-law",
    question="Does SFT improve with the logarithm of its data, and does the line foretell what more data brings?",
    world=cost.EXPERIMENT.world,
    recipe=cost.EXPERIMENT.recipe,
    arms=cost.arms_of("sft", cost.BUDGETS["sft"]),
    rates=cost.EXPERIMENT.rates,
    dev_problems=cost.EXPERIMENT.dev_problems,
    test_problems=cost.EXPERIMENT.test_problems,
    extensions=cost.EXPERIMENT.extensions,
    seeds=cost.EXPERIMENT.seeds,
    quick_arms=("sft-640-b8", "sft-1280-b8"),
    runs_in=cost.EXPERIMENT.name,
    claim=Claim(
        says="SFT improves log-linearly with its number of prompts: 60% at 400,000, and by extrapolation 70% at about 2 million, "
        "so +10 points cost 5x the data.",
        source="[Thinking Machines 2025](https://thinkingmachines.ai/blog/on-policy-distillation/)",
        short="SFT is log-linear in data; +10 points cost 5x (extrapolated)",
    ),
    find=find,
)
