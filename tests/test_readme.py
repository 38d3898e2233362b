"""The recipe and the Python lines of the README, copied as they stand, with folders of one's own and fewer, shorter steps."""

import json
import re
from pathlib import Path

import pytest
from support.paths import ROOT

from kibitz import report, worlds

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALLER = {
    "path-or-hub-name": "{model}",
    "prompts_per_step: 64": "prompts_per_step: 4",
    "samples_per_prompt: 4": "samples_per_prompt: 2",
    "max_tokens: 1024": "max_tokens: 24",
    "steps:   150": "steps: 2",
}


def block(language: str, holds: str) -> str:
    """The one code block of the README that holds these words."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    (found,) = [text for text in blocks if holds in text]
    return found


def recipe() -> str:
    text = block("yaml", "student: {model:")
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    for role in ("student", "teacher"):
        text = text.replace("{model}", str(worlds.get("arithmetic").checkpoint(role)), 1)
    return text


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with recipe.yaml and its prompts.jsonl, six of one's own."""
    rows = [{"prompt": f"{a}+2*{a}", "answer": str(a + 2 * a)} for a in range(1, 7)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(recipe())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_and_the_python_lines_give_a_result_and_a_report_with_a_heat_map(here, capsys):
    exec(compile(block("python", "kibitz.train("), "README.md", "exec"), {})
    said = capsys.readouterr().out
    last, folder = said.strip().splitlines()[-1].rsplit(" ", 1)
    assert folder == "runs/my-run"
    assert "'split': 'train', 'num_prompts': 6, 'held_out': False, 'sampled': {'accuracy': " in last
    assert "'reverse_kl': " in last
    assert [row["step"] for row in report.folder.read_run(Path(folder)).evals] == [0, 2]

    page = report.build([Path(folder)]).read_text(encoding="utf-8")
    words = " ".join(re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL).split())
    assert "6 training prompts. Brackets are 95% intervals." in words
    assert "These are training prompts" in words
    assert "held-out" not in words
    (island,) = re.findall(r'<script type="application/json" id="rollouts">(.*?)</script>', page, flags=re.DOTALL)
    (shown,) = json.loads(island)["runs"]
    assert len(shown["pairs"]) == 6
    assert all(side["tokens"] for pair in shown["pairs"] for side in pair["sides"])
    assert report.folder.read_run(Path(folder)).notices == []
    assert 'class="notices"' not in page


def test_a_run_that_shows_nothing_has_no_red_box_about_files_that_nobody_asked_for(here):
    import kibitz

    run = kibitz.train("recipe.yaml", ["eval.heatmaps=0", "steps=1", "output=runs/bare"])
    assert run.evals == []
    page = report.build([run.folder]).read_text(encoding="utf-8")
    assert 'class="notices"' not in page
    assert "It took 1 step of 4 prompts with 2 responses each." in page
    assert "1 steps" not in page
