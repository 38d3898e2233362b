"""`kibitz watch` without a browser: files that grow, are cut, replaced and broken; who is answered; how much memory it takes."""

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.paths import FIXTURES, ROOT, script

from kibitz.cli.watch import newest_runs
from kibitz.report import heatmap
from kibitz.report.curves import CHARTS
from kibitz.report.folder import read_run
from kibitz.report.live import Followed, phases, pulse
from kibitz.report.tail import Island, Rows, Tail
from kibitz.report.watch import Seen, Watched, serve

synthetic = script(FIXTURES / "report_run" / "synthetic.py")


@pytest.fixture
def folder(tmp_path) -> Path:
    return synthetic.write_run(tmp_path / "run", num_prompts=6)


def rows_of(path: Path) -> Rows:
    return Rows(Tail(path), lambda row: row)


def append(path: Path, *texts: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(texts))


def line(step: int, **more) -> str:
    return json.dumps({"step": step, **more}) + "\n"


# ------------------------------------------------------------------ files that grow


def test_only_what_is_new_is_read_and_half_a_line_waits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = rows_of(path)
    rows.look()
    append(path, line(1), line(2), '{"step": 3, "lo')
    rows.look()
    assert [row["step"] for row in rows.rows] == [1, 2]
    append(path, 'ss": 0.5}\n', "no json\n", "[1]\n", '{"loss": 1}\n')
    rows.look()
    rows.look()
    assert [row["step"] for row in rows.rows] == [1, 2, 3]
    assert (rows.rows[-1]["loss"], rows.version) == (0.5, 0)


def test_a_file_that_is_replaced_by_a_shorter_one_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, *(line(step, loss=step / 7) for step in range(1, 9)))
    rows = rows_of(path)
    rows.look()
    (tmp_path / "new").write_text("".join(line(step, loss=step / 7) for step in range(1, 5)))
    (tmp_path / "new").replace(path)  # as a resumed run does
    append(path, line(5, loss=9.0))
    rows.look()
    assert ([row["step"] for row in rows.rows], rows.version) == ([1, 2, 3, 4, 5], 1)
    assert rows.rows[-1]["loss"] == 9.0


def test_a_copy_that_has_grown_is_no_other_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, line(1), line(2))
    rows = rows_of(path)
    rows.look()
    (tmp_path / "copy").write_text(path.read_text() + line(3))
    (tmp_path / "copy").replace(path)  # as rsync does: another inode
    rows.look()
    assert ([row["step"] for row in rows.rows], rows.version) == ([1, 2, 3], 0)


def test_a_step_that_is_logged_again_takes_back_what_came_after_it(tmp_path):
    path = tmp_path / "evals.jsonl"
    append(path, *(line(step, split=split) for step in (0, 5, 10) for split in ("dev", "test")), line(5, split="dev"))
    rows = rows_of(path)
    rows.look()
    assert [(row["step"], row["split"]) for row in rows.rows] == [(0, "dev"), (0, "test"), (5, "test"), (5, "dev")]
    assert rows.version == 1


def test_a_file_that_vanishes_is_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, line(1))
    rows = rows_of(path)
    rows.look()
    path.unlink()
    rows.look()
    assert (rows.rows, rows.version) == ([], 1)


def test_what_is_followed_is_what_the_report_reads(folder):
    followed = Followed(folder)
    followed.look()
    whole = read_run(folder)
    assert followed.run.evals == whole.evals
    assert [row["step"] for row in followed.run.metrics] == [row["step"] for row in whole.metrics]
    assert followed.run.recipe == whole.recipe


# ------------------------------------------------------------------ rollouts


def test_the_island_of_growing_files_is_that_of_the_report(folder):
    """Its strings have other numbers, because it is written pair by pair: so texts are compared, not numbers."""
    island = Island(10**6)
    island.add("run", folder / "rollouts.jsonl")
    live, whole = json.loads(island.as_json()), heatmap.island([read_run(folder)])
    whole = json.loads(json.dumps(whole))
    assert (live["strings"], live["runs"][0]["pairs"]) == (whole["strings"], whole["runs"][0]["pairs"])
    assert live["flags"] == {"leftOut": 0, "graded": True, "judged": True, "paired": True}


def test_more_tokens_than_a_page_takes_are_left_out_and_counted(folder):
    island = Island(60)
    island.add("run", folder / "rollouts.jsonl")
    live = json.loads(island.as_json())
    assert 1 <= len(live["runs"][0]["pairs"]) < 6
    assert live["flags"]["leftOut"] == 6 - len(live["runs"][0]["pairs"])


def test_rollouts_between_the_first_and_the_latest_step_are_passed_over(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    row = {"prompt": "p", "prompt_key": "p", "tokens": [{"text": "a"}]}
    append(path, *(json.dumps({"step": step, **row}) + "\n" for step in (0, 3, 9)), "broken\n")
    append(path, json.dumps({**row, "step": 12}) + "\n", '{"step": 15, "half')
    island = Island(100)
    island.add("run", path)
    assert [side["step"] for side in json.loads(island.as_json())["runs"][0]["pairs"][0]["sides"]] == [0, 12]


# ------------------------------------------------------------------ how it goes


def running(folder: Path, done: int, started: float, **info) -> Followed:
    """A run of 40 steps of which some are done."""
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(rows[:done]))
    (folder / "evals.jsonl").write_text((folder / "evals.jsonl").read_text().splitlines(keepends=True)[0])
    began = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(started))
    (folder / "run.json").write_text(json.dumps({"status": "running", "started": began, "first_step": 0, **info}))
    for name in os.listdir(folder):
        os.utime(folder / name, (started + 4.2, started + 4.2))
    followed = Followed(folder)
    followed.look()
    return followed


def test_time_and_money_left_come_from_the_steps_and_what_lies_between_them(folder):
    """10 steps of 0.21 s took 4.2 s of the clock, so that the 30 to come take 12.6 s; at 3,600 an hour each is 1."""
    beat = pulse(running(folder, 10, 1e9), price=3600.0, now=1e9 + 5)
    assert (beat.state, beat.step, beat.share) == ("running", 10, 0.25)
    assert beat.left == pytest.approx(12.6)
    assert "12.6 s left" in beat.words
    assert "4.20 spent, about 12.60 to come" in beat.words


def test_silence_is_told_and_does_not_mean_the_end(folder):
    followed = running(folder, 10, 1e9)
    assert pulse(followed, now=1e9 + 60).state == "running"
    beat = pulse(followed, now=1e9 + 300)
    assert beat.state == "silent"
    assert "--resume" in beat.words
    append(folder / "metrics.jsonl", line(11, seconds={"sampling": 0.2}))
    followed.look()
    assert pulse(followed, now=time.time()).state == "running"


def test_an_empty_place_waits_and_an_end_is_an_end(folder, tmp_path):
    empty = Followed(tmp_path / "to come")
    empty.look()
    assert pulse(empty).state == "waiting"
    done = Followed(folder)
    done.look()
    assert (pulse(done).state, pulse(done).share) == ("finished", 1.0)
    assert "12.4 s" in pulse(done).words


def test_phases_say_who_waits(folder):
    followed = Followed(folder)
    followed.look()
    found = phases(followed.run)
    assert [(phase["label"], phase["waits"]) for phase in found] == [
        ("Student writes", "the teacher waits"),
        ("Teacher scores", "the student waits"),
        ("Student learns", "the teacher waits"),
    ]
    assert [phase["share"] for phase in found] == pytest.approx([11 / 21, 3 / 21, 7 / 21])


# ------------------------------------------------------------------ what a page is sent


def news(watched: Watched, seen: Seen) -> dict[str, list[dict]]:
    watched.looked = 0.0
    found: dict[str, list[dict]] = {}
    for name, data in watched.news(seen):
        found.setdefault(name, []).append(json.loads(data))
    return found


def test_a_page_gets_each_point_once(folder):
    watched, seen = Watched([folder]), Seen()
    first = news(watched, seen)
    assert {*first} == {"points", "card", "rollouts"}
    assert first["points"][0]["again"]
    assert len(first["points"][0]["lines"]["loss/0"]["y"]) == 40
    assert first["points"][0]["lines"]["accuracy/0"].keys() == {"step", "flops", "y", "low", "high"}
    assert {key.split("/")[0] for key in first["points"][0]["lines"]} <= {chart.key for chart in CHARTS}
    assert "points" not in news(watched, seen)
    append(folder / "metrics.jsonl", line(41, loss=0.25, flops={"student_training": 1e9}))
    again = news(watched, seen)["points"][0]
    assert not again["again"]
    assert again["lines"]["loss/0"]["step"] == [41]
    assert again["lines"]["loss/0"]["y"] == [0.25]
    assert again["lines"]["loss/0"]["flops"][0] == pytest.approx(40 * 6.4e9 + 1e9)


def test_numbers_beyond_reason_stay_numbers(folder):
    wild = dict.fromkeys(("sampling", "scoring", "training"), 1e299)
    append(
        folder / "metrics.jsonl",
        *(line(41 + i, loss=1e308, seconds=wild, flops=wild, num_tokens=1e299) for i in range(40)),
    )
    append(
        folder / "metrics.jsonl",
        '{"step": 90, "loss": Infinity, "flops": {"a": NaN}}\n',
        '{"step": NaN}\n',
        '{"step": 1e999}\n',
    )
    found = news(Watched([folder], price=1e9), Seen())
    assert found["points"][0]["lines"]["loss/0"]["step"][-1] == 41 - 1  # 1e308 and Infinity are no losses


def test_another_page_gets_everything(folder):
    watched = Watched([folder])
    news(watched, Seen())
    assert len(news(watched, Seen())["points"][0]["lines"]["loss/0"]["y"]) == 40


def test_an_alarm_stands_on_the_card_with_its_remedy_and_as_text(folder):
    alarm = {"name": "cut_off", "symptom": "<img src=x onerror=alert(1)>", "remedy": "read some", "step": 7}
    append(folder / "alarms.jsonl", json.dumps(alarm) + "\n")
    card = news(Watched([folder]), Seen())["card"][0]
    assert "Step 7, cut off" in card["html"]
    assert "&lt;img src=x" in card["html"]
    assert "<img" not in card["html"]
    assert "Read some" in card["html"]


# ------------------------------------------------------------------ who is answered


@pytest.fixture
def served(folder):
    with serve([folder]) as watch:
        threading.Thread(target=watch.server.serve_forever, daemon=True).start()
        yield watch
        watch.server.shutdown()


def asked(url: str, path: str | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=300)
    connection.request("GET", path or parts.path, headers=headers)
    answer = connection.getresponse()
    body = b"" if "event-stream" in (answer.headers["Content-Type"] or "") else answer.read()
    connection.close()
    return answer.status, dict(answer.headers), body


def test_the_page_allows_its_own_scripts_and_its_own_events_only(served):
    status, headers, body = asked(served.url)
    assert status == 200
    assert headers["Referrer-Policy"] == "no-referrer"
    assert b"default-src &#39;none&#39;" in body
    assert b"connect-src &#39;self&#39;" in body
    assert asked(served.url + "events")[1]["Content-Type"] == "text/event-stream"


@pytest.mark.parametrize("path", ["/", "/events", "/x/events", "/%00", "/../../etc/passwd", "//"])
def test_nobody_is_answered_without_the_token(served, path):
    assert asked(served.url, path)[0] == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8770", "127.0.0.1.evil.example:80", "[::1", "localhost@evil.example", ""]
)
def test_a_page_elsewhere_is_not_answered_even_with_the_token(served, host):
    assert asked(served.url, Host=host)[0] == 404


@pytest.mark.parametrize("host", ["localhost:9", "127.0.0.1:9", "[::1]:9", "[::1]", "localhost"])
def test_a_tunnel_may_end_at_another_port(served, host):
    assert asked(served.url, Host=host)[0] == 200


def test_it_listens_on_the_loopback(served):
    assert served.server.server_address[0] == "127.0.0.1"


def test_without_names_the_newest_runs_are_followed(tmp_path):
    for age, name in enumerate(("a", "b", "group/c")):
        place = synthetic.write_run(tmp_path / name, num_prompts=1)
        for path in place.iterdir():
            os.utime(path, (1e9 - age, 1e9 - age))
    assert newest_runs(tmp_path) == [tmp_path / "a", tmp_path / "b", tmp_path / "group" / "c"]


# ------------------------------------------------------------------ memory

MEASURE = """
import json, sys
from pathlib import Path
from kibitz.report.watch import Seen, Watched
watched, seen = Watched([Path(sys.argv[1])]), Seen()
watched.page()
sizes = [len(data) for _, data in watched.news(seen)]
with (Path(sys.argv[1]) / "metrics.jsonl").open("a") as file:
    file.write(sys.argv[2])
watched.looked = 0.0
later = [len(data) for _, data in watched.news(seen)]
peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
print(json.dumps({"kib": int(peak), "first": sizes, "later": later, "torch": "torch" in sys.modules}))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="only Linux says how much memory a process had at most"
)
def test_a_long_run_takes_less_than_200_megabytes(tmp_path):
    """5,000 steps with all that a run logs, and 2,000 rollouts of 100 tokens: 100 MB of rollouts, of which one pair at a time
    is in memory."""
    folder = synthetic.write_run(tmp_path / "run", num_prompts=1)
    rows = read_run(folder)
    row = rows.metrics[0] | {f"number_{i}": 0.123456789 * i for i in range(30)}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row | {"step": i}) + "\n" for i in range(1, 5001)))
    tokens = (rows.rollouts[0]["tokens"] * 100)[:100]
    with (folder / "rollouts.jsonl").open("w") as file:
        for i in range(2000):
            rollout = rows.rollouts[0] | {
                "step": 0 if i < 1000 else 4000,
                "prompt_key": str(i % 1000),
                "tokens": tokens,
            }
            file.write(json.dumps(rollout) + "\n")
    assert (folder / "rollouts.jsonl").stat().st_size > 90e6
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), line(5001, loss=0.1)],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    found = json.loads(answer.stdout)
    print(found)
    assert found["kib"] < 200 * 1024
    assert not found["torch"]
    assert sum(found["later"]) < 10_000
