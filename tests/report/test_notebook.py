"""What a notebook shows: runs, scores, rollouts and evaluations, in frames that reach nothing; all else as before."""

import html
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.paths import FIXTURES, script

import kibitz
from kibitz import config
from kibitz.report import load_ipython_extension
from kibitz.report.folder import read_run
from kibitz.report.notebook import dict_html, rows_html, run_html
from kibitz.types import Prompt, Rollout

synthetic = script(FIXTURES / "report_run" / "synthetic.py")


@pytest.fixture
def folder(tmp_path) -> Path:
    return synthetic.write_run(tmp_path / "run", num_prompts=2)


def inside(frame: str) -> str:
    """The document in a frame that may run scripts and nothing else."""
    found = re.fullmatch(
        r'<iframe sandbox="allow-scripts" title="kibitz" style="[^"]*" srcdoc="([^"]*)"></iframe>', frame
    )
    assert found
    return html.unescape(found[1])


def test_a_run_shows_before_and_after_tokens_and_costs_and_no_curves(folder):
    run = kibitz.Run(folder, config.load(folder / "recipe.yaml"), [], [], None)
    page = inside(run_html(run))
    for words in ("Before and after", "What the teacher said", "What it cost", "95% intervals"):
        assert words in page
    assert "plotly" not in page


def test_scores_are_a_heat_map(folder):
    assert 'id="rollouts"' in inside(rows_html(read_run(folder).rollouts))


def test_rollouts_are_their_text():
    prompt = Prompt(ids=(1,), text="1+<b>1", key="k", answer="2")
    rollouts = [
        Rollout(prompt, [5, 6], torch.zeros(2), True, sample=i, text=text, reward=1.0)
        for i, text in enumerate(("is <i>2", ""))
    ]
    page = inside(rows_html(rollouts))
    assert "is \\u003ci\\u003e2" in page
    assert "2 tokens that nobody has decoded yet" in page


def test_evaluations_are_a_table(folder):
    first, *_, last = read_run(folder).evals
    assert "Accuracy, sampled at T = 1" in inside(dict_html(last))
    both = inside(rows_html([first, last]))
    assert "better" in both


def test_a_diagnosis_is_its_page():
    numbers = {"num_answers": 64, "response_tokens": 20.0, "cut_off": 0.0, "worst_percent": 0.3, "reverse_kl": 0.4}
    page = inside(dict_html({"numbers": numbers, "contexts": [], "examples": [], "recipe": "steps: 3"}))
    assert "A diagnosis before training" in page
    assert "steps: 3" in page


@pytest.mark.parametrize("other", [[], [1, 2], [{"prompt": "p"}], ["text"], [{}], [SimpleNamespace()]])
def test_other_lists_are_left_alone(other):
    assert rows_html(other) is None


@pytest.mark.parametrize("other", [{}, {"num_prompts": 3}, {"sampled": 1}, {"a": {"b": 1}}, {"numbers": {}}])
def test_other_dicts_are_left_alone(other):
    assert dict_html(other) is None


def test_a_shell_shows_them_after_load_ext(folder):
    formatters = pytest.importorskip("IPython.core.formatters", reason="IPython is not installed: pip install ipython")
    shell = SimpleNamespace(display_formatter=formatters.DisplayFormatter())
    load_ipython_extension(shell)
    run = kibitz.Run(folder, config.load(folder / "recipe.yaml"), [], read_run(folder).evals, None)
    for shown in (run, run.evals, run.evals[0], read_run(folder).rollouts):
        assert "<iframe" in shell.display_formatter.format(shown)[0]["text/html"]
    for other in ([1, 2], {"a": 1}, "text", 3):
        assert "text/html" not in shell.display_formatter.format(other)[0]
