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
            metavar="[NAME|all] [A.B=VALUE]...", help="An experiment, and settings such as steps=80. Default: list all."
        ),
    ] = None,
    student: Annotated[str | None, typer.Option(help="Folder or hub name. Default: the toy model.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Folder or hub name. Default: the toy model.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(metavar="ROLE=MODEL", help="Model of another role of the experiment.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[SOURCE=]FILE", help="JSONL file instead of the toy world; it is split into train, dev and test."
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds. Default: the experiment's own.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps only, to see that everything runs. The numbers mean nothing.")
    ] = False,
    only: Annotated[str, typer.Option(help="Run some of the arms only, such as opd,grpo.")] = "",
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results. Default: results, or runs/quick with --quick.")
    ] = None,
) -> None:
    """Run an experiment and write its table and plot. Without a name, list the experiments.

    Each run is a file in OUTPUT/NAME. Runs that are there are not repeated, so that the same command continues after Ctrl-C.
    `all` runs every experiment. `optim.lr=X` centres the sweep of learning rates on X.
    """
    from kibitz import experiments

    out: Output = ctx.obj
    if not words:
        _list(out)
        return
    name, *settings = words
    if name == "all" and only:
        raise ValueError("--only chooses arms of one experiment: name it instead of all")
    models = _pairs(model) | {role: where for role, where in (("student", student), ("teacher", teacher)) if where}
    every = [one for one in experiments.EXPERIMENTS.values() if "teacher" in models or not one.outside]
    chosen = every if name == "all" else [experiments.get(name)]
    files = _pairs(prompts)
    results = output or Path("runs/quick" if quick else "results")
    if name != "all" and chosen[0].play is not None and (models or files or settings or only):
        raise ValueError(
            f"{name} plays policies and has no language model: it takes --seeds, --quick and --output only"
        )
    rows = {}
    for experiment in chosen:
        here = {role: where for role, where in models.items() if role in experiment.roles or name != "all"}
        rows[experiment.name] = _one(out, experiment, here, files, settings, seeds, quick, only, results)
    if name != "all":
        (found,) = rows.values()
        _tell(out, {"experiment": name, **found})
        return
    _tell(out, {"experiments": rows, "text": "".join(found.pop("text") for found in rows.values())})


def _one(out, experiment, models, files, settings, seeds, quick, only, results) -> dict:
    """Run one experiment, and say what came of it."""
    from kibitz.experiments import pages

    if experiment.play is None:
        _studied(out, experiment, models, files, settings, seeds, quick, only, results)
    else:
        _played(out, experiment, seeds, quick, results)
    files = pages.write(experiment, results)
    if len(files) == 1:
        out.say(pages.NO_CHARTS)
    text = (results / experiment.name / "table.md").read_text(encoding="utf-8")
    return {"files": files, "rows": pages.tree(experiment, results), "text": text}


def _played(out, experiment, seeds, quick, results) -> None:
    """Run what has no language model in it."""
    from kibitz.experiments.played import Play

    out.say(experiment.question)
    work = Path("runs/reproduce") / ("quick" if quick else "whole") / experiment.home
    experiment.play(Play(results / experiment.home, work, seeds or (1 if quick else experiment.seeds), quick, out.say))


def _studied(out, experiment, models, files, settings, seeds, quick, only, results) -> None:
    from kibitz.experiments import Subject
    from kibitz.experiments.study import Study

    settings = list(settings)
    for setting in [word for word in settings if word.startswith("optim.lr=")]:
        settings.remove(setting)
        experiment = experiment.around(_rate(setting))
    experiment = experiment.quick() if quick else experiment
    subject = Subject.of(experiment, models, files, settings)
    arms = experiment.choose([one for one in only.split(",") if one] or (experiment.quick_arms if quick else ()))
    out.say(experiment.question)
    work = Path("runs/reproduce") / ("quick" if quick else "whole") / experiment.home
    Study(experiment, subject, results / experiment.home, work, out.say).run(arms, seeds)


def _tell(out: Output, found: dict) -> None:
    text = found.pop("text")
    out.result(found, lambda console: console.print(Text(harmless(text)), soft_wrap=True))


def _pairs(words: list[str] | None) -> dict[str, str]:
    """`name=value` as a mapping; a word without a name has the name ``."""
    found = {}
    for word in words or []:
        name, equals, value = word.partition("=")
        found[name if equals else ""] = value if equals else word
    return found


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
