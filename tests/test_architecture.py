"""The walls of the house: which room may import which, what a file may be, and what `import kibitz` costs.

The rooms stand in one order, that of the table in CONTRIBUTING.md: a room imports rooms before it and none after it.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from support.paths import ROOT

import kibitz

PACKAGE = Path(kibitz.__file__).parent
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 350, 60, 9

ROOMS = (
    "types",
    "signals",
    "config",
    "files",
    "report",  # reads the files of a run, and knows what its recipe's words mean
    "ledger",
    "control",  # policies: it knows no language model
    "logprobs",
    "losses",
    "batching",
    "worlds",
    "graders",
    "data",
    "servers",
    "models",
    "parallel",
    "engines",
    "teachers",
    "optim",
    "methods",
    "evaluate",
    "training",
    "preflight",
    "experiments",
    "cli",
    "__main__",
)
MAX_ENTRIES = 27
FORBIDDEN = {"vllm", "gymnasium", "ray", "hydra", "wandb", "tensorboard", "trackio", "lightning"}
THE_ONE_PLACE = {
    "kibitz.training.trackers": {"wandb", "tensorboard", "trackio"},
    "kibitz.control.environments": {"gymnasium"},
}


def module_name(path: Path) -> str:
    parts = ("kibitz", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def room(module: str) -> str:
    return (module.split(".")[1:] or [""])[0]


def imports(module: str) -> Iterator[str]:
    """Every module that is imported anywhere in the file: at its head, in a function, for types only."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in MODULES else source


@cache
def edges() -> set[tuple[str, str]]:
    return {(a, b) for a in MODULES for b in imports(a) if b in MODULES and a != b}


def test_the_plan_can_be_seen_at_a_glance():
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= MAX_ENTRIES, f"put the newest of {sorted(entries)} into a room that is there"


def test_every_room_has_its_place():
    there = {room(module) for module in MODULES} - {""}
    assert there == set(ROOMS), "give each room its place in ROOMS, and a line in the tables of CONTRIBUTING and README"


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_rooms_before_it(name):
    before = {"", *ROOMS[: ROOMS.index(name) + 1]}
    wrong = {f"{a} imports {b}" for a, b in edges() if room(a) == name and room(b) not in before}
    assert not wrong, f"{name} may import {', '.join(ROOMS[: ROOMS.index(name)])}"


def owners() -> dict[str, set[str]]:
    """The attributes of the house's own classes, and the rooms whose classes have them."""
    found: dict[str, set[str]] = {}
    for module in MODULES:
        for owner in (node for node in ast.walk(tree_of(module)) if isinstance(node, ast.ClassDef)):
            for node in ast.walk(owner):
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    found.setdefault(node.target.id, set()).add(room(module))
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                    found.setdefault(node.attr, set()).add(room(module))
    return found


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def made_by_other_libraries(module: str) -> set[str]:
    """Names that a file binds to what a call into another library returns."""
    foreign = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and not (getattr(node, "module", None) or "").startswith("kibitz")
        for alias in node.names
        if not alias.name.startswith("kibitz")
    }
    return {
        node.targets[0].id
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Call)
        if ast.unparse(node.value.func).split(".")[0] in foreign
    }


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_assigns_into_its_own_objects_only(name):
    """What an object is, its constructor says, and its own room changes: `thing.part = value` from another room is refused."""
    of, wrong = owners(), set()
    for common in vars(torch.Tensor).keys() & of.keys():
        del of[common]  # `tensor.data = ...` is nobody's room
    for module in (module for module in MODULES if room(module) == name):
        foreign = made_by_other_libraries(module)
        for node in ast.walk(tree_of(module)):
            assigned = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and not is_self(node.value)
            if assigned and ast.unparse(node.value) not in foreign and name not in of.get(node.attr, {name}):
                wrong.add(f"{module}:{node.lineno} assigns .{node.attr} of {', '.join(sorted(of[node.attr]))}")
    assert not wrong, "pass it to the constructor, or give the object's room a method that does it"


def test_no_import_goes_in_a_circle():
    after = {module: {b for a, b in edges() if a == module} for module in MODULES}
    while leaves := {module for module, targets in after.items() if not targets & after.keys()}:
        after = {module: targets for module, targets in after.items() if module not in leaves}
    assert not after, f"in a circle, or behind one: {sorted(after)}"


@pytest.mark.parametrize("module", MODULES)
def test_no_file_takes_what_the_library_does_without(module):
    allowed = THE_ONE_PLACE.get(module, set())
    assert not {name.split(".")[0] for name in imports(module)} & (FORBIDDEN - allowed)


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_are_short(module):
    num_lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, node.name
            parameters = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
            is_command = module.startswith("kibitz.cli.") and parameters[:1] == ["ctx"]  # a parameter for each option
            assert len(parameters) <= MAX_PARAMETERS or is_command, node.name


TESTS = {path.relative_to(ROOT / "tests"): ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize("path", TESTS, ids=str)
def test_a_test_file_imports_no_other(path):
    names = {part for node in ast.walk(TESTS[path]) for name in imported(node) for part in name.split(".")}
    others = names & ({other.stem for other in TESTS} | {"tests", "conftest"})
    assert not others, (
        f"{path} imports {others}: put what both need into tests/support, or make it a fixture of tests/conftest.py"
    )


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(alias.name for alias in node.names)]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_no_helper_stands_in_two_test_files():
    """Functions, fixtures and classes of three lines or more that are the same to the letter."""
    found: dict[str, list[str]] = {}
    for path, tree in TESTS.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.end_lineno - node.lineno >= 2:
                found.setdefault(ast.unparse(node), []).append(f"{path}:{node.lineno}")
    copies = [places for places in found.values() if len(places) > 1]
    assert not copies, "put it into tests/support, or make it a fixture of tests/conftest.py"


def test_kibitz_exports_what_it_says():
    assert set(dir(kibitz)) == set(kibitz.__all__)
    assert all(getattr(kibitz, name) is not None for name in kibitz.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trane'"):
        kibitz.trane  # noqa: B018


@pytest.mark.parametrize(
    "line",
    [
        "import kibitz, kibitz.config",
        "from kibitz.cli import main; sys.argv = ['kibitz', '--help']; main()",
        "from kibitz.cli import main; sys.argv = ['kibitz', 'train', '--help']; main()",
        "from kibitz.cli import main; sys.argv = ['kibitz', 'worlds']; main()",
        "from kibitz.cli import main; sys.argv = ['kibitz', 'control', '--help']; main()",
        "from kibitz.cli import main; sys.argv = ['kibitz', 'schema']; main()",
    ],
)
def test_light_commands_import_nothing_heavy(line):
    program = (
        "import atexit, sys\n"
        "heavy = {'torch', 'transformers', 'datasets', 'plotly', 'pandas', 'numpy', 'sklearn', 'gymnasium', 'kibitz.control'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & sys.modules.keys())))\n" + line
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == "HEAVY []"
