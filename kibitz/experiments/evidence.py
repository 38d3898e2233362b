"""The finding of an experiment about a published claim, and the page that compares the two. No number of ours is typed."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kibitz.experiments.charts import Heat, Panel, draw
from kibitz.experiments.design import Experiment
from kibitz.experiments.formats import NONE, table
from kibitz.experiments.prose import filled, prose
from kibitz.experiments.results import NotRun, Results
from kibitz.experiments.tables import made_from

Verdict = Literal["reproduced", "partly", "not", "not run"]
MARKS: Mapping[str, str] = {
    "reproduced": "✔ reproduced",
    "partly": "◐ partly",
    "not": "✘ not",
    "not run": "not run yet",
}


@dataclass(frozen=True)
class Finding:
    """A verdict, the numbers that it rests on and that the claim's text is filled with, and the plot."""

    verdict: Verdict
    numbers: Mapping[str, Any] = field(default_factory=dict)
    panels: Sequence[Panel | Heat] = ()


def finding(experiment: Experiment, results: Path) -> Finding:
    """Compute the experiment's finding from the files below `results`. Raises NotRun if they do not suffice."""
    assert experiment.find is not None, f"{experiment.name} has no claim"
    return experiment.find(Results(experiment, results / experiment.home))


def try_finding(experiment: Experiment, results: Path) -> Finding:
    """The same; what was not run is a finding of its own kind."""
    try:
        return finding(experiment, results)
    except NotRun as missing:
        return Finding("not run", {"missing": str(missing)})


def markdown(experiment: Experiment, results: Path, plot: str = "plot.svg") -> str:
    """One screen: published, ours, plot, verdict, command, and what it was made from."""
    found, text = try_finding(experiment, results), prose(experiment.name)
    parts = [
        f"**Published.** {text.published} ({text.source})",
        f"**Here: {MARKS[found.verdict]}.** {_body(text.body, found)}",
        _written_for(text.verdict, found.verdict),
        f"![{experiment.name}]({plot})" if found.panels else "",
        f"`kibitz reproduce {experiment.name}`. {made_from(experiment, results / experiment.home)}".strip(),
    ]
    return "\n\n".join(part for part in parts if part)


def _body(template: str, found: Finding) -> str:
    if found.verdict == "not run":
        return f"Its runs are not complete: there is none of `{found.numbers['missing']}`."
    return filled(template, found.numbers)


def _written_for(verdict: str, computed: str) -> str:
    """Other models may turn the verdict; the text around the numbers stays as it was written."""
    if computed in (verdict, "not run"):
        return ""
    return f"The text was written for results with the verdict *{verdict}*; the verdict above and the numbers are of these."


def plot(experiment: Experiment, results: Path) -> str | None:
    """The claim's plot as SVG; None where there is nothing to draw."""
    panels = try_finding(experiment, results).panels
    return draw(panels) if panels else None


def claims(experiments: Iterable[Experiment], outside: bool = False) -> list[Experiment]:
    """The experiments with a claim, in the order of the pages: those on toy worlds, or those on models from `outside`."""
    found = [one for one in experiments if one.find is not None and one.outside == outside]
    return sorted(found, key=lambda experiment: (prose(experiment.name).order, experiment.name))


def overview(experiments: Iterable[Experiment], results: Path, page: str = "", outside: bool = False) -> str:
    """All claims in one table."""
    rows = []
    for experiment in claims(experiments, outside):
        found, text = try_finding(experiment, results), prose(experiment.name)
        ours = NONE if found.verdict == "not run" else filled(text.ours, found.numbers)
        rows.append((f"[`{experiment.name}`]({page}#{experiment.name})", text.short, ours, MARKS[found.verdict]))
    return table(("experiment", "published", "here" if outside else "here, on toy worlds", "verdict"), rows)


def headlines(experiments: Collection[Experiment], results: Path, page: str = "docs/evidence.md") -> str:
    """The few claims with a headline, a plain sentence each, as the README has them."""
    rows = []
    for experiment in (*claims(experiments), *claims(experiments, outside=True)):
        found, text = try_finding(experiment, results), prose(experiment.name)
        if text.headline and found.verdict != "not run":
            sentence = filled(text.headline, found.numbers)
            rows.append((sentence, MARKS[found.verdict], f"[`{experiment.name}`]({page}#{experiment.name})"))
    return table(
        ("what came out here, on toy worlds unless it says otherwise", "the published claim", "evidence"), rows
    )
