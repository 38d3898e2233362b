"""The command line in this process: what it says, and what a mistake must look like."""

from typing import Any

from typer.testing import CliRunner

from kibitz.cli import app


def kibitz_says(*args: object, **options: Any):
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="kibitz", **options)


def assert_refused(answer, *words: object) -> None:
    """One sentence on stderr, nothing on stdout, exit code 2."""
    assert answer.exit_code == 2, answer.output
    assert answer.stdout == ""
    lines = answer.stderr.strip().splitlines()
    assert len(lines) == 1, answer.stderr
    assert lines[0].startswith("error: ")
    assert all(str(word) in lines[0] for word in words), lines[0]
    assert "debug" not in lines[0], "kibitz itself should say what is wrong, not a library"
