"""The report, without a browser: what it reads from whatever state a run folder is in, and what it says."""

import html
import io
import json
import math
import random
import re
from pathlib import Path

import pytest
from rich.console import Console
from support.paths import FIXTURES, script

from kibitz.config import METHOD_CONFIGS
from kibitz.report import build, formats, heatmap, rollout_page
from kibitz.report.costs import PHASES, spent, table
from kibitz.report.costs import charts as cost_charts
from kibitz.report.curves import charts, compute_so_far
from kibitz.report.folder import Run, read_run
from kibitz.report.summary import comparisons, sentences, title
from kibitz.report.terminal import print_rollout

synthetic = script(FIXTURES / "report_run" / "synthetic.py")
EVIL = "</script><img src=x onerror=alert(1)>\x1b[31m[bold]\u202e{{ 7*7 }}"


@pytest.fixture
def folder(tmp_path) -> Path:
    return synthetic.write_run(tmp_path / "arithmetic-opd", num_prompts=6)


def page_of(*folders: Path) -> str:
    return build(list(folders), folders[0] / "out.html").read_text(encoding="utf-8")


def visible_part(page: str) -> str:
    return re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)


def island(page: str, name: str) -> dict:
    (found,) = re.findall(rf'<script type="application/json" id="{name}">(.*?)</script>', page, flags=re.DOTALL)
    return json.loads(found)


# ------------------------------------------------------------------ a whole run


def test_report_stands_in_the_run_folder_and_says_what_was_done(folder):
    path = build([folder])
    assert path == folder / "report.html"
    words = " ".join(re.sub(r"<[^>]+>", " ", visible_part(path.read_text(encoding="utf-8"))).split())
    assert "The student arithmetic/student wrote its own responses" in words
    assert "It took 40 steps of 64 prompts with 4 responses each." in words
    for heading in ("Before and after", "What the teacher said", "Curves", "What it cost", "Recipe"):
        assert heading in words


def test_page_asks_nothing_of_the_network_and_carries_plotly_once(folder):
    page = page_of(folder)
    assert page.count("plotly.js v") == 1
    assert "default-src 'none'" in html.unescape(page)
    assert not re.search(r'(src|href)="(https?:)?//', visible_part(page))
    assert "plotly.js v" not in rollout_page(read_run(folder).rollouts)


def test_before_and_after_are_the_first_and_last_evaluation(folder):
    (comparison,) = comparisons(read_run(folder))
    rows = read_run(folder).evals
    sampled = comparison.measures[0]
    assert (comparison.first_step, comparison.last_step) == (0, 40)
    assert sampled.before.value == rows[0]["sampled"]["accuracy"]
    assert sampled.after.value == rows[-1]["sampled"]["accuracy"]
    assert sampled.verdict == "better"


def test_overlapping_intervals_are_called_neither_better_nor_worse():
    def row(step, value):
        return {"step": step, "split": "dev", "sampled": {"accuracy": value, "low": value - 0.1, "high": value + 0.1}}

    (comparison,) = comparisons(Run("r", evals=[row(0, 0.5), row(9, 0.6)]))
    assert (comparison.measures[0].verdict, comparison.measures[0].remark) == ("", "intervals overlap")


def test_costs_add_up_over_steps_and_phases(folder):
    run = read_run(folder)
    words = table(run)
    assert [row[0] for row in words["rows"]] == ["Student writes", "Teacher scores", "Student learns"]
    assert words["total"][1] == formats.flops(40 * (1.4e9 + 2.1e9 + 2.9e9)) == "256 GFLOP"
    assert words["total"][3] == formats.seconds(40 * (0.11 + 0.03 + 0.07)) == "8.4 s"
    assert compute_so_far(run, [0, 1, 40]) == pytest.approx([0, 6.4e9, 40 * 6.4e9])


def test_seconds_of_sampling_belong_to_the_teacher_where_it_wrote():
    row = {
        "step": 1,
        "seconds": {"sampling": 2.0, "training": 2.0},
        "flops": {"teacher_sampling": 3e9, "student_training": 1e9},
    }
    assert table(Run("sft", metrics=[row]))["rows"] == [
        ["Student learns", "1 GFLOP", "25.0%", "2.0 s", "50.0%"],
        ["Teacher writes", "3 GFLOP", "75.0%", "2.0 s", "50.0%"],
    ]


def test_seconds_that_phases_share_count_once():
    row = {
        "step": 1,
        "seconds": {"sampling": 2.0, "scoring": 1.0, "training": 1.0},
        "flops": {phase.flops: 1e9 * number for number, phase in enumerate(PHASES, 1)},
    }
    run = Run("all", metrics=[row])
    assert sum(seconds or 0.0 for _, seconds in (spent(run, phase) for phase in PHASES)) == 4.0
    assert table(run)["total"][3] == "4.0 s"
    assert [row[3] for row in table(run)["rows"]] == ["–", "–", "–", "1.0 s", "1.0 s", "2.0 s"]
    (_, time) = cost_charts([run])
    assert sum(trace["x"][0] for trace in time["figure"]["data"]) == 4.0


def test_each_phase_has_one_colour_in_bars_and_legend(tmp_path):
    folder = synthetic.write_run(tmp_path / "run", num_prompts=1)
    rows = [{"step": 1, "flops": {phase.flops: 1e9 for phase in PHASES}, "seconds": {"training": 1.0, "rest": 9.0}}]
    synthetic.write_jsonl(folder / "metrics.jsonl", rows)
    page = page_of(folder)
    bars = {trace["name"]: trace["meta"]["run"] for trace in island(page, "figures")["costs_flops"]["data"]}
    legend = {name: int(number) for number, name in re.findall(r'<i class="key phase-(\d)"></i>([^<]+)<', page)}
    assert bars == legend == {phase.label: number for number, phase in enumerate(PHASES)}
    css = Path(formats.__file__).with_name("style.css").read_text()
    colours = re.findall(r"--phase-(\d): (light-dark\(#\w{6}, #\w{6}\));", css)
    rules = re.findall(r"\.key\.phase-(\d) \{ background: var\(--phase-(\d)\); \}", css)
    assert [number for number, _ in colours] == [a for a, b in rules if a == b] == [str(n) for n in range(len(PHASES))]
    assert len({colour for _, colour in colours}) == len(PHASES)


def test_brackets_are_named_where_there_are_some(folder):
    assert "256 held-out prompts. Brackets are 95% intervals." in page_of(folder)
    rows = [{"step": step, "split": "dev", "num_prompts": 1, "reverse_kl": 0.5} for step in (0, 1)]
    synthetic.write_jsonl(folder / "evals.jsonl", rows)
    page = page_of(folder)
    assert "1 held-out prompt." in page
    assert "Brackets" not in page
    assert "intervals in brackets" not in page_of(folder, folder)
    synthetic.write_jsonl(folder / "evals.jsonl", [{**row, "held_out": False} for row in rows])
    assert "1 training prompt." in page_of(folder)
    assert "Split dev, training prompts. After the last step; beneath" in page_of(folder, folder)


@pytest.mark.parametrize("noun", ["step", "held-out prompt"])
def test_one_is_one(noun):
    words = [formats.many(number, noun) for number in (0, 1, 1.0, 2, 1234, None)]
    assert words == [f"0 {noun}s", f"1 {noun}", f"1 {noun}", f"2 {noun}s", f"1,234 {noun}s", f"– {noun}s"]


def test_several_runs_share_the_axes(folder, tmp_path):
    other = synthetic.write_run(tmp_path / "elsewhere" / "arithmetic-opd", num_prompts=2, seed=1)
    page = page_of(folder, other)
    assert "2 runs compared" in page
    accuracy = island(page, "figures")["accuracy"]["data"]
    assert {trace["meta"]["run"] for trace in accuracy} == {0, 1}
    assert [run["name"] for run in island(page, "rollouts")["runs"]] == ["arithmetic-opd", "arithmetic-opd (2)"]


# ------------------------------------------------------------------ runs that were killed, or never began


def test_half_written_line_is_left_out_and_named(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": 0.')
    run = read_run(folder)
    assert len(run.metrics) == 40
    assert "metrics.jsonl ends in a half-written line, which was left out." in run.notices
    assert "half-written line" in page_of(folder)


def test_spoilt_lines_in_the_middle_are_named(folder):
    lines = (folder / "evals.jsonl").read_text().splitlines()
    (folder / "evals.jsonl").write_text("\n".join([lines[0], "\x00\x00", '["no row"]', *lines[1:]]) + "\n")
    assert read_run(folder).notices == ["evals.jsonl cannot be read in lines 2 and 3; what stood there was left out."]


def test_a_run_that_wrote_nothing_yet_still_gives_a_page(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        page_of(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    page = page_of(tmp_path)
    for words in (
        "metrics.jsonl is empty.",
        "Nothing was evaluated",
        "no annotated rollouts",
        "Neither operations nor",
    ):
        assert words in page


@pytest.mark.parametrize("name", ["recipe.yaml", "run.json", "metrics.jsonl", "evals.jsonl", "rollouts.jsonl"])
@pytest.mark.parametrize("content", [None, "", "{", "[1, 2]", "\xff\x00: ["])
def test_any_file_may_be_missing_or_spoilt(folder, name, content):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content.encode("latin-1"))
    assert name in page_of(folder)


def test_line_separators_inside_a_row_do_not_cut_it(folder):
    row = json.dumps({"step": 0, "prompt": "a\u2028b\x85c", "tokens": []}, ensure_ascii=False)
    (folder / "rollouts.jsonl").write_text(row + "\n", encoding="utf-8")
    (read,) = read_run(folder).rollouts
    assert read["prompt"] == "a\u2028b\x85c"


def test_missing_folder_is_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no run folder at .*nowhere"):
        build([tmp_path / "nowhere"])


def test_resumed_steps_count_once(folder):
    row = {"step": 40, "loss": 9.0, "flops": {"student_training": 1.0}}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    run = read_run(folder)
    assert len(run.metrics) == 40
    assert run.metrics[-1] == row


def test_numbers_that_are_none_are_gaps(folder):
    odd = [math.nan, math.inf, None, "0.1", True, 10**400, [], {}]
    rows = [
        {"step": step, "loss": value, "flops": value, "seconds": {"sampling": value}} for step, value in enumerate(odd)
    ]
    rows += [{"step": 20, "loss": 0.5}, {"step": 21, "loss": 0.4}, {"step": None}, {"step": math.nan}, {}]
    synthetic.write_jsonl(folder / "metrics.jsonl", rows)
    synthetic.write_jsonl(folder / "evals.jsonl", [{"step": 0, "sampled": value, "pass_at_k": value} for value in odd])
    loss = next(chart for chart in charts([read_run(folder)]) if chart["key"] == "loss")
    assert list(loss["figure"]["data"][0]["y"]) == [0.5, 0.4]
    assert "NaN" not in json.dumps(island(page_of(folder), "figures"))


# ------------------------------------------------------------------ the heat-map's data


def test_before_and_after_of_a_prompt_stand_side_by_side_and_wrong_ones_come_first(folder):
    found = heatmap.pairs(read_run(folder).rollouts)
    assert len(found) == 6
    assert all([side["step"] for side in pair.sides] == [0, 40] for pair in found)
    verdicts = [heatmap.is_right(pair.sides[0]) for pair in found]
    assert verdicts == sorted(verdicts)


def test_fork_is_the_most_punished_token_above_one_nat():
    def row(*penalties):
        return {"tokens": [{"student_logp": -0.5, "teacher_logp": -0.5 - p} for p in penalties]}

    assert heatmap.fork(row(0.1, 1.5, 4.0, 2.0)) == 2
    assert heatmap.fork(row(0.1, 0.9)) is None
    assert heatmap.fork(row()) is None
    assert heatmap.fork(row(5.0) | {"fork": None}) is None
    assert heatmap.fork(row(5.0) | {"fork": 7}) is None


def test_odd_tokens_are_taken_as_they_are():
    tokens = [
        {"text": "a", "student_logp": -math.inf, "teacher_logp": math.nan, "student_top": [["a"], "b", ["c", "d"]]},
        {"text": 7, "teacher_top": None},
        "no token",
        {},
    ]
    page = rollout_page([{"prompt": None, "tokens": tokens, "fork": True}, {"tokens": 3, "response": "x"}])
    first, second = island(page, "rollouts")["runs"][0]["pairs"]
    assert [token[1:6] for token in first["sides"][0]["tokens"]] == [
        [-100.0, None, None, [], []],
        *[[None, None, None, [], []]] * 2,
    ]
    assert second["sides"][0]["response"] == "x"


def test_what_a_browser_cannot_hold_is_left_out_and_said(monkeypatch, folder):
    monkeypatch.setattr(heatmap, "MAX_TOKENS", 100)
    page = page_of(folder)
    kept = len(island(page, "rollouts")["runs"][0]["pairs"])
    assert 0 < kept < 6
    assert f"{6 - kept} more prompts are in the run folder" in page


def test_levels_are_ordered_and_colours_can_be_read():
    assert [formats.level(nats) for nats in (None, -3.0, 0.0, 0.3, 1.0, 2.0, 3.0, 4.0, 9.0)] == [
        0,
        0,
        0,
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    css = Path(formats.__file__).with_name("heatmap.css").read_text()
    found = re.findall(r"--h\d: light-dark\((#\w{6}), (#\w{6})\)", css)
    assert len(found) == len(formats.LEVELS)
    light, dark = ([luminance(pair[theme]) for pair in found] for theme in (0, 1))
    assert light == sorted(light, reverse=True)  # even without hue, stronger is darker on light
    assert dark == sorted(dark)  # and brighter on dark
    text = [("#1e2022", "#e7e5df")] * 3 + [("#1a1207", "#fff8ee")] * 2 + [("#ffffff", "#ffffff")]
    for background, ink in zip(found, text, strict=True):
        assert all(contrast(b, i) >= 4.5 for b, i in zip(background, ink, strict=True))


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    """As WCAG 2 defines it; 4.5 is its bound for text."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


# ------------------------------------------------------------------ text that models wrote is harmless


def test_no_string_leaves_its_place(tmp_path):
    folder = synthetic.write_run(tmp_path / "<img src=x onerror=alert(1)>", num_prompts=2)
    rows = read_run(folder).rollouts
    for row in rows:
        row |= {"prompt": EVIL, "answer": EVIL, "response": EVIL, "prompt_key": EVIL}
        row["tokens"][0] |= {"text": EVIL, "student_top": [[EVIL, 0.9]]}
    synthetic.write_jsonl(folder / "rollouts.jsonl", rows)
    (folder / "recipe.yaml").write_text(
        json.dumps({"student": {"model": EVIL}, "method": {"type": EVIL}, "data": {"world": EVIL}})
    )
    (folder / "run.json").write_text(json.dumps({"device": EVIL, "status": EVIL, EVIL: EVIL}))
    page = page_of(folder, folder)
    assert "<img" not in visible_part(page)
    assert all(
        "<img" not in text for text in re.findall(r'<script type="application/json".*?</script>', page, flags=re.DOTALL)
    )
    assert "\x1b" not in page
    assert "\u202e" not in visible_part(page)
    assert "49" not in re.findall(r"<h1>.*?</h1>", page)[0]
    island(page, "rollouts"), island(page, "figures")


def test_lone_surrogates_can_be_written(tmp_path):
    folder = synthetic.write_run(tmp_path / "run", num_prompts=1)
    (folder / "rollouts.jsonl").write_text('{"step": 0, "prompt": "\\ud83d", "tokens": [{"text": "\\ud83d"}]}\n')
    assert island(page_of(folder), "rollouts")["strings"] == ["\ufffd"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", " the"),
        ("    x", "····x"),
        ("a\n  b", "a↵\n··b"),
        ("\t\x1b\x07\x7f", "⇥␛␇␡"),
        ("\u202e\u2066", "<U+202E><U+2066>"),
        ("né 日本 👩\u200d🔬", "né·日本·👩\u200d🔬"),
        ("", ""),
    ],
)
def test_invisible_characters_are_shown(text, shown):
    assert formats.visible(text) == shown


# ------------------------------------------------------------------ words and units


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (formats.flops(1.98e11), "198 GFLOP"),
        (formats.flops(999.9e9), "1 TFLOP"),
        (formats.flops(0), "0 FLOP"),
        (formats.seconds(8.33), "8.3 s"),
        (formats.seconds(0.042), "0.042 s"),
        (formats.seconds(245), "4 min 05 s"),
        (formats.seconds(11_520), "3 h 12 min"),
        (formats.seconds(187_200), "2 d 4 h"),
        (formats.count(153_664), "153,664"),
        (formats.count(1_720_000_000), "1.72B"),
        (formats.percent(0.6745), "67.5%"),
        (formats.plain(0.04131), "0.0413"),
        (formats.plain(-12_345.6), "−12,346"),
        (formats.change(0.2, 0.5, points=True), "+30.0 points"),
        (formats.plain(None), "–"),
    ],
)
def test_numbers_are_for_people(words, expected):
    assert words == expected


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"method": {"type": "sft"}, "student": {"model": "a"}}, "learnt to write the given responses"),
        (
            {"method": {"type": "sft", "source": "teacher"}, "student": "a", "teacher": {"url": "http://b"}},
            "wrote responses to",
        ),
        ({"method": {"type": "grpo"}, "student": {"model": "a"}}, "shared its reward"),
        ({"method": {"type": "opd", "support": "sampled"}, "teacher": [{"model": "b"}, {"model": "c"}]}, "b, c"),
        ({"method": {"type": "new"}, "student": None, "teacher": {"model": "b"}}, "(new)"),
        ({"method": 3, "data": 4, "rollout": [], "steps": "many"}, "was trained on"),
        ({}, "cannot be read"),
    ],
)
def test_every_recipe_becomes_sentences(recipe, words):
    assert words in " ".join(sentences(Run("r", recipe=recipe)))


# ------------------------------------------------------------------ the terminal


def printed(row: dict, width: int = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_rollout(row, console)
    return console.file.getvalue().split("\n")


def wrong_rollout() -> dict:
    rows = (synthetic.rollout(random.Random(seed), "4-(2+9)*(1+4)", 0, 1.0) for seed in range(9))
    return next(row for row in rows if row["fork"] is not None)


@pytest.mark.parametrize("width", [100, 40, 12])
def test_the_caret_stands_under_the_fork(width):
    row = wrong_rollout()
    lines = printed(row, width)
    at = next(i for i, line in enumerate(lines) if line.lstrip().startswith("^") or line.endswith("^"))
    assert lines[at - 1][lines[at].index("^")] == row["tokens"][row["fork"]]["text"]
    assert "fork: penalty" in "".join(lines[at : at + 2])


def test_terminal_shows_text_and_no_orders():
    row = wrong_rollout()
    row["prompt"] = row["answer"] = row["tokens"][0]["text"] = EVIL
    row["tokens"][1]["student_top"] = row["tokens"][row["fork"]]["teacher_top"] = [[EVIL, 0.5]]
    text = "\n".join(printed(row))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[bold]" in text


def test_rollout_without_tokens_or_teacher_is_printed():
    assert "The response is empty." in printed({"prompt": "p", "response": ""})
    assert "No teacher scored this response." in printed({"tokens": [{"text": "a", "student_logp": -0.1}]})


def test_a_response_without_penalties_is_not_called_right():
    equal = printed({"tokens": [{"text": "7", "student_logp": -0.1, "teacher_logp": -0.1}], "finished": None})
    assert "No token is punished: the teacher finds each at least 0.8 times as likely" in " ".join(equal)
    assert "cut off" not in " ".join(equal)


def test_what_the_guards_said_stands_at_the_top(folder):
    assert 'role="alert"' not in page_of(folder)
    alarm = {
        "step": 12,
        "name": "repetition",
        "symptom": "<b>half</b> of the tokens repeat",
        "remedy": "Lower the rate.",
        "action": "warn",
    }
    (folder / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    page = page_of(folder)
    assert "Step 12, repetition: &lt;b&gt;half&lt;/b&gt; of the tokens repeat. Lower the rate." in page


def test_what_each_of_several_teachers_says_stands_on_the_tokens_card():
    said = [{"logp": -0.5, "kl": 0.25, "top": [["7", 0.6]]}, {"logp": float("-inf"), "kl": None, "top": "x"}]
    row = {"prompt": "p", "teachers": [{"name": "<b>sums</b>", "weight": 0.75}, {"name": 3}, "no teacher"]}
    odd = {"text": "8", "teachers": "none"}
    page = rollout_page([row | {"tokens": [{"text": "7", "teachers": said}, odd]}])
    held = island(page, "rollouts")
    (side,) = held["runs"][0]["pairs"][0]["sides"]
    assert [name for name, _ in side["teachers"]] == ["<b>sums</b>", "3"] and "<b>sums" not in page
    seven = held["strings"].index("7")
    assert side["tokens"][0][6] == [[-0.5, 0.25, [seven, 0.6]], [-100.0, None, []]]
    assert side["tokens"][1][6] == []


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_every_method_has_a_name_and_a_sentence_of_its_own(name):
    recipe = {"method": {"type": name}, "student": {"model": "small"}, "teacher": {"model": "large"}}
    assert title(Run("r", recipe=recipe)) != name
    others = {k: section for k, section in METHOD_CONFIGS.items() if k != name}
    assert METHOD_CONFIGS[name].title not in {section.title for section in others.values()}
    for source in ("", *METHOD_CONFIGS[name].stories):
        recipe["method"]["source"] = source
        (said,) = sentences(Run("r", recipe=recipe))
        assert "<code>small</code>" in said and "{" not in said and said.endswith(".")
        assert said not in {sentences(Run("r", recipe={**recipe, "method": {"type": k}}))[0] for k in others}
