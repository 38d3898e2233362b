"""`kibitz serve`: the vLLM servers that a recipe needs."""

import os
import shutil
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
    python: Annotated[
        str | None,
        typer.Option(help="The Python that has vLLM. Default: KIBITZ_VLLM, the vllm on the PATH, or this one."),
    ] = None,
    cpu: Annotated[
        bool | None, typer.Option("--cpu/--gpu", help="The build of vLLM. Default: CPU if there is no GPU.")
    ] = None,
) -> None:
    """Print the commands that start the vLLM servers of a recipe at their addresses, or run them. Servers without an address are
    started and ended by `kibitz train`."""
    from kibitz import config
    from kibitz.config.servers import HostedConfig
    from kibitz.servers import commands
    from kibitz.servers.processes import Hosted

    out: Output = ctx.obj
    loaded = config.load(recipe, overrides or [])
    found = commands.commands(loaded, shutil.which("nvidia-smi") is None if cpu is None else cpu)
    for warning in filter(None, (one.warning() for one in found)):
        out.errors.print(f"warning: {harmless(warning)}", style="yellow", markup=False, soft_wrap=True)
    if not run:
        rows = [
            {"role": o.role, "url": o.url, "command": o.line(python or "python"), "warning": o.warning()} for o in found
        ]
        tree = {"servers": rows}
        out.result(
            tree, lambda console: _show(console, [(one.role, one.url, one.line(python or "python")) for one in found])
        )
        return
    logs = Path(loaded.output).parent / "servers"
    program = commands.program({**os.environ, **({} if python is None else {commands.PROGRAM: python})})
    hosted = Hosted(program, logs, out.say)
    out.say(f"starting {len(found)} servers; their logs are in {logs}")
    asked = [loaded.rollout.server, *(one for one in loaded.teachers if isinstance(one, HostedConfig))]
    try:
        hosted.start(found, max(one.start_timeout for one in asked), max(one.restarts for one in asked))
        out.say("press Ctrl-C to stop them")
        while not (ended := [one.own.ended for one in hosted.processes if one.own.ended is not None]):
            time.sleep(0.5)
    finally:
        hosted.close()
    raise ValueError(ended[0])


def _show(console: Console, found: list[tuple[str, str, str]]) -> None:
    for role, url, line in found:
        console.print(f"# {role}, {harmless(url)}", markup=False, highlight=False, style="dim")
        console.print(harmless(line), markup=False, highlight=False, soft_wrap=True)
