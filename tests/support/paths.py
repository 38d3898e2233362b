"""Where things are in the repository."""

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parent / "fixtures"


def script(path: Path) -> ModuleType:
    """A file outside the package, as a module of its own."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
