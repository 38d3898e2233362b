"""`kibitz chat`: talk to a model, at a terminal or line by line from a file."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from kibitz.cli.output import Output, harmless
from kibitz.cli.places import resolved

if TYPE_CHECKING:
    from kibitz.evaluate.chat import Conversation

NEW = "/new"


def chat(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A run folder (its last checkpoint is used), a model folder, or a hub name.")
    ],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    single: Annotated[
        bool, typer.Option("--single", help="Treat every line as a new conversation, as the toy worlds need.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Token limit of an answer.")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Talk to a model. `/new` starts a new conversation; an empty line or Ctrl-D ends the chat; Ctrl-C stops an answer.

    Input may come from a pipe: `echo "5+2*3" | kibitz chat runs/demo --single`.
    """
    from kibitz.evaluate.chat import Conversation
    from kibitz.types import Sampling

    out: Output = ctx.obj
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    conversation = Conversation.with_model(resolved(model), sampling, system)
    at_terminal = sys.stdin.isatty()
    said: list[dict[str, str]] = []
    for line in _lines(out, at_terminal):
        if single or line == NEW:
            conversation.forget()
        if line == NEW:
            continue
        live = at_terminal and not out.as_json
        try:
            answer = _streamed(out.console, conversation, line) if live else conversation.ask(line)
        except ValueError as error:
            if not at_terminal:
                raise
            out.fail(str(error))
            continue
        said.append({"user": line, "assistant": answer})
        if not out.as_json and not live:
            _show(out.console, said[-1])
    if out.as_json:
        out.result({"model": model, "turns": said}, lambda _: None)


def _lines(out: Output, at_terminal: bool) -> Iterator[str]:
    """Yield the person's lines: asked for at a terminal, else read from stdin, where empty lines are passed over."""
    if not at_terminal:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    while True:
        try:
            line = out.errors.input(Text("you    ", style="bold")).strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def _streamed(console: Console, conversation: "Conversation", line: str) -> str:
    """Print the answer as it is written. Ctrl-C ends the answer, not the conversation."""
    pieces: list[str] = []
    stream = conversation.stream(line)
    try:
        for piece in stream:
            console.print(Text("" if pieces else "model  ", style="bold"), end="")
            console.print(Text(harmless(piece)), end="", soft_wrap=True)
            pieces.append(piece)
    except KeyboardInterrupt:
        stream.close()
        pieces.append(" (stopped)")
        console.print(Text(pieces[-1], style="dim"), end="")
    console.print()
    return "".join(pieces)


def _show(console: Console, turn: dict[str, str]) -> None:
    console.print(Text.assemble(("you    ", "bold"), harmless(turn["user"])), soft_wrap=True)
    console.print(Text.assemble(("model  ", "bold"), harmless(turn["assistant"])), soft_wrap=True)
