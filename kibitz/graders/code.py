"""Does the program in a response pass the row's tests?

`tests` is a list. An entry {"input": ..., "output": ...} runs the program once; its output must be equal up to white
space at the ends of lines. A text holds Python statements, one or more, such as `assert add(1, 2) == 3`.

A program that is judged by output never sees the output expected. One that is judged by statements runs in a confined
process of its own; the statements run in another, with builtins, modules and expected values of their own, and call the
program over a line that carries plain data (numbers, texts, lists, dicts, dates, fractions and the like). So shadowed or
patched builtins and modules, `__eq__`, `sys.exit`, forged reports, frames, memory and exit hooks of the program decide nothing.

The names of a test are looked up in the tests first, then in Python's builtins, then in the program: a program that is to
define a `sum` cannot be tested by that name. A name used as a module (`math.isclose`) is Python's module, imported or not.

What a program can still do to be called correct without being it:

- answer the tests alone, as by a table of their arguments where it can guess them.
- define what a test takes from it beside the function in question: `isclose` where the test does not import it.
- define the class that it is asked for with an `__eq__` that says yes, where a test compares two objects of the program's
  (`assert P(1) == P(1)`); an object and plain data are equal only if the data in it are.
- change an argument in place (`x.clear()`) that the test compares with later.

A correct program fails where a test needs more than the line carries: coroutines, operators between an object of the
program's class and plain data whose outcome is data, `in` for a class without `__iter__`, inheriting from the program's classes,
a StopIteration that is not that of `next`.
"""

import ast
import builtins
import json
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kibitz.graders import sandbox
from kibitz.graders.sandbox import Limits
from kibitz.graders.worker import Patience
from kibitz.types import Prompt

LANGUAGE = re.compile(r"[\w+-]+")
PYTHON = ("python", "py", "python3")
RESPONSE_SECONDS = 30.0
"""For all runs of one response together."""

_patience = Patience()


@dataclass(frozen=True)
class Verdict:
    """`reason` says what went wrong, and is empty if all tests passed. `late`: the program was stopped at its limit of time."""

    passed: bool
    reason: str = ""
    late: bool = False


@dataclass(frozen=True)
class Tests:
    """Statements, the names that may be the program's or are modules of Python's, and whether they need the program at all."""

    statements: tuple[str, ...]
    names: tuple[str, ...]
    modules: tuple[str, ...]
    ask: bool


def code(prompt: Prompt, text: str) -> float:
    """1 if the last fenced Python block of the text, or the whole of it, passes all the row's `tests`."""
    try:
        tests = tests_of(prompt)
    except ValueError as error:
        raise ValueError(f"prompt {prompt.key}: {error}") from None
    limits = Limits()
    limits = replace(limits, wall_seconds=_patience.seconds(limits.wall_seconds))
    verdict = judge(program_of(text), tests, limits)
    _patience.remember(verdict.late)
    return float(verdict.passed)


def tests_of(prompt: Prompt) -> list[Any]:
    """The row's tests, each of which can be read. ValueError if there are none, or if they ask nothing of a program."""
    tests = prompt.columns.get("tests")
    if not tests:
        raise ValueError(
            "no tests: the grader `code` needs a column `tests`, a list of assert statements or of "
            '{"input": ..., "output": ...}'
        )
    tests = [tests] if isinstance(tests, str | dict) else tests
    if not isinstance(tests, Sequence):
        raise ValueError(
            f'tests: a list of assert statements or of {{"input": ..., "output": ...}}, not {tests!r:.100}'
        )
    try:
        pairs = [_read_pair(entry) for entry in tests if not isinstance(entry, str)]
        read = read_tests([entry for entry in tests if isinstance(entry, str)])
    except ValueError as error:
        raise ValueError(f"tests: {error}") from None
    if not pairs and not read.ask:
        raise ValueError(
            "tests: they ask nothing of a program, since all their names are their own or Python's: name what the program "
            "defines otherwise than Python's builtins"
        )
    return list(tests)


def program_of(text: str) -> str:
    """The last fenced block marked as Python, else the last one not marked at all, else the text."""
    blocks = _blocks(text)
    for languages in (PYTHON, ("",)):
        for language, body in reversed(blocks):
            if language in languages:
                return textwrap.dedent(body)
    return text


def _blocks(text: str) -> list[tuple[str, str]]:
    """Language and body of each fenced block; the last may lack its end."""
    blocks: list[tuple[str, list[str]]] = []
    inside = False
    for line in text.split("\n"):
        if not line.lstrip(" \t").startswith("```"):
            if inside:
                blocks[-1][1].append(line + "\n")
            continue
        if not inside:
            language = LANGUAGE.match(line.strip().lstrip("`").lstrip())
            blocks.append((language[0].lower() if language else "", []))
        inside = not inside
    if inside and blocks[-1][1]:
        blocks[-1][1][-1] = blocks[-1][1][-1].removesuffix("\n")  # the text ends here, not the line
    return [(language, "".join(body)) for language, body in blocks]


def judge(program: str, tests: Sequence[Any], limits: Limits | None = None) -> Verdict:
    """Run a program against its tests, up to the first that fails. `limits` are for each run of the program.

    ValueError for tests that cannot be read, RuntimeError where programs cannot be confined."""
    limits, end = limits or Limits(), time.monotonic() + RESPONSE_SECONDS
    statements = read_tests([entry for entry in tests if isinstance(entry, str)])
    pairs = [_read_pair(entry) for entry in tests if not isinstance(entry, str)]
    verdict = _judge_statements(program, statements, limits) if statements.statements else Verdict(True)
    for given, expected in pairs:
        if not verdict.passed:
            break
        if (left := end - time.monotonic()) <= 0:
            return Verdict(False, f"its tests took longer than {RESPONSE_SECONDS} seconds", late=True)
        verdict = _judge_output(program, given, expected, replace(limits, wall_seconds=min(limits.wall_seconds, left)))
    return verdict


# ------------------------------------------------------------------ by output


def _read_pair(entry: Any) -> tuple[str, str]:
    match entry:
        case {"input": str(given), "output": str(expected)}:
            given.encode()  # the error for half a character is a ValueError
            return given, expected
    raise ValueError(f'a test is a text of Python or {{"input": "...", "output": "..."}}, not {str(entry)[:200]}')


def _judge_output(program: str, given: str, expected: str, limits: Limits) -> Verdict:
    outcome = sandbox.run({"source": program}, given.encode(), limits)
    if outcome.stopped:
        return Verdict(False, f"on input {given[:100]!r} {outcome.stopped}", outcome.late)
    if _lines(outcome.output.decode(errors="replace")) != _lines(expected):
        return Verdict(False, f"on input {given[:100]!r} it wrote {outcome.output[:100]!r}")
    return Verdict(True)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


# ------------------------------------------------------------------ by statements


def read_tests(texts: Sequence[str]) -> Tests:
    """The statements of all texts, each a test of its own."""
    bodies = []
    for text in texts:
        try:
            bodies += ast.parse(text).body
            statements = tuple(ast.unparse(statement) for statement in bodies)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"the test {text[:200]!r} is not Python: {error}") from None
    nodes = [node for statement in bodies for node in ast.walk(statement)]
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    dotted = {node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}
    own = _made(bodies)
    modules = (dotted & set(sys.stdlib_module_names)) - called - own
    names -= set(vars(builtins)) | modules | own
    local = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    local |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return Tests(statements if bodies else (), tuple(sorted(names)), tuple(sorted(modules)), bool(names - local))


def _made(statements: Sequence[ast.stmt]) -> set[str]:
    """Names that the tests make before any of their statements uses them, by a definition, an import or an assignment."""
    made: set[str] = set()
    used: set[str] = set()
    for statement in statements:
        loads = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                made |= {name} - used
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                made |= {(alias.asname or alias.name).split(".")[0] for alias in aliases} - used
            case ast.Assign(targets=targets):
                parts = {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
                made |= parts - used - loads
        used |= loads
    return made


def _judge_statements(program: str, tests: Tests, limits: Limits) -> Verdict:
    job = {"tests": tests.statements, "names": tests.names, "modules": tests.modules}
    outcome = sandbox.run_tests(program, job, limits)
    try:
        said = json.loads(outcome.output)
    except ValueError:
        return Verdict(False, outcome.stopped or "the tests ended without a verdict", outcome.late)
    return Verdict(said["passed"] and not outcome.stopped, said["reason"] or outcome.stopped)
