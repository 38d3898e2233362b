"""Does the program in a response pass the row's tests?

`tests` is a list. An entry {"input": ..., "output": ...} runs the program once; its output must be equal up to white
space at the ends of lines. A text holds Python statements, one or more, such as `assert add(1, 2) == 3`.

What a program can do to be called correct without being it:

- by output: nothing; it never sees the expected output.
- a test that compares an expression with a literal (`assert f(2) == 3`): nothing but giving the expected value. The
  literal stays here; the sandbox gives the expression's value back as plain data, and the comparison is ours, so
  `__eq__`, patched builtins, `sys.exit` and forged reports are of no use. The value must be plain: None, numbers,
  strings, bytes, and lists, tuples, sets, dicts of them. What stands in the expression beside the call, such as
  the `abs(...)` of `assert abs(f(2) - 3.5) < 1e-6`, is computed where the program could tamper with it.
- any other test (`assert all(...)`, `assert f(x) == g(x)`, a `check(candidate)` function) runs in the program's own
  interpreter. It must report with a secret of this run, builtins are those of before the program, and leaving early
  or printing success is failing. But a value with an `__eq__` that says yes, or a program that searches the
  interpreter's frames or memory for the secret, is believed: write tests of the other two kinds where it matters.
"""

import ast
import json
import operator
import re
import secrets
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kibitz.graders import sandbox
from kibitz.graders.sandbox import Limits
from kibitz.types import Prompt

BLOCK = re.compile(
    r"^[ \t]*```[ \t]*(?P<language>[\w+-]*)[^\n]*\n(?P<body>.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)
PYTHON = ("python", "py", "python3")

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda value, literal: value in literal,
    ast.NotIn: lambda value, literal: value not in literal,
}


@dataclass(frozen=True)
class Verdict:
    """`reason` says what went wrong, and is empty if all tests passed."""

    passed: bool
    reason: str = ""


@dataclass(frozen=True)
class Statement:
    """One statement. With a comparison its `source` is an expression, whose value is judged outside the sandbox."""

    text: str
    source: str
    compare: Callable[[Any, Any], bool] | None = None
    literal: Any = None


def code(prompt: Prompt, text: str) -> float:
    """1 if the last fenced Python block of the text, or the whole of it, passes all the row's `tests`."""
    tests = prompt.columns.get("tests")
    if not tests:
        raise ValueError(
            f"prompt {prompt.key} has no tests: the grader `code` needs a column `tests`, a list of assert statements or of "
            '{"input": ..., "output": ...}'
        )
    try:
        return float(judge(program_of(text), [tests] if isinstance(tests, str | dict) else tests).passed)
    except ValueError as error:
        raise ValueError(f"prompt {prompt.key}: {error}") from None


def program_of(text: str) -> str:
    """The last fenced block marked as Python, else the last one not marked at all, else the text."""
    blocks = [(match["language"].lower(), match["body"]) for match in BLOCK.finditer(text)]
    for languages in (PYTHON, ("",)):
        for language, body in reversed(blocks):
            if language in languages:
                return textwrap.dedent(body)
    return text


def judge(program: str, tests: Sequence[str | dict[str, str]], limits: Limits | None = None) -> Verdict:
    """Run a program against its tests, up to the first that fails. `limits` are for each run of the program.

    ValueError for tests that cannot be read, RuntimeError where programs cannot be confined."""
    limits = limits or Limits()
    statements = [test for entry in tests if isinstance(entry, str) for test in read_tests(entry)]
    pairs = [_read_pair(entry) for entry in tests if not isinstance(entry, str)]
    verdict = _judge_tests(program, statements, limits) if statements else Verdict(True)
    for given, expected in pairs:
        if not verdict.passed:
            break
        verdict = _judge_output(program, given, expected, limits)
    return verdict


# ------------------------------------------------------------------ by output


def _read_pair(entry: Any) -> tuple[str, str]:
    match entry:
        case {"input": str(given), "output": str(expected)}:
            return given, expected
    raise ValueError(f'a test is a text of Python or {{"input": "...", "output": "..."}}, not {str(entry)[:200]}')


def _judge_output(program: str, given: str, expected: str, limits: Limits) -> Verdict:
    outcome = sandbox.run({"source": program, "tests": None, "nonce": None}, given.encode(), limits)
    if outcome.stopped:
        return Verdict(False, f"on input {given[:100]!r} {outcome.stopped}")
    if _lines(outcome.output.decode(errors="replace")) != _lines(expected):
        return Verdict(False, f"on input {given[:100]!r} it wrote {outcome.output[:100]!r}")
    return Verdict(True)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


# ------------------------------------------------------------------ by statements


def read_tests(text: str) -> list[Statement]:
    """The statements of a text, each a test of its own."""
    try:
        return [_read_test(statement) for statement in ast.parse(text).body]
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"the test {text[:200]!r} is not Python: {error}") from None


def _read_test(statement: ast.stmt) -> Statement:
    text = ast.unparse(statement)
    match statement:
        case ast.Assert(test=ast.Compare(left=left, ops=[operation], comparators=[right])) if _comparable(
            operation, right
        ):
            return Statement(text, ast.unparse(left), COMPARISONS[type(operation)], ast.literal_eval(right))
        case ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right])) if _is_literal(left):
            return Statement(text, ast.unparse(right), operator.eq, ast.literal_eval(left))
    return Statement(text, text)


def _comparable(operation: ast.cmpop, right: ast.expr) -> bool:
    """Whether comparing with a copy is the same as comparing in place; identity is only for None, True and False."""
    if isinstance(operation, ast.Is | ast.IsNot):
        return isinstance(right, ast.Constant) and (right.value is None or isinstance(right.value, bool))
    return _is_literal(right)


def _is_literal(expression: ast.expr) -> bool:
    try:
        ast.literal_eval(expression)
    except (ValueError, TypeError):
        return False
    return True


def _judge_tests(program: str, tests: list[Statement], limits: Limits) -> Verdict:
    nonce = secrets.token_hex(16)
    sources = [("value" if test.compare else "run", test.source) for test in tests]
    outcome = sandbox.run({"source": program, "tests": sources, "nonce": nonce}, b"", limits)
    reports = outcome.output.decode(errors="replace").split("\n")
    for number, test in enumerate(tests):
        begin = f"{nonce} {number} "
        if number >= len(reports) or not reports[number].startswith(begin):
            return Verdict(False, f"{test.text[:200]} did not report: {outcome.stopped or 'it raised, or left early'}")
        if test.compare is not None and not _holds(test, reports[number].removeprefix(begin)):
            return Verdict(False, f"{test.text[:200]}: got {reports[number].removeprefix(begin)[:100]}")
    return Verdict(not outcome.stopped, outcome.stopped)


def _holds(test: Statement, report: str) -> bool:
    assert test.compare is not None
    try:
        return bool(test.compare(_from_plain(json.loads(report)), test.literal))
    except (ValueError, TypeError, RecursionError):  # values that do not compare, or data that is none
        return False


def _from_plain(data: Any) -> Any:
    """The value that `plain` in confined.py wrote."""
    match data:
        case {"list": parts}:
            return [_from_plain(part) for part in parts]
        case {"tuple": parts}:
            return tuple(_from_plain(part) for part in parts)
        case {"set": parts}:
            return {_from_plain(part) for part in parts}
        case {"dict": pairs}:
            return {_from_plain(key): _from_plain(value) for key, value in pairs}
        case {"bytes": text}:
            return bytes.fromhex(text)
        case {"complex": [real, imaginary]}:
            return complex(real, imaginary)
        case _:
            return data
