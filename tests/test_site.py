"""The documentation as a site: the tutorial runs from top to bottom, and nothing warns and no link is dead."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT


def run(*command: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """A folder with build/docs, what `make docs` gives zensical: for it the tutorial has run from top to bottom."""
    folder = tmp_path_factory.mktemp("site")
    run(sys.executable, str(ROOT / "docs/site.py"), str(folder / "build/docs"), folder=folder)
    return folder


@pytest.mark.slow
def test_the_tutorial_shows_what_its_words_say(pages):
    book = json.loads((pages / "build/docs/tutorial/tutorial.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    shown = [str(cell["outputs"]) for cell in cells]
    assert all(shown), "each cell shows something"
    framed = [place for place, output in enumerate(shown) if "<iframe" in output]
    assert framed == [1, 2, 3, 4, 6], "scores, a diagnosis, a run, evaluations, one evaluation"
    assert "7*3=1" in shown[1]
    assert "A diagnosis before training" in shown[2]
    frames = sorted(path.name for path in (pages / "build/docs/tutorial").glob("*.html"))
    text = (pages / "build/docs/tutorial.md").read_text(encoding="utf-8")
    assert len(frames) == 5
    assert all(f'src="tutorial/{name}"' in text for name in frames)
    before, *_, after = (float(share) for share in re.findall(r"step \d+: dev  accuracy ([\d.]+)%", text)[:3])
    assert after > before + 10


def test_the_tutorial_is_kept_without_outputs():
    """What it shows is made when it is shown: a kept output would be that of some other day."""
    book = json.loads((ROOT / "examples/tutorial.ipynb").read_text(encoding="utf-8"))
    assert all(cell.get("outputs", []) == [] and cell.get("execution_count") is None for cell in book["cells"])


@pytest.mark.slow
def test_the_site_builds_without_a_warning_or_a_dead_link(pages):
    pytest.importorskip("zensical", reason="the docs extra is not installed")
    shutil.copy(ROOT / "mkdocs.yml", pages)
    run(sys.executable, "-m", "zensical", "build", "--strict", "--config-file", "mkdocs.yml", folder=pages)
    site = pages / "build/site"
    built = {str(path.relative_to(site)) for path in site.glob("**/index.html")}
    assert {"index.html", "methods/index.html", "reference/recipe/index.html", "reference/cli/index.html"} <= built
    recipe = (site / "reference/recipe/index.html").read_text()
    assert "prompts_per_step" in recipe and 'href="#rolloutconfig"' in recipe
    assert "kibitz train" in (site / "reference/cli/index.html").read_text()
    frames = re.findall(r'<iframe [^>]*src="([^"]+)"', (site / "tutorial/index.html").read_text())
    assert len(frames) == 5
    assert all((site / "tutorial" / frame).resolve().is_file() for frame in frames)
