"""`kibitz score --prompts` and `kibitz watch` on the command line: files, numbers, mistakes in one sentence."""

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from support.paths import FIXTURES, ROOT, script
from typer.testing import CliRunner

from kibitz import config
from kibitz.cli import app

synthetic = script(FIXTURES / "report_run" / "synthetic.py")


def says(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"{i}+2*3", "answer": "7", "task": "ab"[i % 2]}) + "\n" for i in range(8))
    )
    return path


def test_a_diagnosis_writes_a_page_numbers_and_a_recipe(models, prompts, tmp_path):
    out = tmp_path / "look"
    flags = ("--student", models[0], "--teacher", models[1], "--prompts", prompts, "--num-prompts", 6, "--out", out)
    answer = says("score", *flags, "--price", 3, "rollout.max_tokens=6", "threads=1", "--json")
    assert answer.exit_code == 0, answer.output
    tree = json.loads(answer.stdout)
    assert tree["files"] == {"diagnosis": str(out / "diagnosis.html"), "numbers": str(out / "numbers.json"),
                             "recipe": str(out / "recipe.yaml")}  # fmt: skip
    assert tree["numbers"] == json.loads((out / "numbers.json").read_text())["numbers"]
    assert tree["numbers"]["num_answers"] == 6
    assert {row["task"] for row in tree["tasks"]} == {"a", "b"}
    assert tree["cost"]["money"] == pytest.approx(3 * tree["cost"]["seconds"] / 3600)
    assert config.load(out / "recipe.yaml").rollout.max_tokens == 6
    assert "kibitz train" in (out / "diagnosis.html").read_text()


def test_a_person_is_told_what_comes_next(models, prompts, tmp_path):
    flags = ("--student", models[0], "--teacher", models[1], "--prompts", prompts, "--num-prompts", 4)
    answer = says("score", *flags, "--out", tmp_path / "look", "rollout.max_tokens=4")
    assert answer.exit_code == 0, answer.output
    assert "Reverse KL" in answer.stdout
    assert f"next       kibitz train {tmp_path / 'look' / 'recipe.yaml'}" in answer.stdout


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("--prompts", "p.jsonl", "--student", "s"), "--teacher"),
        (("--prompts", "p.jsonl", "--teacher", "t"), "--student"),
        (("--prompts", "p.jsonl", "--world", "arithmetic"), "either --prompts FILE or --world NAME"),
        (("--prompts", "p.jsonl", "--prompt", "1+1"), "leave out --prompt"),
        (("--world", "arithmatic"), "arithmetic"),
        (("--prompt", "1+1", "steps=3"), "write --prompts FILE"),
        (("--world", "arithmetic", "stepps=3"), "did you mean steps"),
        (("--world", "assistant"), "teacher"),
    ],
)
def test_mistakes_of_a_diagnosis_are_one_sentence(args, word):
    answer = says("score", *args)
    assert answer.exit_code == 2
    assert answer.stderr.startswith("error: ")
    assert len(answer.stderr.strip().splitlines()) == 1
    assert word in answer.stderr


@pytest.mark.parametrize("case", ["nothing", "file", "taken"])
def test_mistakes_of_watch_are_one_sentence(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        args = {"nothing": (), "file": ("file",), "taken": ("run", "--port", port)}[case]
        answer = says("watch", *args)
    assert answer.exit_code == 2
    assert {"nothing": "kibitz watch RUN", "file": "is a file", "taken": "--port 0"}[case] in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


def test_watch_prints_its_address_and_ends_by_ctrl_c(tmp_path):
    folder = synthetic.write_run(tmp_path / "run", num_prompts=1)
    line = [sys.executable, "-m", "kibitz", "watch", str(folder), "--port", "0", "--json"]
    watching = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    assert watching.stdout
    assert watching.stderr
    try:
        url = json.loads(watching.stdout.readline())["url"]
        with urllib.request.urlopen(url) as answer:
            assert b"kibitz watch" in answer.read()
    finally:
        watching.send_signal(signal.SIGINT)
    assert watching.wait(600) == 0
    assert watching.stderr.read() == ""
    watching.stdout.close()
    watching.stderr.close()
