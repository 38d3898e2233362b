"""What a person sees of a run: a bar at a terminal, a few lines in a log, nothing where nobody asked."""

import io
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from rich.console import Console
from support.runs import recipe

from kibitz.training import progress


def rows(count: int):
    return [{"step": i, "loss": 0.5, "reverse_kl": 0.25, "tokens_per_second": 1000.0} for i in range(1, count + 1)]


def test_a_log_gets_a_few_lines():
    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    with progress.Bar(console) as bar:
        assert bar.doing() == "loading"
        bar.start(SimpleNamespace(steps=20), 0)
        bar.phase("teacher")
        assert bar.doing() == "teacher scores (step 1 of 20)"
        for row in rows(20):
            bar.step(row)
    lines = console.file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{i}/20" for i in range(2, 21, 2)]
    assert all("reverse KL 0.25" in line for line in lines)
    assert all(line.endswith(" left") for line in lines[:-1]) and not lines[-1].endswith("left")


def test_a_bar_without_a_console_only_remembers(capfd):
    with progress.Bar(None) as bar:
        bar.start(SimpleNamespace(steps=4), 0)
        bar.phase("student")
        bar.step(rows(1)[0])
        bar.note("look")
        assert bar.doing() == "student learns (step 2 of 4)"
    assert capfd.readouterr() == ("", "")


def test_python_shows_a_bar_only_where_somebody_watches(monkeypatch):
    assert isinstance(progress.bar_if_watched(quiet=False), nullcontext)  # stderr is no terminal here
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's word for a terminal
    monkeypatch.delenv("NO_COLOR")
    assert isinstance(progress.bar_if_watched(quiet=False), progress.Bar)
    assert isinstance(progress.bar_if_watched(quiet=True), nullcontext)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert isinstance(progress.bar_if_watched(quiet=False), nullcontext)


LOOKED_AT = """
import json, sys, threading, kibitz
from kibitz.training.progress import Bar

phase, drawn, seen = Bar.phase, Bar._drawn, threading.Event()

def until_seen(bar, name):
    phase(bar, name)
    seen.clear()
    assert seen.wait(300)

def looked_at(bar):
    seen.set()
    return drawn(bar)

Bar.phase, Bar._drawn = until_seen, looked_at
kibitz.train(json.loads(sys.argv[1]))
"""
"""The bar is drawn eight times a second, and a phase of a small model's step takes less: here each lasts until it was drawn."""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="terminals are opened the POSIX way")
def test_train_at_a_terminal_says_what_it_does(models, tmp_path):
    import pty

    tree = json.dumps(recipe(*models, tmp_path / "run", steps=3))
    ours, theirs = pty.openpty()
    line = [sys.executable, "-c", LOOKED_AT, tree]
    with subprocess.Popen(line, stderr=theirs, stdout=theirs, env={**os.environ, "COLUMNS": "100"}) as running:
        os.close(theirs)
        shown = b""
        while True:
            try:
                block = os.read(ours, 4096)
            except OSError:  # the other side is closed
                break
            if not block:
                break
            shown += block
        os.close(ours)
    assert running.returncode == 0
    assert b"loading" in shown
    assert b"student learns" in shown and b"3/3" in shown
