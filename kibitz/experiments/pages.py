"""Writes what people read of an experiment: its table, its plot, and the parts of pages that quote it."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kibitz.experiments.design import Experiment
from kibitz.experiments.plot import svg
from kibitz.experiments.tables import markdown, rows

BLOCK = re.compile(r"(?P<begin><!-- results: (?P<name>[a-z-]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def write(experiment: Experiment, folder: Path) -> list[Path]:
    """`table.md` and `plot.svg` beside the results."""
    texts = {"table.md": markdown(experiment, folder) + "\n", "plot.svg": svg(experiment, folder)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def tree(experiment: Experiment, folder: Path) -> list[dict[str, Any]]:
    """The rows of the table as plain data."""
    return [asdict(row) for row in rows(experiment, folder)]


def render(page: str, experiments: dict[str, Experiment], results: Path) -> str:
    """A page with the table of every experiment that it quotes between `<!-- results: name -->` and `<!-- end -->`."""

    def block(match: re.Match[str]) -> str:
        experiment = experiments[match["name"]]
        return f"{match['begin']}{markdown(experiment, results / experiment.name)}\n{match['end']}"

    return BLOCK.sub(block, page)
