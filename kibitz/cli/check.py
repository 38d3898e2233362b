"""`kibitz check`: the preflight doctor."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kibitz.cli.output import Output, harmless

if TYPE_CHECKING:
    from kibitz.preflight import Finding

STYLES = {"green": "green", "amber": "yellow", "red": "bold red"}
SIGNS = {"green": "ok", "amber": "look", "red": "STOP"}


def check(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A YAML file, as `kibitz train` takes it.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[A.B=VALUE]...", help="Such as rollout.max_tokens=512.")
    ] = None,
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Load no weights: text, memory and cost only.")
    ] = False,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts both models answer.")] = 32,
    price: Annotated[
        float | None, typer.Option(min=0, help="The price of one device for one hour, in any currency.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="Over how many the run is divided.")] = 1,
    memory: Annotated[
        float | None,
        typer.Option(min=0, help="Of one GPU, in GiB, such as 24, 80 or 141; or this device's own."),
    ] = None,
    teraflops: Annotated[
        float | None, typer.Option(min=0, help="Of one device in matrix products; or measured.")
    ] = None,
    local_teacher: Annotated[
        str | None, typer.Option(help="A copy of the teacher here, to compare its server's numbers with.")
    ] = None,
) -> None:
    """Look at a recipe before it costs anything: tokenizers, templates, ends, memory, cost, and a few rollouts.

    Exit code 0: go. 1: something would go wrong (a red light). 2: the recipe itself is mistaken."""
    from kibitz import config, preflight

    options = preflight.Options(price, teraflops, memory, devices, prompts, local_teacher)
    look = preflight.check_files if files_only else preflight.check
    found = []
    out: Output = ctx.obj
    for finding in look(config.load(recipe, overrides or []), options):
        found.append(finding)
        if out.live:
            show(out.console, finding)
    light = preflight.worst(found)
    tree = {"light": light, "findings": [finding.as_row() for finding in found]}
    out.result(tree, lambda console: None if out.live else _summary(console, found))
    if light == "red":
        raise typer.Exit(1)


def show(console: Console, finding: "Finding") -> None:
    """One line with its light; and where the two models read different text, both side by side."""
    sign = Text(f"{SIGNS[finding.light]:>5} ", style=STYLES[finding.light])
    console.print(sign + Text(f"{finding.name}: ", style="bold") + Text(harmless(finding.text)), soft_wrap=True)
    if finding.differences:
        table = Table(
            "", "student, or as it stands", "teacher, or the other way", box=None, header_style="dim", padding=(0, 1)
        )
        for number, (ours, theirs) in enumerate(finding.differences, 1):
            style = "" if ours == theirs else "yellow"
            table.add_row(str(number), Text(harmless(ours), style=style), Text(harmless(theirs), style=style))
        console.print(table)


def _summary(console: Console, found: "list[Finding]") -> None:
    for finding in found:
        if finding.light != "green":
            show(console, finding)
