"""`kibitz watch`: a page that follows runs while they go on."""

import errno
import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from kibitz.cli.output import Output, harmless

MOST = 6
"""Runs that are followed where none is named: the newest."""


def watch(
    ctx: typer.Context,
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]...", help="Run folders, also such as will come; without any the newest of runs/."
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of this machine only; 0: any that is free.")] = 8770,
    price: Annotated[float | None, typer.Option(min=0, help="The price of the machine for one hour.")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Watch runs in the browser while they go on: curves, tokens, guards, where the time goes, what is left.

    It reads the files of the run folders and can be started and ended at any moment. From another machine:
    ssh -L 8770:127.0.0.1:8770 HOST, and open the address that it prints."""
    from kibitz.report.watch import serve

    out: Output = ctx.obj
    folders = runs or newest_runs(Path("runs"))
    if not folders:
        raise ValueError("there is no run folder in runs/: write kibitz watch RUN, with the output of a recipe")
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; a recipe names the folder of its run under output")
    try:
        with serve(folders, port, price) as watching:
            out.result({"url": watching.url, "runs": folders}, lambda console: _say(console, watching.url, folders))
            out.console.file.flush()
            if open_page:
                webbrowser.open(watching.url)
            watching.server.serve_forever()
    except KeyboardInterrupt:
        return  # that is how it ends
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise ValueError(
            f"port {port} is taken, perhaps by another kibitz watch: write --port 0 for a free one"
        ) from None


def newest_runs(home: Path) -> list[Path]:
    """The run folders in a folder, and in its folders, those that were written to last first."""
    found = {path.parent for pattern in ("*/recipe.yaml", "*/*/recipe.yaml") for path in home.glob(pattern)}
    return sorted(found, key=_age)[:MOST]


def _age(folder: Path) -> tuple[float, str]:
    from kibitz.report.tail import newest

    return -(newest(folder) or 0.0), str(folder)


def _say(console: Console, url: str, folders: list[Path]) -> None:
    for folder in folders:
        waits = "" if (folder / "recipe.yaml").exists() else "  (no run there yet)"
        console.print(Text(f"run        {harmless(str(folder))}{waits}"), soft_wrap=True)
    console.print(Text(f"page       {url}"), soft_wrap=True)
    console.print(Text("Ctrl-C ends it; the runs go on.", style="dim"))
