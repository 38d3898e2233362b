"""What a command says when it cannot go on, and the exit code that says it to a program.

What a person can mend (a wrong name, a missing package, a full disk) is one sentence and exit code 2. Anything else is a
fault of kibitz: a short report of what was being done, and exit code 1. `--debug` shows the traceback instead of either.
"""

import dis
import errno
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import typer

import kibitz
from kibitz.cli.output import Output

PACKAGE = Path(kibitz.__file__).parent
UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])
EXTRAS = {
    "accelerate": "bitsandbytes",
    "bitsandbytes": "bitsandbytes",
    "gguf": "gguf",
    "gplearn": "control",
    "gymnasium": "control",
    "lm_eval": "evals",
    "matplotlib": "plots",
    "peft": "lora",
    "reasoning_gym": "tasks",
    "skl2onnx": "control",
    "sklearn": "control",
    "stable_baselines3": "control",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""The extra of kibitz that brings a package."""
FULL = "the disk is full: free some space, or write to another one"
REASONS = {
    errno.ENOENT: "there is no file or folder of that name",
    errno.EISDIR: "that is a folder, and a file is needed",
    errno.ENOTDIR: "a part of that path is a file, and a folder is needed",
    errno.EEXIST: "a file of that name is in the way",
    errno.EACCES: "there is no permission to use it",
    errno.EPERM: "there is no permission to use it",
    errno.EROFS: "that disk can only be read",
    errno.ENAMETOOLONG: "that name is too long",
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: "the file would be larger than the system allows",
}
OUT_OF_MEMORY = (
    "there is not enough memory: lower optim.tokens_per_micro_batch or rollout.max_rows, or see docs/teachers.md, Memory "
    "(`kibitz check` estimates what a recipe needs)"
)


@contextmanager
def explained(ctx: Any, debug: bool) -> Iterator[None]:
    """Turn whatever ends a command into words on stderr and an exit code."""
    try:
        yield
        _flush()  # a full disk is found here and not behind the last line of Python
    except KeyboardInterrupt:
        Output().fail("stopped")
        raise typer.Exit(130) from None
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        Output().fail(_of_the_line(error, ctx))
        raise typer.Exit(2) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug or _reader_is_gone(error):
            raise
        said = sentence(error)
        Output().fail(report(error, ctx) if said is None else said)
        _let_go_of_stdout()
        raise typer.Exit(1 if said is None else 2) from None


def sentence(error: Exception) -> str | None:
    """What a person can mend, as one line; None for what nobody foresaw."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("kibitz"):
        package = error.name.partition(".")[0]
        brings = f"'kibitz[{EXTRAS[package]}]'" if package in EXTRAS else package
        return f"the package {package} is missing: pip install {brings}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return OUT_OF_MEMORY
    if isinstance(error, OSError) and error.errno is not None:
        reason = REASONS.get(error.errno) or (error.strerror or text)
        return reason if error.filename is None else f"{_shown(error.filename)}: {reason}"
    if "No space left on device" in text:  # the writers of weights have errors of their own
        return FULL
    if isinstance(error, ConnectionError | TimeoutError):
        return text or "the connection was lost"
    return text if isinstance(error, ValueError | OSError) and _is_said_by_kibitz(error) else None


def _is_said_by_kibitz(error: Exception) -> bool:
    """Whether a `raise` of kibitz is the origin: Python and libraries raise ValueError, too, and know nothing of recipes."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None or not Path(frame.tb_frame.f_code.co_filename).is_relative_to(PACKAGE):
        return False
    return dis.opname[frame.tb_frame.f_code.co_code[frame.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")


def report(error: Exception, ctx: Any) -> str:
    """What an error report needs of an error that nobody foresaw, in three lines."""
    command = " ".join(["kibitz", *([ctx.invoked_subcommand] if ctx.invoked_subcommand else [])])
    doing = ctx.obj.doing() if isinstance(ctx.obj, Output) else ""
    where, text = _place(error), " ".join(str(error).split())[:500]
    return "\n".join((
        f"{command} failed{doing}, which is a fault of kibitz: {type(error).__name__}{f': {text}' if text else ''}"
        + (f" ({where})" if where else ""),
        f"kibitz {kibitz.__version__}, {_versions()}Python {platform.python_version()} on {platform.platform(terse=True)}",
        "The same command with --debug, or KIBITZ_DEBUG=1, shows the traceback; please report it with these lines",
    ))  # fmt: skip


def _place(error: BaseException) -> str | None:
    """The last line of kibitz that an error came through."""
    found, frame = None, error.__traceback__
    while frame is not None:
        path = Path(frame.tb_frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            found = f"{PACKAGE.name}/{path.relative_to(PACKAGE).as_posix()}, line {frame.tb_lineno}"
        frame = frame.tb_next
    return found


def _of_the_line(error: Any, ctx: Any) -> str:
    """A mistake in the command line, and where its words are explained."""
    text = " ".join(error.format_message().split()).rstrip(".")
    text, of = f"{text[:1].lower()}{text[1:]}", error.ctx or ctx
    return text if text.endswith("?") else f"{text}; see `{of.command_path} --help`"


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _shown(name: object) -> str:
    return os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else str(name)


def _versions() -> str:
    found = ""
    for package in ("torch", "transformers"):
        with suppress(metadata.PackageNotFoundError):
            found += f"{package} {metadata.version(package)}, "
    return found


def _reader_is_gone(error: Exception) -> bool:
    """Whether the program that reads the result has ended, as in `kibitz worlds show arithmetic | head`."""
    if not isinstance(error, BrokenPipeError):
        return False
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


def _let_go_of_stdout() -> None:
    """Let what cannot be written stay unwritten, where Python would try again and fail when it ends."""
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
