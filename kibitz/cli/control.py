"""`kibitz control`: policies instead of texts."""

import json
import shlex
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from kibitz.cli.options import Overwrite, Resume
from kibitz.cli.output import Output, harmless
from kibitz.training.progress import Bar
from kibitz.training.stopping import BetweenSteps

app = typer.Typer(
    no_args_is_help=True,
    help="Policies: learn from a reward and a mediocre teacher (rpd), or become a tree or a formula (distil).",
)
Recipe = Annotated[
    str, typer.Argument(help="A YAML file; `kibitz control schema rpd` or `distil` says what it may say.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[A.B=VALUE]...", help="Change a setting of the recipe, such as method.weight=0.5."),
]


def _command(name: str) -> Callable[..., None]:
    def command(
        ctx: typer.Context,
        recipe: Recipe,
        overrides: Overrides = None,
        resume: Resume = False,
        overwrite: Overwrite = False,
    ) -> None:
        _run(ctx.obj, name, recipe, overrides or [], resume, overwrite)

    return command


app.command(
    "rpd",
    help="Train a policy by PPO with a teacher's term in a Gymnasium environment; other methods leave one of them out.",
)(_command("rpd"))
app.command("distil", help="Fit a tree, a linear rule or a formula that plays as a teacher does, by DAgger and VIPER.")(
    _command("distil")
)


@app.command()
def report(ctx: typer.Context, recipe: Recipe, overrides: Overrides = None) -> None:
    """Write the page of a recipe's run again; `kibitz report` shows several runs side by side."""
    from kibitz import config, report

    tree = config.load_as(_kinds(_which(recipe) or "rpd"), recipe, overrides or [])
    path = report.build([Path(tree.output)])
    ctx.obj.result({"report": path}, lambda console: console.print(Text(harmless(str(path))), soft_wrap=True))


@app.command()
def where(ctx: typer.Context, run: Annotated[Path, typer.Argument(help="Run folder of `kibitz train`.")]) -> None:
    """The bridge to language: rules that say where a student of language disagrees with its teacher; its report shows them."""
    from kibitz import control, report
    from kibitz.evaluate import where as bridge

    control.require()
    lines = bridge.write(run)
    page = report.build([run])
    told = lambda console: console.print(Text(harmless("\n".join(lines))), soft_wrap=True)  # noqa: E731
    ctx.obj.result({"rules": lines, "report": page}, told)


@app.command()
def schema(
    which: Annotated[str, typer.Argument(help="rpd or distil.")],
) -> None:
    """The JSON schema of a recipe: editors complete and check YAML with it."""
    from kibitz import config

    typer.echo(json.dumps(config.json_schema(_kinds(which)), indent=2, ensure_ascii=False))


def _kinds(which: str) -> Any:
    from kibitz.control.recipe import DistilRecipe, RPDRecipe

    kinds = {"rpd": RPDRecipe, "distil": DistilRecipe}
    if which not in kinds:
        raise ValueError(f"there is no recipe {which!r}: write rpd or distil")
    return kinds[which]


def _which(recipe: str) -> str | None:
    """Which of the two a file is: only one of them has a student that is not a network and its own ways to visit states, and only
    the other has steps and PPO. None where it could be both."""
    from kibitz import config

    tree = config.read_tree(Path(recipe))
    method = tree.get("method")
    kind = method.get("type") if isinstance(method, dict) else None
    if "student" in tree or kind in ("dagger", "viper"):
        return "distil"
    return "rpd" if {"ppo", "steps", "stop_at"} & set(tree) or kind in ("ppo", "opd", "rpd") else None


def _run(out: Output, name: str, path: str, overrides: list[str], resume: bool, overwrite: bool) -> None:
    from kibitz import config, control, report

    if resume and overwrite:
        raise ValueError("--resume continues a run and --overwrite deletes it: choose one of them")
    if (other := _which(path)) not in (name, None):
        raise ValueError(f"{path} is a recipe of {other}: write kibitz control {other} {path}")
    recipe = config.load_as(_kinds(name), path, overrides)
    control.require()
    try:
        with Bar(out.errors) if out.live else nullcontext() as bar:
            stop = BetweenSteps(lambda text: None if bar is None else bar.note(text))
            with stop:
                run = _loop(name)(recipe, resume, overwrite, bar, lambda: stop.number)
    except KeyboardInterrupt as stopped:
        with BetweenSteps(lambda text: None):  # what a scheduler says again changes nothing
            if (Path(recipe.output) / "run.json").is_file():
                report.build([Path(recipe.output)])
            again = shlex.join(["kibitz", "control", name, path, *overrides, "--resume"])
            out.errors.print(
                f"stopped; the run is in {recipe.output}, continue with: {again}", markup=False, soft_wrap=True
            )
        raise typer.Exit(128 + (stopped.args or (signal.SIGINT,))[0]) from None
    page = report.build([run.folder])
    tree = {"folder": run.folder, "report": page, "before": run.evals[0], "after": run.evals[-1]}

    def for_a_person(console: Console) -> None:
        from kibitz.cli import show

        show.before_and_after(console, run.folder)
        show.costs(console, run.folder)
        policy = run.folder / "policy.txt"
        if policy.is_file():
            console.print(Text(harmless(policy.read_text(encoding="utf-8"))), soft_wrap=True)
        show.files(console, {"run": run.folder, "policy": run.folder / "policy.py", "report": page})

    out.result(tree, for_a_person)


def _loop(name: str) -> Callable[..., Any]:
    if name == "rpd":
        from kibitz.control import rpd

        return rpd.run
    from kibitz.control import distil

    return distil.run
