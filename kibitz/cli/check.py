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
        list[str] | None,
        typer.Argument(
            metavar="[A.B=VALUE]...", help="Change a setting of the recipe, such as rollout.max_tokens=512."
        ),
    ] = None,
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Load no weights: check text, memory and cost only.")
    ] = False,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts that both models answer.")] = 32,
    price: Annotated[
        float | None,
        typer.Option(min=0, help="Price of a device-hour, in any currency; adds the price of the run to the output."),
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="Number of devices that share the run.")] = 1,
    memory: Annotated[
        float | None,
        typer.Option(min=0, help="Memory of a GPU in GiB, such as 24, 80 or 141. Default: this machine's."),
    ] = None,
    teraflops: Annotated[
        float | None, typer.Option(min=0, help="Speed of a device in TFLOP/s. Default: measured here.")
    ] = None,
    local_teacher: Annotated[
        str | None,
        typer.Option(help="Folder with a copy of the teacher, to check its server's log-probabilities against."),
    ] = None,
) -> None:
    """Check a recipe before training: tokenizers, chat templates, end tokens, memory, cost and a few rollouts.

    Exit code 0: no problem found. 1: the run would go wrong (a red light). 2: the recipe is invalid."""
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
