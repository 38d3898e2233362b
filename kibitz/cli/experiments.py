"""`kibitz reproduce`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kibitz.cli.output import Output, harmless


def reproduce(
    ctx: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME] [A.B=VALUE]...", help="An experiment, and settings such as steps=80; or nothing."
        ),
    ] = None,
    student: Annotated[str | None, typer.Option(help="Folder or hub name; without it the toy world's.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Folder or hub name; without it the toy world's.")] = None,
    prompts: Annotated[str | None, typer.Option(help="JSONL in the toy world's place; is cut by a hash.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many; the experiment knows how many by itself.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="In seconds, to see that it runs; says nothing.")] = False,
    only: Annotated[str, typer.Option(help="Some of its arms: opd,grpo.")] = "",
    output: Annotated[Path | None, typer.Option(help="Folder of the results; default results, or runs/quick.")] = None,
) -> None:
    """Run an experiment and write its table and plot; without a name, list them. What is done is not done again.

    Results are files in OUTPUT/NAME, one for each run: after Ctrl-C the same command goes on. `optim.lr=X` puts the middle
    of the sweep over learning rates at X.
    """
    from kibitz import experiments

    out: Output = ctx.obj
    if not words:
        _list(out)
        return
    experiment, *settings = experiments.get(words[0]), *words[1:]
    for setting in [word for word in settings if word.startswith("optim.lr=")]:
        settings.remove(setting)
        experiment = experiment.around(_rate(setting))
    experiment = experiment.quick() if quick else experiment
    folder = (output or Path("runs/quick" if quick else "results")) / experiment.name
    subject = experiments.Subject.of(experiment, student, teacher, prompts, settings)
    arms = experiment.choose([name for name in only.split(",") if name])

    from kibitz.experiments import pages
    from kibitz.experiments.study import Study

    out.say(experiment.question)
    work = Path("runs/reproduce") / ("quick" if quick else "whole") / experiment.name
    Study(experiment, subject, folder, work, out.say).run(arms, seeds)
    files = pages.write(experiment, folder)
    table = (folder / "table.md").read_text(encoding="utf-8")
    out.result(
        {"experiment": experiment.name, "files": files, "rows": pages.tree(experiment, folder)},
        lambda console: console.print(Text(harmless(table)), soft_wrap=True),
    )


def _rate(setting: str) -> float:
    try:
        return float(setting.partition("=")[2])
    except ValueError:
        raise ValueError(f"{setting} is no learning rate: write optim.lr=1e-4") from None


def _list(out: Output) -> None:
    from kibitz.experiments import EXPERIMENTS

    def for_a_person(console: Console) -> None:
        table = Table(box=None, header_style="dim")
        table.add_column("experiment")
        table.add_column("arms", justify="right")
        table.add_column("what it asks")
        for experiment in EXPERIMENTS.values():
            table.add_row(experiment.name, str(len(experiment.arms)), experiment.question)
        console.print(table)

    rows = [
        {"name": e.name, "question": e.question, "arms": [arm.name for arm in e.arms]} for e in EXPERIMENTS.values()
    ]
    out.result({"experiments": rows}, for_a_person)
