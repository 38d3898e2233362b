"""The text of a claim: written for the verdict that is computed, filled with numbers, none of which is typed."""

import re
from dataclasses import replace

import pytest
from support.paths import ROOT

from kibitz.experiments import EXPERIMENTS, evidence
from kibitz.experiments.evidence import finding
from kibitz.experiments.prose import CLAIMS, filled, prose
from kibitz.experiments.results import NotRun

CLAIMED = [experiment for experiment in EXPERIMENTS.values() if experiment.find is not None]


@pytest.mark.parametrize("experiment", CLAIMED, ids=lambda e: e.name)
def test_what_was_not_run_says_so(experiment, tmp_path):
    with pytest.raises(NotRun):
        finding(experiment, tmp_path)
    assert "**Here: not run yet.**" in evidence.markdown(experiment, tmp_path)


@pytest.mark.parametrize("experiment", CLAIMED, ids=lambda e: e.name)
def test_the_text_was_written_for_the_verdict_that_the_results_give_and_no_number_is_missing(experiment):
    found, text = finding(experiment, ROOT / "results"), prose(experiment.name)
    assert found.verdict == text.verdict, f"read {experiment.name}.md again: the results now say {found.verdict}"
    for template in (text.body, text.ours, text.headline):
        filled(template, found.numbers, strict=True)


@pytest.mark.parametrize("path", sorted(CLAIMS.glob("*.md")), ids=lambda p: p.name)
def test_no_measured_number_is_typed(path):
    """What we measure has decimals or an interval; what was published is named so, and stands in the front matter or in
    parentheses."""
    text = path.read_text(encoding="utf-8")
    body = text.partition("\n---\n")[2] if text.startswith("---\n") else text
    body = re.sub(r"{{.*?}}|{%.*?%}|`[^`]*`|\\(published[^)]*\\)|\\| published \\|.*", "", body)
    assert not re.search(r"\d\.\d|±\s*\d|\d\s*±", body)


def test_the_readme_has_six_plain_sentences():
    rows = evidence.headlines(EXPERIMENTS.values(), ROOT / "results").splitlines()[2:]
    assert len(rows) == 6
    assert not any("±" in row or re.search(r"\(\d[^)]*–", row) for row in rows)


def test_a_number_that_no_run_gave_is_a_dash_in_a_page_and_an_error_in_the_test():
    assert filled("{{ a | percent }}, {{ b | percent }}, {{ b.c | times }}", {"a": 0.5}) == "50.0, –, –"
    with pytest.raises(Exception, match="is undefined"):
        filled("{{ b | percent }}", {"a": 0.5}, strict=True)


def test_other_results_than_the_text_was_written_for_say_so(monkeypatch, tmp_path):
    experiment = EXPERIMENTS["self-sft"]
    other = replace(finding(experiment, ROOT / "results"), verdict="reproduced")
    monkeypatch.setattr(evidence, "try_finding", lambda *_: other)
    told = evidence.markdown(experiment, tmp_path)
    assert "**Here: ✔ reproduced.**" in told and "written for results with the verdict *partly*" in told
