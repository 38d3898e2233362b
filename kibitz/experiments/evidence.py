"""What an experiment says about a published claim, and the page that lays the two side by side. No number of ours is typed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kibitz.experiments.charts import Heat, Panel, draw
from kibitz.experiments.design import Experiment
from kibitz.experiments.results import NotRun, Results
from kibitz.experiments.tables import made_from, table

Verdict = Literal["reproduced", "partly", "not", "not run"]
MARKS: Mapping[str, str] = {
    "reproduced": "✔ reproduced",
    "partly": "◐ partly",
    "not": "✘ not",
    "not run": "not run yet",
}


@dataclass(frozen=True)
class Finding:
    """`ours`: the result in a few words with its numbers; `why`: what the verdict rests on, and what differs from the published
    setting, in sentences; `tables`: each a head and rows; `panels`: the plot."""

    verdict: Verdict
    ours: str
    why: str
    tables: tuple[str, ...]
    panels: tuple[Panel | Heat, ...]


def finding(experiment: Experiment, results: Path) -> Finding:
    """What the files below `results` say about the experiment's claim. Raises NotRun if they do not suffice."""
    assert experiment.find is not None, f"{experiment.name} has no claim"
    return experiment.find(Results(experiment, results / experiment.home))


def try_finding(experiment: Experiment, results: Path) -> Finding:
    """The same; what was not run is a finding of its own kind."""
    try:
        return finding(experiment, results)
    except NotRun as missing:
        return Finding("not run", "–", f"Its runs are not complete: there is none of `{missing}`.", (), ())


def markdown(experiment: Experiment, results: Path, plot: str = "plot.svg") -> str:
    """One screen: published, ours, plot, verdict, command, and what it was made from."""
    assert experiment.claim is not None
    found, claim = try_finding(experiment, results), experiment.claim
    command = f"kibitz reproduce {experiment.name}"
    parts = [
        f"**Published.** {claim.says} ({claim.source})",
        f"**Here: {MARKS[found.verdict]}.** {found.why}",
        *found.tables,
        f"![{experiment.name}]({plot})" if found.panels else "",
        f"`{command}`. {made_from(experiment, results / experiment.home)}".strip(),
    ]
    return "\n\n".join(part for part in parts if part)


def plot(experiment: Experiment, results: Path) -> str | None:
    """The claim's plot as SVG; None where there is nothing to draw."""
    panels = try_finding(experiment, results).panels
    return draw(panels) if panels else None


def overview(experiments: Iterable[Experiment], results: Path, page: str = "docs/evidence.md") -> str:
    """All claims in one table, as the README has it."""
    rows = []
    for experiment in experiments:
        if experiment.claim is None:
            continue
        found = try_finding(experiment, results)
        name = f"[`{experiment.name}`]({page}#{experiment.name})"
        rows.append((name, experiment.claim.short, found.ours, MARKS[found.verdict]))
    return table(("experiment", "published", "here, on toy worlds", "verdict"), rows)


def percent(share: tuple[float, float] | float) -> str:
    """`87.3 ± 1.2`, or `87.3` of a number without an interval; in percent."""
    if isinstance(share, tuple):
        return f"{100 * share[0]:.1f} ± {100 * share[1]:.1f}"
    return f"{100 * share:.1f}"


def times(ratio: Sequence[float]) -> str:
    """`6.1x (4.0–9.2)`: a ratio and its interval; an end that is not reached, or that only the other reaches, says so."""
    middle, low, high = ratio
    if middle == 0:
        return "reached by the other only"
    if middle == float("inf"):
        return f"over {low:.1f}x, not reached" if low != float("inf") else "not reached"
    top = "∞" if high == float("inf") else f"{high:.1f}"
    return f"{middle:.1f}x ({low:.1f}–{top})"
