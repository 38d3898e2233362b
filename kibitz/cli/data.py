"""`kibitz report`, `recipes`, `schema` and `worlds`: what needs no model, or makes one."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import kibitz
from kibitz.cli.output import Output, harmless


def report(
    ctx: typer.Context,
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders. Several are shown side by side.")],
    output: Annotated[
        Path | None,
        typer.Option(help="HTML file to write. Default: report.html in the run's folder, or beside several runs."),
    ] = None,
) -> None:
    """Write an HTML report of one or more runs: before and after, token heat-map, curves, costs."""
    from kibitz import report as pages

    path = pages.build(runs, output)
    ctx.obj.result({"report": path}, lambda console: console.print(Text(harmless(str(path))), soft_wrap=True))


def schema(
    ctx: typer.Context,
    output: Annotated[Path | None, typer.Option(help="Write it to this file instead.")] = None,
) -> None:
    """Print the JSON schema of recipes, with which editors complete and check the YAML."""
    from kibitz import config

    text = json.dumps(config.json_schema(), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        typer.echo(text, nl=False)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    head = f"# yaml-language-server: $schema={output}"
    ctx.obj.result(
        {"schema": output},
        lambda console: console.print(
            f"{output}; first line of a recipe that uses it: {head}", markup=False, soft_wrap=True
        ),
    )


def recipes(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Print this recipe. Default: list all.")] = None,
) -> None:
    """List recipes for real models, or print one: `kibitz recipes reasoning-opd > recipe.yaml`."""
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted(_recipes().glob("*.yaml"))}
    if name is not None:
        if name not in found:
            raise ValueError(f"there is no recipe {name!r}: there are {', '.join(found)}")
        ctx.obj.result({"name": name, "recipe": found[name]}, lambda console: console.file.write(found[name]))
        return

    def for_a_person(console: Console) -> None:
        table = Table(box=None, header_style="dim")
        table.add_column("recipe", no_wrap=True)
        table.add_column("what it is")
        for one, text in found.items():
            table.add_row(one, _title(text))
        console.print(table)

    ctx.obj.result({"recipes": [{"name": one, "title": _title(text)} for one, text in found.items()]}, for_a_person)


def _recipes() -> Path:
    """The folder of the recipes: inside of an installed package, beside it in a checkout."""
    inside = Path(kibitz.__file__).parent / "recipes"
    return inside if inside.is_dir() else inside.parents[1] / "recipes"


def _title(recipe: str) -> str:
    """The first sentence of a recipe's comment."""
    return recipe.partition("\n")[0].removeprefix("#").strip()


worlds = typer.Typer(
    invoke_without_command=True,
    help="List the toy worlds, which a CPU can learn; show their problems; train their models.",
)


@worlds.callback()
def list_worlds(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is not None:
        return
    from kibitz.worlds import WORLDS

    def for_a_person(console: Console) -> None:
        table = Table(box=None, header_style="dim")
        table.add_column("world")
        table.add_column("what it is")
        for world in WORLDS.values():
            table.add_row(Text(world.name), Text(world.description))
        console.print(table)

    rows = [{"name": world.name, "description": world.description} for world in WORLDS.values()]
    ctx.obj.result({"worlds": rows}, for_a_person)


@worlds.command(name="show")
def show_world(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="A world, such as arithmetic.")],
    count: Annotated[int, typer.Option(min=1, help="Number of problems.")] = 5,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "train",
    seed: Annotated[int, typer.Option(help="Seed of the problems.")] = 0,
) -> None:
    """Print a few problems of a world, each with a correct solution."""
    from kibitz.worlds import get

    rows = get(name).demonstrations(split, count, seed)

    def for_a_person(console: Console) -> None:
        table = Table(box=None, header_style="dim")
        for column in ("prompt", "response", "answer"):
            table.add_column(column)
        for row in rows:
            table.add_row(*(Text(harmless(str(row.get(key, "")))) for key in ("prompt", "response", "answer")))
        console.print(table)

    ctx.obj.result({"world": name, "rows": rows}, for_a_person)


@worlds.command(name="make")
def make_world(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="A world, such as arithmetic.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for teacher/ and student/. Default: runs/worlds/NAME.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed. The models that come with kibitz have seed 0.")] = 0,
) -> None:
    """Train a world's models from scratch: the teacher, and the student before on-policy distillation."""
    from kibitz.worlds import get

    get(name)  # a mistyped name is told before torch loads

    from kibitz.experiments.make_world import make

    out: Output = ctx.obj
    folder = output or Path("runs/worlds") / name
    with out.bar() as bar:
        evals = make(name, folder, seed, bar)

    def for_a_person(console: Console) -> None:
        from kibitz.cli import show

        for stage, row in evals.items():
            console.print(Text(f"\n{stage}", style="bold"))
            show.evaluation(console, row)
        console.print(Text(f"models     {folder}"), soft_wrap=True)

    out.result({"world": name, "folder": folder, "evals": evals}, for_a_person)
