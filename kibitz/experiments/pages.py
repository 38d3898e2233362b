"""Writes what people read of an experiment: its table, its plot, and the parts of pages that quote it."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kibitz.experiments import charts, evidence
from kibitz.experiments.design import Experiment
from kibitz.experiments.plot import svg
from kibitz.experiments.tables import markdown, rows

BLOCK = re.compile(
    r"(?P<begin><!-- (?P<kind>results|finding|overview): (?P<name>[a-z-]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL
)
NO_CHARTS = "no plot was drawn: install kibitz[plots]"


def texts(experiment: Experiment, results: Path) -> dict[str, str]:
    """file -> what it says, of `table.md`, the arms at their best rates or, of a claim, its finding; and `plot.svg`,
    where charts can be drawn."""
    folder = results / experiment.home
    if experiment.find is None:
        shares = any(row.sampled for row in rows(experiment, folder))  # what was not graded has none to draw
        found, drawing = markdown(experiment, folder), lambda: svg(experiment, folder) if shares else None
    else:
        found = "\n\n".join(
            [evidence.markdown(experiment, results), *([markdown(experiment, folder)] if experiment.arms else [])]
        )
        drawing = lambda: evidence.plot(experiment, results)  # noqa: E731
    plot = drawing() if charts.available() else None
    return {"table.md": found + "\n"} | ({} if plot is None else {"plot.svg": plot})


def write(experiment: Experiment, results: Path) -> list[Path]:
    """`table.md` and `plot.svg` below `results/NAME`."""
    folder = results / experiment.name
    folder.mkdir(parents=True, exist_ok=True)
    found = texts(experiment, results)
    for name, text in found.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in found]


def tree(experiment: Experiment, results: Path) -> list[dict[str, Any]]:
    """The rows of the table as plain data."""
    return [asdict(row) for row in rows(experiment, results / experiment.home)]


def render(page: str, experiments: Mapping[str, Experiment], results: Path, place: str = "../results") -> str:
    """A page with what it quotes between `<!-- KIND: name -->` and `<!-- end -->`: `results`, the arms of an
    experiment; `finding`, of a claim; `overview: claims`, those claims with a headline. `place` is where the results are,
    seen from the page."""

    def block(match: re.Match[str]) -> str:
        if match["kind"] == "overview":
            text = evidence.headlines(experiments.values(), results)
        elif match["kind"] == "finding":
            name = match["name"]
            text = evidence.markdown(experiments[name], results, f"{place}/{name}/plot.svg")
        else:
            experiment = experiments[match["name"]]
            text = markdown(experiment, results / experiment.home)
        return f"{match['begin']}{text}\n{match['end']}"

    return BLOCK.sub(block, page)


def evidence_page(experiments: Mapping[str, Experiment], results: Path) -> str:
    """docs/evidence.md: a head, the table of all claims, and a screen for each; then the same of real models."""
    parts = [HEAD, evidence.overview(experiments.values(), results)]
    for experiment in evidence.claims(experiments.values()):
        parts.append(_screen(experiment, results, "##"))
    if real := evidence.claims(experiments.values(), outside=True):
        parts += [REAL, evidence.overview(experiments.values(), results, outside=True)]
        parts += [_screen(experiment, results, "###") for experiment in real]
    return "\n\n".join(parts) + "\n"


def _screen(experiment: Experiment, results: Path, heading: str) -> str:
    plot = f"../results/{experiment.name}/plot.svg"
    return f"{heading} {experiment.name}\n\n{evidence.markdown(experiment, results, plot)}"


REAL = """## With a real language model

The same frame, on a model that speaks English: SmolLM2-135M-Instruct (Apache-2.0), as `make real` takes it from the
package index. Budgets are those of an hour on a laptop's core, thousands of times below the published ones: what is told
apart here is told apart early in training. `--teacher` and `--student` take any model."""

HEAD = """# The evidence

Each claim that was published about on-policy distillation: what was published, what came out here on toy worlds that
a CPU learns in minutes, and whether that reproduces it. `kibitz reproduce NAME` makes a section again; with
`--student`, `--teacher` and `--prompts` the same file asks the same question of real models. This page is written by
`python docs/generate.py` from the files in [`results/`](../results), one for each run with its settings, seed,
commit, machine and cost; no number of ours is typed by hand.

How it is done, everywhere: each arm tries several learning rates with seed 0 (more beyond an edge that is best), and
the best on the dev split is run with all seeds and measured once on the test split, which shares no problem with
train and dev. "±" is half a 95% interval: Student's t over seeds and the noise of the number of problems, in
quadrature; intervals of ratios and costs are bootstrapped over seeds and problems. Seeds change the problems, their
order and the sampling; the models one starts from are the same, unless a section says otherwise. Accuracy is at
temperature 1, where not called greedy. FLOPs are counted, not estimated from time: the student's and the teacher's,
sampling, scoring and training."""
