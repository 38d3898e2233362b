"""The report in headless Chromium: a reader hovers, types, switches and filters; nothing fails and nothing leaves."""

import json
import random
from pathlib import Path

import pytest
from support.paths import FIXTURES, script

from kibitz.report import build, rollout_page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
expect = playwright.expect  # waits: what an event draws may come after the click that caused it
expect.set_options(timeout=180_000)  # a machine that runs other tests beside is slow

pytestmark = pytest.mark.browser

synthetic = script(FIXTURES / "report_run" / "synthetic.py")
EVIL = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return build([synthetic.write_run(tmp_path_factory.mktemp("runs") / "arithmetic-opd", num_prompts=12)])


@pytest.fixture
def visit(browser):
    """Opens a page and, when the test is over, asserts that it neither complained nor asked for anything else."""
    pages, complaints = [], []

    def go(path: Path, width: int = 1200, scheme: str = "light"):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.set_default_timeout(180_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: None if request.url == path.as_uri() else complaints.append(request.url))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield go
    for page in pages:
        page.close()
    assert [complaint for complaint in complaints if not complaint.startswith("data:")] == []


def choose(page, switch: str, value: str) -> None:
    page.locator(f'#{switch} input[value="{value}"]').check()


def background(token) -> str:
    return token.evaluate("element => getComputedStyle(element).backgroundColor")


def test_hovering_a_token_shows_what_both_models_would_have_said(visit, report):
    page = visit(report)
    fork = page.locator(".t.fork").first
    assert page.locator("#card").is_hidden()
    fork.hover()
    card = page.locator("#card")
    expect(card).to_be_visible()
    assert card.locator(".tally").all_inner_texts()[0].startswith("Student")
    assert [tally.locator(".bar").count() for tally in card.locator(".tally").all()] == [5, 5]
    said = card.locator(".bar.said code").first.inner_text()
    assert said == fork.inner_text()
    assert "less likely; it would rather say" in card.inner_text()
    assert "penalty" in card.inner_text()
    page.mouse.move(0, 0)
    expect(card).to_be_hidden()


def test_keyboard_reaches_every_token(visit, report):
    page = visit(report)
    first = page.locator(".rollout .t").first
    assert page.locator(".rollout").first.locator('[tabindex="0"]').count() == 1
    first.focus()
    expect(page.locator("#card")).to_be_visible()
    assert first.get_attribute("aria-describedby") == "card"
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.index") == "1"
    page.keyboard.press("f")
    assert "fork" in page.evaluate("document.activeElement.className")
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.textContent") == "<eos>"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.index") == "0"
    page.keyboard.press("Escape")
    expect(page.locator("#card")).to_be_hidden()


def test_switch_colours_by_the_divergence(visit, tmp_path):
    token = {"text": "a", "student_logp": -0.1, "teacher_logp": -6.0, "reverse_kl": 0.0}
    path = tmp_path / "page.html"
    path.write_text(
        rollout_page([{"prompt": "p", "tokens": [token, token | {"teacher_logp": -0.1, "reverse_kl": 5.0}]}])
    )
    page = visit(path)
    one, other = page.locator(".t").all()
    red, pale = background(one), background(other)
    assert red != pale
    choose(page, "scale", "kl")
    assert (background(one), background(other)) == (pale, red)
    assert page.locator("#legend").get_by_text("nats, or more").is_visible()


def test_filter_shows_wrong_or_right_rollouts(visit, report):
    page = visit(report)
    total = page.locator(".pair").count()

    def shown(fieldset: str, word: str) -> list[str]:
        choose(page, fieldset, word)
        return page.locator(".pair .fate .verdict:first-child").all_inner_texts()

    wrong, right = shown("filter", "wrong"), shown("filter", "right")
    assert set(wrong) == {"wrong"}
    assert set(right) == {"right"}
    assert len(wrong) + len(right) == total == len(shown("filter", "all"))
    assert len(shown("filter-after", "wrong")) + len(shown("filter-after", "right")) == total


def test_many_rollouts_fold_and_open(visit, report):
    page = visit(report)
    last = page.locator(".pair").last
    assert last.locator(".t").count() == 0
    last.locator("summary").click()
    expect(last.locator(".side")).to_have_count(2)  # drawn after the event, not in it
    assert last.locator(".t").count() > 10


def test_theme_follows_the_system_until_chosen(visit, report):
    page = visit(report, scheme="dark")

    def paper() -> str:
        return page.evaluate("getComputedStyle(document.documentElement).backgroundColor")

    dark = paper()
    choose(page, "theme", "light")
    light = paper()
    assert dark != light
    page.reload()
    assert paper() == light
    choose(page, "theme", "auto")
    assert paper() == dark


def test_curves_are_drawn_in_the_theme_and_against_compute(visit, report):
    page = visit(report)
    chart = page.locator('[data-chart="reverse_kl"]')
    chart.scroll_into_view_if_needed()
    line = chart.locator(".js-line").first
    line.wait_for()
    before = line.evaluate("element => element.style.stroke")
    choose(page, "theme", "dark")
    expect(chart.locator(".js-line").first).not_to_have_css("stroke", before)
    choose(page, "axis", "flops")
    expect(chart).to_contain_text("FLOP so far")


@pytest.mark.parametrize("width", [375, 1400])
def test_nothing_sticks_out(visit, report, width):
    page = visit(report, width=width)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".t.fork").first.hover()
    expect(page.locator("#card")).to_be_visible()
    box = page.locator("#card").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


def test_long_rollout_stays_usable(visit, tmp_path):
    row = synthetic.prose_rollout(random.Random(0), 9000, 0)
    path = tmp_path / "page.html"
    path.write_text(rollout_page([row]))
    page = visit(path)
    assert page.locator(".t").count() == 2000
    page.get_by_text("go to the fork").click()
    expect(page.locator(".t")).to_have_count(5000)
    assert page.evaluate("document.activeElement.dataset.index") == "3000"
    page.get_by_text("more of 9000 tokens").click()
    expect(page.locator(".t")).to_have_count(7000)


def test_what_models_write_is_text(visit, tmp_path):
    folder = synthetic.write_run(tmp_path / "<img src=x onerror=alert(1)>", num_prompts=3)
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"prompt": EVIL, "answer": EVIL, "prompt_key": EVIL}
        row["tokens"][0] |= {"text": EVIL, "student_top": [[EVIL, 0.9]], "teacher_top": [["<b>x", 1.0]]}
    synthetic.write_jsonl(folder / "rollouts.jsonl", rows)
    page = visit(build([folder, folder], tmp_path / "page.html"))
    page.locator(".t").first.hover()
    expect(page.locator("#card .card-head code")).to_have_text(EVIL.replace(" ", "·"))
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.locator('[data-chart="costs_flops"] .ytick').first.wait_for()
    assert page.locator("img").count() == 0
    assert page.locator('[data-chart="costs_flops"] .ytick').first.text_content().startswith("<img")
