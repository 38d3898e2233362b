"""The shell commands that pages show: taken apart, compared with the real command line, and run."""

import contextlib
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from support.cli import kibitz_says
from support.paths import ROOT

from kibitz.cli import app


@dataclass(frozen=True)
class Command:
    """One command of a line; the one before a `|` says what it reads, the file behind a `>` keeps what it says."""

    words: tuple[str, ...]
    reads: "Command | None" = None
    file: str | None = None

    def __str__(self) -> str:
        before = f"{self.reads} | " if self.reads else ""
        return before + " ".join(self.words) + (f" > {self.file}" if self.file else "")

    @property
    def program(self) -> str:
        return self.words[0].rpartition("/")[2]


def commands(block: str) -> Iterator[Command]:
    """The commands of a block, as a shell takes it apart; comments are left out."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&>;")
        lexer.whitespace_split = True
        words: list[str] = []
        reads: Command | None = None
        for word in [*lexer, ";"]:
            if word == "|":
                words, reads = [], _command(words, reads)
            elif word in ("&&", ";"):
                if words:
                    yield _command(words, reads)
                words, reads = [], None
            else:
                words.append(word)


def _command(words: list[str], reads: Command | None) -> Command:
    file = words[words.index(">") + 1] if ">" in words else None
    return Command(tuple(words[: words.index(">")] if file else words), reads, file)


# ------------------------------------------------------------------ without running


def mistake(command: Command) -> str | None:
    """What is wrong with a command as it is written: no such program, subcommand, option, target, file or extra."""
    words = list(command.words)
    if "-m" in words and words[words.index("-m") + 1] == "kibitz":  # python -m kibitz, torchrun ... -m kibitz
        return _of_kibitz(words[words.index("-m") + 2 :])
    check = CHECKS.get(command.program)
    return check(words[1:]) if check else f"`{command.program}` is a program that no page shows"


def _of_kibitz(words: list[str]) -> str | None:
    found: Any = typer.main.get_command(app)
    known = _options(found)
    while hasattr(found, "commands") and words and not words[0].startswith("-"):
        if words[0] not in found.commands:
            return f"kibitz has no command {words[0]}"
        found, words = found.commands[words[0]], words[1:]
        known |= _options(found)
    wrong = [word for word in words if word.startswith("-") and word.partition("=")[0] not in known]
    return f"kibitz {found.name or ''} has no option {wrong[0]}" if wrong else None


def _options(command: Any) -> set[str]:
    named = {name for param in command.params for name in (*param.opts, *param.secondary_opts) if name.startswith("-")}
    return named | {"-h", "--help"}


def _of_make(words: list[str]) -> str | None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    wrong = [word for word in words if word not in targets]
    return f"the Makefile has no target {wrong[0]}" if wrong else None


def _of_pip(words: list[str]) -> str | None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name for word in words for some in re.findall(r"\[(.+)\]", word) for name in some.split(",")}
    wrong = sorted(extras - set(project["optional-dependencies"]))
    return f"pyproject.toml has no extra {wrong[0]}" if wrong else None


def _of_python(words: list[str]) -> str | None:
    script = next(iter(words), "")
    if script in ("-m", "-c"):
        return None
    if not (ROOT / script).is_file():
        return f"there is no file {script}"
    text = (ROOT / script).read_text(encoding="utf-8")
    wrong = [word for word in words if word.startswith("--") and f'"{word}"' not in text]
    return f"{script} has no option {wrong[0]}" if wrong else None


def _anything(words: list[str]) -> None:
    """Of a program that is not ours nothing is known."""


CHECKS: dict[str, Callable[[list[str]], str | None]] = {
    "kibitz": _of_kibitz,
    "make": _of_make,
    "pip": _of_pip,
    **dict.fromkeys(("python", "python3"), _of_python),
    **dict.fromkeys((".", "echo", "ssh", "srun", "torchrun", "rsync", "vllm"), _anything),
}

COMMAND = re.compile(rf"(?:\.venv/bin/)?(?:{'|'.join(map(re.escape, CHECKS))})\s")
"""How a line begins that is a command."""

# ------------------------------------------------------------------ running


def run(command: Command, more: tuple[str, ...] = ()) -> str:
    """Run a command in this folder, with more words behind it; raises if it fails, returns what it says on stdout."""
    reads = run(command.reads) if command.reads else None
    said = _run([*command.words, *more], reads)
    if command.file:
        Path(command.file).write_text(said, encoding="utf-8")
    return said


def _run(words: list[str], reads: str | None) -> str:
    if words[0] == "echo":
        return " ".join(words[1:]) + "\n"
    if words[0] == "torchrun":
        return _outside([sys.executable, "-m", "torch.distributed.run", *words[1:]])
    if words[:2] == ["kibitz", "watch"]:
        return _watched(words[1:])
    if words[:2] == ["kibitz", "init"]:
        return _answered(words[1:], ["S", "T", "prompts.jsonl", "24", "n"])
    if words[0] != "kibitz":
        raise AssertionError(f"tests/support/commands.py knows no way to run `{words[0]}`")
    answer = kibitz_says(*words[1:], input=reads)
    if answer.exit_code:
        raise AssertionError(f"exit code {answer.exit_code}: {answer.output[-2000:]}{answer.exception or ''}")
    return answer.stdout


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def _outside(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise AssertionError(f"exit code {done.returncode}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    return done.stdout


def _watched(words: list[str]) -> str:
    """A page is served until Ctrl-C, which comes when it has been fetched once."""
    command = [sys.executable, "-m", "kibitz", *words, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment()) as server:
        said = ""
        while "page " not in said and (line := server.stdout.readline()):
            said += line
        address = re.search(r"http://\S+", said)
        if address is None:
            raise AssertionError(f"no address: {said}")
        with urllib.request.urlopen(address[0]) as page:
            assert b"<title>" in page.read()
        server.send_signal(signal.SIGINT)
        server.wait(600)
    assert server.returncode == 0
    return said


def _answered(words: list[str], answers: list[str]) -> str:
    """Questions are asked at a terminal only: here is one, with somebody who answers at once."""
    ours, theirs = pty.openpty()
    os.write(ours, ("\n".join(answers) + "\n").encode())
    command = [sys.executable, "-m", "kibitz", *words]
    said = b""
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=_environment()) as asking:
        os.close(theirs)
        with contextlib.suppress(OSError):  # how Linux says that the other side has closed
            while some := os.read(ours, 4096):
                said += some
    os.close(ours)
    if asking.returncode:
        raise AssertionError(f"exit code {asking.returncode}: {said.decode()[-2000:]}")
    return said.decode()
