"""`kibitz serve`: the commands say what a recipe needs, hold no key, bind to this machine; processes end with the block."""

import json
import sys

import httpx
import pytest
from support.ports import held
from typer.testing import CliRunner

from kibitz import config
from kibitz.cli import app
from kibitz.servers import ServerError
from kibitz.servers.commands import MODULE, Command, commands
from kibitz.servers.processes import Hosted

SERVER = """
import http.server, sys
if "--fail" in sys.argv[1:]: sys.exit(3)
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Healthy).serve_forever()
"""


def tree(**sections):
    base = {
        "student": {"model": "org/student", "lora": {"rank": 20}},
        "teacher": {"url": "http://127.0.0.1:8001", "model": "org/teacher"},
        "data": {"world": "arithmetic", "max_prompt_tokens": 100},
        "method": {"type": "opd", "support": "top_k"},
        "rollout": {"engine": "vllm", "urls": ["http://localhost:8000"], "max_tokens": 50},
    }
    return {**base, **sections}


@pytest.fixture
def fake_python(tmp_path):
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} "{tmp_path / "server.py"}" "$@"\n')
    path.chmod(0o755)
    (tmp_path / "server.py").write_text(SERVER)
    return str(path)


def test_the_commands_say_what_the_recipe_needs():
    student, teacher = (one.line() for one in commands(config.load(tree()), cpu=False))
    for part in ("--host 127.0.0.1 --port 8000", "--max-model-len 151", "--enable-lora --max-lora-rank 32",
                 "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "vllm.entrypoints.openai.api_server"):  # fmt: skip
        assert part in student
    for part in ("--port 8001", "--enable-scale-out", "--max-logprobs 65", "VLLM_USE_V2_MODEL_RUNNER=1"):
        assert part in teacher
    whole = tree(student={"model": "m"}, rollout={"engine": "vllm", "urls": ["http://gpu7:1"], "temperature": 0.7})
    (line, cpu) = (commands(config.load(whole), cpu=cpu)[0].line() for cpu in (False, True))
    assert "VLLM_SERVER_DEV_MODE=1" in line and "processed_logprobs" in line and "--host gpu7 --port 1" in line
    assert "--dtype float32" in cpu and "--enforce-eager" in cpu
    with pytest.raises(ValueError, match="names no server"):
        commands(config.load(tree(rollout={}, teacher={"model": "t"})), cpu=True)


def test_no_server_that_a_port_leads_to_is_told_to_unpickle():
    """Whoever can reach such a server would run programs in it; one of the run's own has a socket in a private folder."""
    rollout = {"engine": "vllm", "urls": ["http://localhost:8000"], "server": {"sync": "ipc"}}
    with pytest.raises(ValueError, match="sync: ipc makes a server unpickle what it is sent"):
        commands(config.load(tree(student={"model": "m"}, rollout=rollout)), cpu=False)
    for sync in ("auto", "reload", "nccl"):
        asked = config.load(tree(student={"model": "m"}, rollout={**rollout, "server": {"sync": sync}}))
        assert "INSECURE" not in commands(asked, cpu=False)[0].line()


def test_a_printed_command_names_the_key_and_does_not_hold_it(tmp_path, monkeypatch):
    monkeypatch.setenv("KIBITZ_API_KEY", "sk-very-secret")
    path = tmp_path / "recipe.yaml"
    path.write_text(config.dump(config.load(tree())))
    for more in ([], ["--json"]):
        answer = CliRunner().invoke(app, ["serve", str(path), "--cpu", *more])
        assert answer.exit_code == 0 and "$KIBITZ_API_KEY" in answer.output and "sk-very-secret" not in answer.output


def test_a_server_that_others_can_reach_and_that_asks_for_no_key_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.delenv("KIBITZ_API_KEY", raising=False)
    hosts = dict.fromkeys(("10.0.0.5", "0.0.0.0", "gpu7", "[2001:db8::1]"), True)
    hosts |= dict.fromkeys(("127.0.0.1", "localhost", "127.0.0.2", "[::1]"), False)
    for host, warns in hosts.items():
        path = tmp_path / "recipe.yaml"
        rollout = {"engine": "vllm", "urls": [f"http://{host}:8000"], "max_tokens": 50}
        path.write_text(config.dump(config.load(tree(rollout=rollout))))
        for more in ([], ["--json"], ["--quiet"]):
            answer = CliRunner().invoke(app, ["serve", str(path), "--gpu", *more])
            assert answer.exit_code == 0
            said = f"the student at http://{host}:8000 can be reached from other machines and asks for no key"
            assert (said in answer.stderr) == warns and "the teacher at" not in answer.stderr
        monkeypatch.setenv("KIBITZ_API_KEY", "sk-very-secret")
        assert "warning" not in CliRunner().invoke(app, ["serve", str(path), "--gpu"]).stderr
        monkeypatch.delenv("KIBITZ_API_KEY")
    rows = json.loads(CliRunner().invoke(app, ["serve", str(path), "--gpu", "--json"]).stdout)["servers"]
    assert [row["warning"] for row in rows] == [None, None] and "--host ::1" in rows[0]["command"]


def test_servers_are_up_until_they_are_closed(tmp_path, fake_python):
    holder = held()
    port = holder.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    found = commands(config.load(tree(rollout={}, teacher={"url": url, "model": "t"})), cpu=True)
    hosted = Hosted([fake_python, "-m", MODULE], tmp_path / "logs")
    hosted.start(found, timeout=600, restarts=0)
    assert httpx.get(f"{url}/health", trust_env=False, timeout=300).status_code == 200
    hosted.close()
    assert (tmp_path / "logs" / f"teacher-{port}.log").is_file()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health", trust_env=False, timeout=300)
    holder.close()


def test_a_server_that_does_not_start_is_named(tmp_path, fake_python):
    holder = held()
    port = holder.getsockname()[1]
    failing = {"url": f"http://127.0.0.1:{port}", "model": "--fail"}
    found = commands(config.load(tree(rollout={}, teacher=failing)), cpu=True)
    with pytest.raises(
        ServerError, match=rf"the teacher that kibitz started \(teacher-{port}\) ended before it was ready"
    ):
        Hosted([fake_python], tmp_path / "logs").start(found, timeout=600, restarts=0)
    holder.close()
    with pytest.raises(ValueError, match="http://gpu7:8000 is not this machine"):
        Hosted([fake_python], tmp_path).start([Command("student", "http://gpu7:8000", ())], timeout=30, restarts=0)


def test_the_gpus_of_a_recipe_are_those_of_its_commands(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    urls = ["http://localhost:8000", "http://localhost:8002"]
    rollout = {"engine": "vllm", "urls": urls, "server": {"gpus": [0, 1]}}
    teacher = {"url": "http://127.0.0.1:8001", "model": "t", "gpus": [2, 3], "memory": 0.8}
    one, two, three = (
        command.line() for command in commands(config.load(tree(rollout=rollout, teacher=teacher)), cpu=False)
    )
    assert "CUDA_VISIBLE_DEVICES=4 " in one and "CUDA_VISIBLE_DEVICES=5 " in two and "tensor-parallel" not in one + two
    assert "CUDA_VISIBLE_DEVICES=6,7 " in three and "--tensor-parallel-size 2 --gpu-memory-utilization 0.8" in three
    with pytest.raises(ValueError, match="3 GPUs for 2 servers: write a multiple"):
        commands(config.load(tree(rollout={**rollout, "server": {"gpus": [0, 1, 2]}})), cpu=False)
    with pytest.raises(ValueError, match="http://localhost:8002 and http://127.0.0.1:8001 are both on GPU 5"):
        commands(config.load(tree(rollout=rollout, teacher={**teacher, "gpus": [1]})), cpu=False)
