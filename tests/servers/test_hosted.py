"""Servers that a run starts: they come up, are replaced when they die, and never outlive it. All processes are real; the program
that stands in for vLLM is tests/support/vllm_program.py."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.paths import ROOT
from support.runs import recipe
from support.vllm_program import program

import kibitz
from kibitz.config.servers import ServerConfig
from kibitz.servers import ServerError, commands, own
from kibitz.servers.commands import Command
from kibitz.servers.http import Passing, Server, Servers
from kibitz.servers.processes import Hosted

SERVER = """
import http.server, os, signal, socket, socketserver, subprocess, sys
path = sys.argv[sys.argv.index("--uds") + 1]
if "--fail" in sys.argv: sys.exit("RuntimeError: the model is broken, key " + os.environ["VLLM_API_KEY"])
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
engine = subprocess.Popen([sys.executable, "-S", "-c", stubborn], start_new_session=True)
print("pids", os.getpid(), engine.pid, flush=True)
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *_): pass
class AtSocket(http.server.HTTPServer):
    address_family, server_bind = socket.AF_UNIX, socketserver.TCPServer.server_bind
AtSocket(path, Healthy).serve_forever()
"""
TRAINER = """
import os, signal, sys, time
from pathlib import Path
from kibitz.servers.commands import Command
from kibitz.servers.processes import Hosted
how, script, logs = sys.argv[1:]
hosted = Hosted([sys.executable, "-S", script], Path(logs))
hosted.start([Command("student", hosted.address(n), ("--uds", hosted.address(n)[5:]), name=n) for n in ("a", "b")], 600, 3)
print(hosted.folder, flush=True)
if how == "end": sys.exit(0)
if how == "error": raise ValueError("something else")
if how == "fork" and os.fork(): os.kill(os.getpid(), signal.SIGKILL)  # the child keeps what the trainer had open
time.sleep(600)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or read
        return False


def until(ready: Callable[[], object], seconds: float = 300.0) -> bool:
    """Whether something becomes true. What takes a second takes minutes where others use the machine."""
    end = time.monotonic() + seconds
    while not ready() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(ready())


def gone(pids: list[int]) -> bool:
    """Whether all of these processes end."""
    return until(lambda: not any(map(alive, pids)))


def pids_in(log: Path) -> list[int]:
    return [int(pid) for line in log.read_text().splitlines() if line.startswith("pids") for pid in line.split()[1:]]


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    return str(path)


@pytest.fixture
def hosted(tmp_path, script):
    made = Hosted([sys.executable, "-S", script], tmp_path / "logs")
    yield made
    made.close()


def command(hosted: Hosted, name: str, *more: str) -> Command:
    url = hosted.address(name)
    path = own.socket_of(url)
    assert path is not None
    return Command("student", url, ("--uds", path, *more), name=name)


SLOWER = [pytest.param(how, marks=pytest.mark.slow) for how in ("end", "error", "SIGINT", "SIGTERM", "SIGHUP")]


@pytest.mark.parametrize("how", ["SIGKILL", "fork", *SLOWER])
def test_whatever_ends_the_trainer_leaves_nothing_behind(how, tmp_path, script):
    """Neither the server, nor the engine beside it that ignores SIGTERM and has left its group, nor a socket."""
    asked = [sys.executable, "-c", TRAINER, how, script, str(tmp_path / "logs")]
    trainer = subprocess.Popen(
        asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert trainer.stdout is not None
    folder = Path(trainer.stdout.readline().strip())
    found = [pid for name in ("a", "b") for pid in pids_in(tmp_path / "logs" / f"{name}.log")]
    assert len(found) == 4
    if how.startswith("SIG"):
        assert all(map(alive, found))
        trainer.send_signal(getattr(signal, how))
    trainer.wait(300)
    trainer.stdout.close()
    assert gone(found)
    assert until(lambda: not folder.exists())
    for line in subprocess.run(
        ["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if "time.sleep(600)" in line and str(tmp_path / "logs") in line:
            os.kill(int(line.split()[0]), signal.SIGKILL)  # the child of this test's own trainer


def test_a_killed_keeper_takes_its_server_with_it(hosted, tmp_path):
    hosted.start([command(hosted, "a")], 600, 0)
    server, engine = pids_in(tmp_path / "logs" / "a.log")
    hosted.processes[0].keeper.kill()
    assert gone([server])
    os.kill(engine, signal.SIGKILL)  # whom only the keeper knew


def test_a_server_that_dies_is_replaced_and_then_no_more(hosted, tmp_path, caplog):
    hosted.start([command(hosted, "a")], 600, restarts=1)
    server = Server(hosted.address("a"), "student", 30.0)

    def comes_back() -> bool:
        try:
            server.order("/health")
        except Passing:
            return False
        return True

    try:
        assert comes_back() and "kibitz started (a)" in server.name
        os.kill(pids_in(tmp_path / "logs" / "a.log")[0], signal.SIGKILL)
        assert until(lambda: len(pids_in(tmp_path / "logs" / "a.log")) == 4 and comes_back())
        assert "another is started in its place (0 more after that)" in caplog.text
        first, engine, second, other = pids_in(tmp_path / "logs" / "a.log")
        assert gone([first, engine]) and alive(second) and alive(other)
        os.kill(second, signal.SIGKILL)
        with pytest.raises(
            ServerError, match=r"ended while it was needed, 2 times in this run.*a\.log, says"
        ) as caught:
            until(lambda: comes_back() and False)
        assert hosted.processes[0].key not in str(caught.value)
    finally:
        server.close()


@pytest.mark.slow
def test_a_server_that_hangs_is_replaced(hosted, tmp_path, caplog):
    """It keeps the request for longer than `timeout`: it is ended, by force because it does not react, and another answers."""
    hosted.start([command(hosted, "a")], 600, restarts=9)  # the next may be too slow as well, on a machine in use
    first, engine = pids_in(tmp_path / "logs" / "a.log")
    os.kill(first, signal.SIGSTOP)
    servers = Servers(ServerConfig(timeout=3.0, patience=600), [hosted.address("a")], "student")
    try:
        servers.gather([servers.submit(lambda server: server.order("/health"))])
    finally:
        servers.close()
    assert "did not answer in time" in caplog.text and "another is started in its place" in caplog.text
    *others, last, its_engine = pids_in(tmp_path / "logs" / "a.log")
    assert others[:2] == [first, engine] and gone(others) and alive(last) and alive(its_engine)


def test_a_request_that_hears_late_that_a_server_hung_does_not_end_the_next_one(hosted, tmp_path):
    """A server kept several requests. The first ends it; another one's turn to say so comes when the next server is there."""
    hosted.start([command(hosted, "a")], 600, restarts=1)
    (process,) = hosted.processes
    process.own.replace("it hangs", process.own.number)
    assert until(lambda: len(pids_in(tmp_path / "logs" / "a.log")) == 4 and process.keeper.poll() is None)
    process.own.replace("it hangs", 1)
    assert process.keeper.stdin is not None and not process.keeper.stdin.closed
    process.own.replace("it hangs", 2)
    assert process.keeper.stdin.closed


def test_a_server_that_does_not_start_says_why_and_shows_no_key(hosted):
    with pytest.raises(
        ServerError, match=r"ended before it was ready.*RuntimeError: the model is broken, key \*\*\*"
    ) as caught:
        hosted.start([command(hosted, "a"), command(hosted, "b", "--fail")], 600, 0)
    assert "that kibitz started (b)" in str(caught.value) and not hosted.folder.exists()


def test_nobody_else_can_reach_a_server(hosted, tmp_path):
    """No port, a folder for this user only, a key of its own that stands in no argument and in no log."""
    hosted.start([command(hosted, "a"), command(hosted, "b")], 600, 0)
    assert hosted.folder.stat().st_mode & 0o077 == 0
    keys = {one.key for one in hosted.processes}
    assert len(keys) == 2 and min(map(len, keys)) >= 32
    for one in hosted.processes:
        for pid in [one.keeper.pid, *pids_in(one.path)]:
            assert not any(key in Path(f"/proc/{pid}/cmdline").read_text() for key in keys)
        assert not any(key in one.path.read_text() for key in keys)


def test_which_vllm_is_started(tmp_path, monkeypatch):
    beside = tmp_path / "venv" / "bin"
    beside.mkdir(parents=True)
    for name in ("vllm", "python"):
        (beside / name).write_text("#!/some/where/python\n")
        (beside / name).chmod(0o755)
    asked = {"PATH": str(tmp_path)}
    with pytest.raises(ValueError, match="needs vLLM, and there is none.*KIBITZ_VLLM=.*rollout.engine=torch"):
        commands.program(asked)
    assert commands.program({"PATH": str(beside)})[0] == str(beside / "python")
    assert commands.program({**asked, "KIBITZ_VLLM": str(beside / "python")})[0] == str(beside / "python")
    (beside / "python").unlink()
    assert commands.program({**asked, "KIBITZ_VLLM": str(beside / "vllm")})[0] == "/some/where/python"
    with pytest.raises(ValueError, match="KIBITZ_VLLM: there is no program nowhere"):
        commands.program({**asked, "KIBITZ_VLLM": "nowhere"})


# ------------------------------------------------------------------ runs


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Where the programs that stand in for vLLM write what they were asked."""
    folder = tmp_path / "world"
    monkeypatch.setenv("KIBITZ_TEST_FOLDER", str(folder))
    monkeypatch.setenv("KIBITZ_VLLM", program(folder))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    return folder


def started(world: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (world / f"{name}.started").read_text().splitlines()]


@pytest.mark.slow
def test_a_recipe_without_an_address_starts_its_servers_and_ends_them(world, two_models, tmp_path):
    tree = recipe(
        *two_models, tmp_path / "run",
        teacher={"engine": "vllm"}, method={"support": "top_k", "top_k": 5, "top_k_of": "teacher"},
        rollout={"engine": "vllm"}, steps=2,
    )  # fmt: skip
    heard = []

    class Listening(kibitz.training.trainer.NullProgress):
        def phase(self, name: str) -> None:
            heard.append(name)

    run = kibitz.train(tree, progress=Listening())
    assert [row["step"] for row in run.metrics] == [1, 2]
    (student,), (teacher,) = started(world, "student-0"), started(world, "teacher")
    assert not any(map(alive, [*student["pids"], *teacher["pids"]]))
    assert (
        student["dev"] == "1"
        and "--served-model-name" in student["arguments"]
        and "--enable-scale-out" in teacher["arguments"]
    )
    assert any("student-0) is ready after" in text for text in heard) and any("starting the" in text for text in heard)
    assert {path.name for path in (tmp_path / "run" / "servers").iterdir()} == {"student-0.log", "teacher.log"}
    kept = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert student["key"].encode() not in kept and teacher["key"].encode() not in kept and b"unix:" not in kept


def test_without_vllm_nothing_begins(two_models, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("KIBITZ_VLLM", raising=False)
    with pytest.raises(ValueError, match="rollout.engine: vllm needs vLLM, and there is none"):
        kibitz.train(recipe(*two_models, tmp_path / "run", rollout={"engine": "vllm"}))
    assert not (tmp_path / "run").exists()


def test_a_server_without_memory_ends_the_run_in_one_sentence(world, two_models, tmp_path):
    (world / "fail-student-0").touch()
    with pytest.raises(ServerError, match="CUDA out of memory.*lower rollout.server.memory"):
        kibitz.train(recipe(*two_models, tmp_path / "run", rollout={"engine": "vllm"}))
    assert not any(map(alive, started(world, "student-0")[0]["pids"]))
