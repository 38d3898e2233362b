"""`kibitz serve`: the vLLM servers that a recipe needs."""

import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kibitz.cli.output import Output, harmless


def serve(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe with rollout.urls, or with a teacher that has a url.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[A.B=VALUE]...", help="Change a setting of the recipe, as for train.")
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="Start the servers here, until Ctrl-C.")] = False,
    python: Annotated[str, typer.Option(help="The Python interpreter that has vLLM.")] = "python",
    cpu: Annotated[
        bool | None, typer.Option("--cpu/--gpu", help="The build of vLLM. Default: CPU if there is no GPU.")
    ] = None,
) -> None:
    """Print the commands that start the vLLM servers of a recipe, or run them."""
    from kibitz import config
    from kibitz.servers import commands

    out: Output = ctx.obj
    loaded = config.load(recipe, overrides or [])
    found = commands.commands(loaded, shutil.which("nvidia-smi") is None if cpu is None else cpu)
    for warning in filter(None, (one.warning() for one in found)):
        out.errors.print(f"warning: {harmless(warning)}", style="yellow", markup=False, soft_wrap=True)
    if not run:
        rows = [{"role": o.role, "url": o.url, "command": o.line(python), "warning": o.warning()} for o in found]
        tree = {"servers": rows}
        out.result(tree, lambda console: _show(console, [(one.role, one.url, one.line(python)) for one in found]))
        return
    logs = Path(loaded.output).parent / "servers"
    out.say(f"starting {len(found)} servers; their logs are in {logs}")
    with commands.running(found, sys.executable if python == "python" else python, logs, told=out.say) as processes:
        out.say("press Ctrl-C to stop them")
        while all(process.poll() is None for process in processes):
            time.sleep(0.5)
    raise ValueError(f"a server stopped: see its log in {logs}")


def _show(console: Console, found: list[tuple[str, str, str]]) -> None:
    for role, url, line in found:
        console.print(f"# {role}, {harmless(url)}", markup=False, highlight=False, style="dim")
        console.print(harmless(line), markup=False, highlight=False, soft_wrap=True)
