"""What `pip install kibitz` brings: a wheel that works without a checkout, and a page for the index that stands alone."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes

import pytest
from support.paths import ROOT

RELATIVE_LINK = re.compile(r"\]\((?!https://)[^)]+\)|(?:src|href)=\"(?!https://)")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built as a person would build it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    if "hatchling" in built.stderr and built.returncode:
        pytest.skip("hatchling, which builds the wheel, could not be fetched")
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_page_for_the_index_stands_alone():
    page = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["readme"]
    assert not RELATIVE_LINK.findall((ROOT / page).read_text(encoding="utf-8"))
    assert RELATIVE_LINK.findall((ROOT / "README.md").read_text(encoding="utf-8")), "the pattern finds links"


@pytest.mark.slow
def test_the_wheel_holds_what_the_commands_need(wheel):
    names = set(wheel.namelist())
    for path in (ROOT / "recipes").glob("*.yaml"):
        assert f"kibitz/recipes/{path.name}" in names
        assert wheel.read(f"kibitz/recipes/{path.name}") == path.read_bytes()
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kibitz").rglob("*") if path.is_file()}
    assert {name for name in here if "__pycache__" not in name} <= names
    assert not [name for name in names if name.startswith(("tests/", "results/", "docs/"))]
    (metadata,) = (name for name in names if name.endswith("/METADATA"))
    page = message_from_bytes(wheel.read(metadata))
    assert "kibitz demo" in str(page.get_payload())
    assert not RELATIVE_LINK.findall(str(page.get_payload()))


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_venv_and_works_outside_of_the_checkout(wheel, tmp_path):
    """As a person has it: no checkout, no development packages, nothing but what the wheel asks for."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pins = ["--constraint", str(ROOT / "constraints.txt")]
    install = [str(python), "-m", "pip", "install", "--quiet", *pins, str(wheel.filename)]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode and "No matching distribution found" in done.stderr:
        pytest.skip("the packages that kibitz needs could not be fetched")
    assert done.returncode == 0, done.stderr

    def says(*args: str) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        line = [str(python.parent / "kibitz"), *args]
        said = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert said.returncode == 0, said.stderr
        return said.stdout

    assert "kibitz" in says("--help")
    assert "reasoning-opd" in says("recipes")
    assert says("recipes", "lora-24gb") == (ROOT / "recipes" / "lora-24gb.yaml").read_text(encoding="utf-8")
    assert says("worlds", "show", "arithmetic", "--count", "1", "--json")
    says("demo", "steps=1", "eval.num_prompts=16", "--quiet")
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
    says("eval", "runs/demo", "--world", "arithmetic", "eval.num_prompts=16", "--quiet")
