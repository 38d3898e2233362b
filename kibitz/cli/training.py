"""`kibitz demo` and `kibitz train`."""

import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from kibitz.cli.options import Overwrite, Resume
from kibitz.cli.output import Output

if TYPE_CHECKING:
    from kibitz.config import Recipe
    from kibitz.training.trainer import Run


def train(
    ctx: typer.Context,
    recipe: Annotated[
        str, typer.Argument(help="A YAML file. `kibitz recipes` lists examples, `kibitz schema` describes every key.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[A.B=VALUE]...", help="Change a setting of the recipe, such as optim.lr=1e-4."),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a student as a recipe says. After Ctrl-C or a crash, --resume continues from the last checkpoint."""
    from kibitz import config

    again = ["kibitz", "train", recipe, *(overrides or []), "--resume"]
    if resume and overwrite:
        raise ValueError("write either --resume, to continue the run, or --overwrite, to delete it")
    run = run_training(ctx.obj, config.load(recipe, overrides or []), again, resume=resume, overwrite=overwrite)
    finish(ctx.obj, run)


def demo(
    ctx: typer.Context,
    output: Annotated[str, typer.Option(help="Folder of the run. An earlier demo there is replaced.")] = "runs/demo",
    seed: Annotated[int, typer.Option(help="Seed of the problems and of sampling.")] = 0,
    models: Annotated[
        str | None, typer.Option(help="Folder with teacher/ and student/, as `kibitz worlds make` writes it.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[A.B=VALUE]...", help="Change a setting of the demo's recipe, such as steps=20."),
    ] = None,
) -> None:
    """Watch on-policy distillation work on a toy task, in minutes on a laptop, with models that come with kibitz."""
    from kibitz import config
    from kibitz.cli import demo as story

    out: Output = ctx.obj
    if models is not None and not Path(models).is_dir():
        raise ValueError(f"--models: there is no folder {models}; `kibitz worlds make arithmetic` makes one")
    recipe = config.load(story.recipe(output, seed, models), overrides or [])
    if out.live:
        story.introduce(out.errors, recipe)
    again = ["kibitz", "train", str(Path(recipe.output) / "recipe.yaml"), "--resume"]
    run = run_training(out, recipe, again, resume=False, overwrite=story.may_replace(Path(recipe.output)))
    finish(out, run, story.show_mistake)


def run_training(out: Output, recipe: "Recipe", again: list[str], *, resume: bool, overwrite: bool) -> "Run":
    """Train with a bar; on Ctrl-C or SIGTERM say where the run is and how to go on. The exit code is that of a process
    which the signal ended, 130 or 143."""
    from kibitz import report
    from kibitz.data.once import reading_once
    from kibitz.training import trainer
    from kibitz.training.stopping import BetweenSteps

    try:
        with reading_once():
            if out.live:
                _look_first(out, recipe)
            with out.bar() as bar:
                run = trainer.train(recipe, resume=resume, overwrite=overwrite, progress=bar)
        if out.is_main:
            report.build([run.folder])
        return run
    except KeyboardInterrupt as stopped:
        with BetweenSteps(lambda text: None):  # what a scheduler says again changes nothing
            if out.is_main and (folder := Path(recipe.output)).is_dir():
                report.build([folder])
            out.errors.print(
                f"stopped; the run is in {recipe.output}, continue it with: {shlex.join(again)}",
                markup=False,
                soft_wrap=True,
            )
        raise typer.Exit(128 + (stopped.args or (signal.SIGINT,))[0]) from None


def _look_first(out: Output, recipe: "Recipe") -> None:
    """The short form of `kibitz check`: what is not green. The run goes on, because memory is an estimate; what loading
    refuses has a sentence of its own there."""
    from kibitz.cli.check import show
    from kibitz.preflight import REFUSED, check_files

    for finding in check_files(recipe):
        if finding.light != "green" and finding.name not in REFUSED:
            show(out.errors, finding)


def finish(out: Output, run: "Run", show_more: Callable[[Console, Path], None] | None = None) -> None:
    """The tables of a finished run, and where its files are."""
    from kibitz.cli import show

    tree = {
        "folder": run.folder,
        "checkpoint": run.checkpoint,
        "report": run.folder / "report.html",
        "steps": len(run.metrics),
        "before": run.evals[0] if run.evals else None,
        "after": run.evals[-1] if run.evals else None,
        "last_step": run.metrics[-1] if run.metrics else None,
    }

    def for_a_person(console: Console) -> None:
        show.before_and_after(console, run.folder)
        show.costs(console, run.folder)
        if show_more is not None:
            show_more(console, run.folder)
        show.files(console, {"run": run.folder, "checkpoint": run.checkpoint, "report": run.folder / "report.html"})

    out.result(tree, for_a_person)
