"""The command line. It reads and prints; what it does stands in the library.

`--quiet`, `--json` and `--debug` may stand anywhere on the line. A mistake of the person is a sentence on stderr and exit
code 2, a fault of kibitz a short report and exit code 1, Ctrl-C exit code 130: `mistakes.py` says which is which. Nothing
heavy is imported before a command that needs it has begun.
"""

import sys
from contextlib import suppress
from io import UnsupportedOperation
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import kibitz
from kibitz.cli import chat, check, control, data, experiments, gguf, init, models, serve, training, watch
from kibitz.cli.mistakes import explained
from kibitz.cli.output import Output

ANYWHERE = ("--quiet", "-q", "--json", "--debug")


class Commands(TyperGroup):
    """Lets the global options stand behind the command too, and has every failure explained."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        first = [arg for arg in args[:end] if arg in ANYWHERE]
        rest = [arg for arg in args[:end] if arg not in ANYWHERE]
        return super().parse_args(ctx, first + rest + args[end:])

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        with explained(typer.Context(self, info_name=info_name), debug=False):
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: typer.Context):
        with explained(ctx, debug=ctx.params["debug"]):
            return super().invoke(ctx)


app = typer.Typer(
    name="kibitz",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kibitz {kibitz.__version__}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the result only, without progress.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object, without progress.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="KIBITZ_DEBUG", help="On an error, show the traceback.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """On-policy distillation of language models: the student writes, the teacher scores every token."""
    ctx.obj = Output(quiet=quiet, as_json=json)


app.command()(training.demo)
app.command()(init.init)
app.command()(training.train)
app.command()(check.check)
app.command(name="eval")(models.evaluate)
app.command()(models.score)
app.command()(models.export)
app.command(name="import")(gguf.import_model)
app.command()(chat.chat)
app.command()(data.report)
app.command()(watch.watch)
app.add_typer(data.worlds, name="worlds")
app.add_typer(control.app, name="control")
app.command()(experiments.reproduce)
app.command()(data.recipes)
app.command()(data.schema)
app.command()(serve.serve)


def main() -> None:
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # A terminal that cannot show a sign gets a question mark. A stream that was read before stays as it is.
        with suppress(AttributeError, UnsupportedOperation):
            stream.reconfigure(errors="replace")
    app(prog_name="kibitz")
