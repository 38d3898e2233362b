"""The documentation: the site builds without a warning or a dead link, and the commands that its first page shows run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

SHOWN = re.compile(r"<!-- run in the tests -->\n```bash\n(.*?)```", re.DOTALL)


def run(*command: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_site_builds_without_a_warning_or_a_dead_link(tmp_path):
    pytest.importorskip("zensical", reason="the docs extra is not installed")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    run(sys.executable, str(ROOT / "docs/site.py"), str(tmp_path / "build/docs"), folder=tmp_path)
    run(sys.executable, "-m", "zensical", "build", "--strict", "--config-file", "mkdocs.yml", folder=tmp_path)
    pages = {str(path.relative_to(tmp_path / "build/site")) for path in tmp_path.glob("build/site/**/index.html")}
    assert {"index.html", "methods/index.html", "reference/recipe/index.html", "reference/cli/index.html"} <= pages
    recipe = (tmp_path / "build/site/reference/recipe/index.html").read_text()
    assert "prompts_per_step" in recipe and 'href="#rolloutconfig"' in recipe
    assert "kibitz train" in (tmp_path / "build/site/reference/cli/index.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["index.md"])
def test_the_commands_of_a_page_run(page, tmp_path):
    blocks = SHOWN.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert blocks
    for block in blocks:
        run("bash", "-euo", "pipefail", "-c", block, folder=tmp_path)
    assert (tmp_path / "runs/toy/report.html").is_file() and (tmp_path / "exported/model.safetensors").is_file()
