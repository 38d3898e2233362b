"""The page of `kibitz watch` in headless Chromium, beside a run that really trains, is killed, and goes on."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.paths import FIXTURES, ROOT, script
from support.ports import held
from support.runs import recipe

from kibitz.report.watch import serve

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
expect = playwright.expect
expect.set_options(timeout=180_000)

pytestmark = pytest.mark.browser

synthetic = script(FIXTURES / "report_run" / "synthetic.py")
EVIL = "</script><img src=x onerror=alert(1)>"


@pytest.fixture
def visit(browser):
    """Watches folders and opens the page; when the test is over, asserts that it neither complained nor asked elsewhere."""
    opened, complaints = [], []

    def go(*folders: Path, width: int = 1200):
        serving = serve(list(folders))
        watch = serving.__enter__()
        threading.Thread(target=watch.server.serve_forever, daemon=True).start()
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.set_default_timeout(180_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on(
            "request", lambda request: None if request.url.startswith(watch.url) else complaints.append(request.url)
        )
        page.goto(watch.url)
        opened.append((page, serving, watch))
        return page, watch

    yield go
    for page, serving, watch in opened:
        page.close()
        watch.server.shutdown()
        serving.__exit__(None, None, None)
    assert [complaint for complaint in complaints if not complaint.startswith(("data:", "blob:"))] == []


def steps_drawn(page, chart: str = "loss") -> list[int]:
    return page.evaluate(f"document.querySelector('[data-chart=\"{chart}\"]').data?.at(-1)?.x ?? []")


def wait_until(page, ready: Callable[[], bool], seconds: int = 600) -> None:
    """Look ten times a second: the page's policy forbids the loop that playwright would put into it."""
    for _ in range(10 * seconds):
        if ready():
            return
        page.wait_for_timeout(100)
    pytest.fail(f"not in {seconds} seconds")


def wait_for_step(page, step: int) -> None:
    wait_until(page, lambda: max(steps_drawn(page), default=0) >= step)


def test_new_rows_appear_without_a_reload(visit, tmp_path):
    folder = synthetic.write_run(tmp_path / "run", num_prompts=3)
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    rollouts = (folder / "rollouts.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("".join(rows[:5]))
    (folder / "evals.jsonl").unlink()
    (folder / "rollouts.jsonl").unlink()
    (folder / "run.json").write_text('{"status": "running"}')
    page, _ = visit(folder)
    expect(page.locator(".pulse.running")).to_contain_text("step 5 of 40")
    expect(page.locator("#tokens")).to_be_hidden()
    page.locator('[data-chart="loss"]').scroll_into_view_if_needed()
    wait_for_step(page, 5)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(rows[5:20]))
    expect(page.locator(".pulse")).to_contain_text("step 20 of 40")
    wait_for_step(page, 20)
    (folder / "rollouts.jsonl").write_text(rollouts)
    expect(page.locator(".pair")).to_have_count(3)
    assert page.title().startswith("50%")
    colours = page.evaluate(
        "[...document.querySelectorAll('.phases li .key')].map(e => getComputedStyle(e).backgroundColor)"
    )
    assert len(set(colours)) == len(colours) == 3


def test_rollouts_that_change_wait_for_the_reader_and_leave_open_what_is_open(visit, tmp_path):
    folder = synthetic.write_run(tmp_path / "run", num_prompts=6)
    page, _ = visit(folder)
    expect(page.locator(".pair")).to_have_count(6)
    page.locator(".pair summary").first.click()
    page.locator(".pair[open] .t").first.hover()
    expect(page.locator("#card")).to_be_visible()
    open_ones = page.locator(".pair[open] .prompt").all_inner_texts()
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    synthetic.write_jsonl(folder / "rollouts.jsonl", [row | {"step": row["step"] and 60} for row in rows])
    page.wait_for_timeout(1500)
    expect(page.locator("#card")).to_be_visible()
    assert page.get_by_text("After, step 60").count() == 0
    page.mouse.move(0, 0)
    expect(page.get_by_text("After, step 60").first).to_be_attached()
    assert page.locator(".pair[open] .prompt").all_inner_texts() == open_ones


def test_what_models_write_is_text(visit, tmp_path):
    folder = synthetic.write_run(tmp_path / "<img src=x onerror=alert(1)>", num_prompts=2)
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"prompt": EVIL, "answer": EVIL, "prompt_key": EVIL}
        row["tokens"][0] |= {"text": EVIL, "student_top": [[EVIL, 0.9]], "teacher_top": [["<b>x", 1.0]]}
    synthetic.write_jsonl(folder / "rollouts.jsonl", rows)
    (folder / "recipe.yaml").write_text(json.dumps({"student": {"model": EVIL}, "method": {"type": EVIL}, "steps": 40}))
    alarm = {"name": EVIL, "symptom": EVIL, "remedy": EVIL, "step": EVIL}
    synthetic.write_jsonl(folder / "alarms.jsonl", [alarm])
    (folder / "run.json").write_text(json.dumps({"status": EVIL, "started": EVIL, "first_step": EVIL}))
    page, _ = visit(folder, folder)
    expect(page.locator(".alarms").first).to_contain_text("<img src=x onerror=alert(1)>")
    page.locator(".t").first.hover()
    expect(page.locator("#card .card-head code")).to_have_text(EVIL.replace(" ", "·"))
    page.locator('[data-chart="loss"]').scroll_into_view_if_needed()
    wait_for_step(page, 40)
    page.locator('[data-chart="loss"]').hover()
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("width", [375, 1400])
def test_nothing_sticks_out(visit, tmp_path, width):
    folders = [synthetic.write_run(tmp_path / name, num_prompts=2) for name in ("a", "a-run-with-a-very-long-name" * 3)]
    page, _ = visit(*folders, width=width)
    expect(page.locator(".pair")).to_have_count(2)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.locator('[data-chart="loss"] .js-line').first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_says_when_nobody_answers_any_more_or_somebody_else(browser, tmp_path):
    """Its own page: a browser writes to the console that a server is gone, and cannot be told not to."""
    folder = synthetic.write_run(tmp_path / "run", num_prompts=1)
    page = browser.new_page()
    page.set_default_timeout(180_000)
    holder = held()
    port = holder.getsockname()[1]
    with serve([folder], port) as watch:
        threading.Thread(target=watch.server.serve_forever, daemon=True).start()
        page.goto(watch.url)
        expect(page.locator(".pulse.finished")).to_be_visible()
        expect(page.locator("#gone")).to_be_hidden()
        watch.server.shutdown()
        watch.close()
    expect(page.locator("#gone")).to_contain_text("does not answer")
    expect(page.locator(".pulse.finished")).to_be_visible()
    with serve([folder], port) as other:
        threading.Thread(target=other.server.serve_forever, daemon=True).start()
        expect(page.locator("#gone")).to_contain_text("another one answers at this address")
        other.server.shutdown()
    holder.close()
    page.close()


TRAIN = """
import json, sys, time, kibitz
from kibitz.training.trainer import NullProgress

class Slowly(NullProgress):
    def step(self, row):
        time.sleep(0.15)  # so that a person, or a test, can look on
        while sys.argv[2] == "begin" and row["step"] >= 20:
            time.sleep(60)  # until it is killed

kibitz.train(json.loads(sys.argv[1]), resume=sys.argv[2] == "resume", progress=Slowly())
"""


def training(tree: dict, how: str = "begin") -> subprocess.Popen:
    """A run of its own process. The one that begins never comes further than step 20."""
    return subprocess.Popen([sys.executable, "-c", TRAIN, json.dumps(tree), how], cwd=ROOT)


@pytest.mark.slow
def test_a_run_that_trains_is_killed_and_goes_on(visit, models, tmp_path):
    """The page is opened before the run begins and is never loaded again."""
    folder = tmp_path / "run"
    tree = recipe(*models, folder, steps=40, eval={"every": 10}, save={"every": 5, "keep": 1})
    page, _ = visit(folder)
    expect(page.locator(".pulse.waiting")).to_be_visible()
    run = training(tree)
    try:
        expect(page.locator(".pulse.running")).to_be_visible(timeout=600_000)
        expect(page.locator(".pair").first).to_be_visible(timeout=600_000)
        page.locator('[data-chart="loss"]').scroll_into_view_if_needed()
        wait_for_step(page, 12)
        assert "left" in page.locator(".pulse").inner_text()
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    time.sleep(1.5)
    before = len(steps_drawn(page))
    assert page.locator(".pulse.running").is_visible()  # silence is told after a minute
    run = training(tree, "resume")
    try:
        wait_until(page, lambda: len(steps_drawn(page)) >= before + 3)
        expect(page.locator(".pulse.finished")).to_be_visible(timeout=600_000)
    finally:
        run.wait(600)
    wait_for_step(page, 40)
    assert steps_drawn(page) == list(range(1, 41))
    expect(page.get_by_text("After, step 40").first).to_be_attached()
    shutil.rmtree(folder)
    expect(page.locator(".pulse.waiting")).to_be_visible()
