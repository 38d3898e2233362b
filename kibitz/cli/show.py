"""Results as rich tables. The figures and their words are the report's, so that screen and page say the same."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kibitz.cli.output import harmless
from kibitz.report import costs as report_costs
from kibitz.report.folder import Run, read_run
from kibitz.report.summary import Cell, Measure, comparisons

STYLES = {"better": "green", "worse": "red"}


def before_and_after(console: Console, folder: Path) -> None:
    """One table for each split that was evaluated."""
    for comparison in comparisons(read_run(folder)):
        table = _table(f"{comparison.split or 'evaluation'}, {comparison.asked}")
        for column in ("before", "after", "change"):
            table.add_column(column, justify="right", no_wrap=True)
        for measure in comparison.measures:
            change = Text(measure.change, style=STYLES.get(measure.verdict, ""))
            table.add_row(_label(measure), _cell(measure.before), _cell(measure.after), change)
        console.print(table)


def evaluation(console: Console, row: dict[str, Any]) -> None:
    """The figures of one evaluation."""
    for comparison in comparisons(Run(name="", evals=[{"step": 0, **row}])):
        table = _table(f"{comparison.split or 'evaluation'}, {comparison.asked}")
        table.add_column("", justify="right", no_wrap=True)
        for measure in comparison.measures:
            table.add_row(_label(measure), _cell(measure.after))
        console.print(table)


def costs(console: Console, folder: Path) -> None:
    """FLOPs and seconds by phase, and the largest memory of each."""
    run = read_run(folder)
    found = report_costs.table(run)
    if found is None:
        return
    table = _table("What it cost")
    for column in ("compute", "", "time", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found["rows"]:
        table.add_row(*row)
    table.add_row(*found["total"], style="bold")
    table.add_row("With loading, evaluating and saving", "", "", found["wall"], "", style="dim")
    console.print(table)
    if peaks := report_costs.memory(run):
        console.print(
            Text("Largest memory: " + ", ".join(f"{label.lower()} {words}" for label, words in peaks.items()))
        )


def files(console: Console, paths: dict[str, Path | None]) -> None:
    """Print paths, one a line."""
    for name, path in paths.items():
        if path is not None and path.exists():
            console.print(Text(f"{name:<11}{harmless(str(path))}"), soft_wrap=True)


def _table(title: str) -> Table:
    table = Table(title=Text(harmless(title)), title_justify="left", title_style="bold", header_style="dim", box=None)
    table.add_column("")
    return table


def _label(measure: Measure) -> Text:
    return Text(harmless(measure.label))


def _cell(cell: Cell) -> Text:
    interval = cell.interval.removesuffix("%")
    return Text.assemble(cell.text, (f"  {interval}" if interval else "", "dim"))
