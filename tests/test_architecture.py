"""The walls of the house: who may import whom, how long a file may be, and what `import kibitz` costs.

The levels are those of the table in CONTRIBUTING.md. A room imports rooms of lower levels; the few edges inside a
level are named below, one by one.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import kibitz

PACKAGE = Path(kibitz.__file__).parent
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 350, 60, 9

LEVELS = {
    "types": 0,
    "config": 0,
    "losses": 1,
    "alignment": 1,
    "batching": 1,
    "company": 1,
    "graders": 1,
    "guards": 1,
    "heads": 1,
    "lora": 1,
    "shards": 1,
    "trackers": 1,
    "worlds": 1,
    "servers": 1,
    "distributed": 2,
    "metrics": 2,
    "optim": 2,
    "models": 2,
    "data": 2,
    "engines": 2,
    "frozen": 2,
    "teachers": 2,
    "methods": 3,
    "annotate": 3,
    "packing": 3,
    "sharding": 3,
    "harness": 3,
    "chat": 3,
    "memory": 3,
    "checkpoint": 4,
    "evaluate": 4,
    "preflight": 4,
    "runs": 4,
    "prepare": 4,
    "trainer": 4,
    "worlds.make": 5,
    "experiments": 5,
    "demo": 5,
    "cli": 6,
    "__main__": 7,
}
WITHIN_A_LEVEL = {
    ("engines", "models"),
    ("experiments", "worlds.make"),
    ("annotate", "methods"),
    ("teachers", "metrics"),
    ("teachers", "data"),
    ("teachers", "models"),
    ("teachers", "frozen"),
    ("frozen", "models"),
    ("distributed", "engines"),
    ("optim", "distributed"),
    ("teachers", "engines"),
    ("runs", "checkpoint"),
    ("preflight", "evaluate"),
    ("preflight", "prepare"),
    ("prepare", "runs"),
    ("prepare", "evaluate"),
    ("trainer", "checkpoint"),
    ("trainer", "evaluate"),
    ("trainer", "prepare"),
}
FILE_READERS = {"report": {"types"}}  # rooms outside the levels, and all that they may import
FORBIDDEN = {"vllm", "gymnasium", "ray", "hydra", "wandb", "tensorboard", "trackio", "lightning"}
THE_ONE_PLACE = {"kibitz.trackers": {"wandb", "tensorboard", "trackio"}}


def module_name(path: Path) -> str:
    parts = ("kibitz", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def room(module: str) -> str:
    parts = module.split(".")[1:]
    return "worlds.make" if parts[:2] == ["worlds", "make"] else (parts[0] if parts else "")


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


def may_import(importer: str, imported: str) -> bool:
    if importer == imported or imported == "":
        return True
    if importer in FILE_READERS:
        return imported in FILE_READERS[importer]
    if imported in FILE_READERS:
        return importer in ("cli", "demo", "experiments", "trainer")
    return LEVELS[importer] > LEVELS[imported] or (importer, imported) in WITHIN_A_LEVEL


def test_every_room_has_a_level():
    unknown = {room(module) for module in MODULES} - LEVELS.keys() - FILE_READERS.keys() - {""}
    assert not unknown, f"give {unknown} a level in LEVELS, and a line in the table of CONTRIBUTING.md"


def test_imports_go_from_higher_levels_to_lower_ones():
    wrong = {f"{a} -> {b}" for a, b in edges() if room(a) and not may_import(room(a), room(b))}
    assert not wrong


def test_no_wall_stands_open_for_nobody():
    used = {(room(a), room(b)) for a, b in edges()}
    there = {room(module) for module in MODULES}
    idle = {edge for edge in WITHIN_A_LEVEL - used if set(edge) <= there}
    assert not idle, "no file needs these edges inside a level any more"


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
        "from kibitz.cli import main; sys.argv = ['kibitz', 'schema']; main()",
    ],
)
def test_light_commands_import_nothing_heavy(line):
    program = (
        "import atexit, sys\n"
        "heavy = {'torch', 'transformers', 'datasets', 'plotly', 'pandas', 'numpy'}\n"
        "atexit.register(lambda: print('HEAVY', sorted(heavy & sys.modules.keys())))\n" + line
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == "HEAVY []"
