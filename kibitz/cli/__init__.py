"""The command line. It reads and prints; what it does stands in the library.

`--quiet`, `--json` and `--debug` may stand anywhere on the line. A mistake of the person is a sentence on stderr and
exit code 2; Ctrl-C is exit code 130. Nothing heavy is imported before a command that needs it has begun.
"""

import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

import kibitz
from kibitz.cli import chat, check, data, experiments, gguf, models, serve, training
from kibitz.cli.output import Output, sentence

ANYWHERE = ("--quiet", "-q", "--json", "--debug")


class Commands(TyperGroup):
    """Lets the global options stand behind the command too, and turns mistakes into sentences."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        first = [arg for arg in args[:end] if arg in ANYWHERE]
        rest = [arg for arg in args[:end] if arg not in ANYWHERE]
        return super().parse_args(ctx, first + rest + args[end:])

    def invoke(self, ctx: typer.Context):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `kibitz worlds show | head` is nobody's mistake
        except KeyboardInterrupt:
            Output().fail("stopped")
            raise typer.Exit(130) from None
        except (ValueError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            Output().fail(sentence(error))
            raise typer.Exit(2) from None


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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The result as one JSON object on stdout, no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="On a mistake, show where in the code it came up.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """On-policy distillation of language models: the student plays, the teacher comments on every token."""
    ctx.obj = Output(quiet=quiet, as_json=json)


app.command()(training.demo)
app.command()(training.train)
app.command()(check.check)
app.command(name="eval")(models.evaluate)
app.command()(models.score)
app.command()(models.export)
app.command(name="import")(gguf.import_model)
app.command()(chat.chat)
app.command()(data.report)
app.add_typer(data.worlds, name="worlds")
app.command()(experiments.reproduce)
app.command()(data.schema)
app.command()(serve.serve)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a sign gets a question mark
    app()
