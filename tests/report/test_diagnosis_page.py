"""The page of a diagnosis: what was found stands on it, examples lead to their tokens, and text is text."""

import random
from pathlib import Path

import pytest
from support.paths import FIXTURES, script

from kibitz.report.diagnosis import diagnosis_page, pattern_in_words

synthetic = script(FIXTURES / "report_run" / "synthetic.py")
EVIL = "</script><img src=x onerror=alert(1)>"
ACCURACY = {"accuracy": 0.6, "low": 0.5, "high": 0.7, "num": 64}


def found(**changes) -> dict:
    rng = random.Random(0)
    rows = [synthetic.rollout(rng, prompt, 0, 1.0) for prompt in ("5+2*3-4", "8-3*2+1", "9+1*4")]
    fork = rows[2]["fork"]
    return {
        "student": "models/student",
        "teacher": "models/teacher",
        "numbers": {
            "num_prompts": 64, "num_answers": 64, "num_tokens": 1280, "response_tokens": 20.0, "cut_off": 0.0,
            "worst_percent": 0.31, "reverse_kl": 0.4, "top_k_overlap": 0.8, "overlap_mass": 0.99, "accuracy": ACCURACY,
            "teacher_accuracy": ACCURACY | {"accuracy": 0.95}, "both": {"both": 38, "teacher": 20, "student": 1, "neither": 5},
            "prefixes": [{"share": 0.5, **ACCURACY}], "wrong": 25, "forked": 24, "mended": 0.7, "predicted": 0.86,
        },
        "contexts": [
            {"patterns": [["near", "+", None, "*"], ["after", "="]], "num": 40, "nats": 1.2, "elsewhere": 0.1, "share": 0.6,
             "said": [["*", "+", 12]], "places": [[2, fork]]},
        ],
        "tokens": [{"said": "*", "instead": "+", "num": 12, "penalty": 7.1, "share": 0.2, "places": [[2, fork]]}],
        "tasks": [{"task": name, "num": 32, "accuracy": 0.6, "teacher": None, "nats": 0.4, "share": 0.5} for name in "ab"],
        "examples": rows,
        "recipe": "student: {model: s}  # why\n",
        "doubts": [],
        "cost": {"rollouts": 6400, "tokens": 128_000.0, "seconds": 300.0, "money": 0.2, "flops": 5e11, "device": "cpu"},
        **changes,
    }  # fmt: skip


def test_what_was_found_stands_on_the_page():
    page = diagnosis_page(found())
    for words in ("60.0%", "[50.0–70.0%]", "95.0%", "86.0%", "the teacher right, the student wrong", "6,400 answers",
                  "about 5 min 00 s on cpu", "0.20 at that price", "In 24 of the 25 wrong answers", "directly"):  # fmt: skip
        assert words in page
    assert '<i class="hole">any</i>' in page
    assert "plotly.js v" not in page


def test_a_diagnosis_without_a_grader_has_no_gain():
    numbers = {key: value for key, value in found()["numbers"].items()
               if key in ("num_answers", "response_tokens", "cut_off", "worst_percent", "reverse_kl")}  # fmt: skip
    page = diagnosis_page(found(numbers=numbers, contexts=[], tokens=[], tasks=[], examples=[]))
    assert "What there is to gain" not in page
    assert "No context stands out" in page


def test_patterns_for_a_terminal():
    assert pattern_in_words(["near", "+", None, "*"]) == "+ any * before"
    assert pattern_in_words(["after", "\x1b[31m"]) == "␛[31m directly before"


@pytest.mark.browser
@pytest.mark.parametrize("width", [375, 1300])
def test_an_example_leads_to_its_token(browser, tmp_path, width):
    pytest.importorskip("playwright.sync_api")
    hostile = found(student=EVIL, teacher=EVIL, recipe=EVIL, doubts=[EVIL], recipe_file=EVIL)
    hostile["contexts"][0] |= {"patterns": [["near", EVIL, None, "<b>"]], "said": [[EVIL, EVIL, 1]]}
    hostile["tasks"][0]["task"] = EVIL
    hostile["examples"][0] |= {"prompt": EVIL, "answer": EVIL}
    path: Path = tmp_path / "page.html"
    path.write_text(diagnosis_page(hostile))
    page, complaints = browser.new_page(viewport={"width": width, "height": 800}), []
    page.set_default_timeout(180_000)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: None if request.url == path.as_uri() else complaints.append(request.url))
    page.goto(path.as_uri())
    page.locator("#filter input[value=right]").check()
    page.locator("[data-pair]").first.click()
    assert "fork" in page.evaluate("document.activeElement.className")
    assert page.evaluate("document.activeElement.closest('.pair').querySelector('.prompt').textContent") == "9+1*4"
    assert page.locator("#card").is_visible()
    assert page.locator("img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
    assert complaints == []
