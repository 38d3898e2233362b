"""The model card of an exported checkpoint, and its way to a hub that is a stub."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from support.paths import FIXTURES, ROOT, script
from support.runs import recipe
from typer.testing import CliRunner

import kibitz
from kibitz.cli import app
from kibitz.models.hub import push
from kibitz.report.card import model_card

synthetic = script(FIXTURES / "report_run" / "synthetic.py")
EVIL = "</script>`|](x)\n# <img src=x onerror=alert(1)>```"


@pytest.fixture
def folder(tmp_path) -> Path:
    return synthetic.write_run(tmp_path / "arithmetic-opd", num_prompts=2)


def front(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def test_the_card_says_what_was_done_with_what_and_how_well(folder):
    card = model_card(folder)
    assert front(card)["tags"] == ["kibitz", "distillation", "opd"]
    assert "license" not in front(card)
    assert "states no licence" in card
    assert re.search(r"\| Accuracy, sampled at T = 1 \| \d\d\.\d% \[\d\d\.\d–\d\d\.\d%\] \| \d\d\.\d% \[", card)
    assert "256 held-out prompts of the split dev" in card
    assert "| teacher | `checkpoints/arithmetic/teacher` |" in card
    assert "256 GFLOP" in card
    assert "wrote its own responses to problems from the world `arithmetic`" in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])["steps"] == 40


def test_an_earlier_checkpoint_has_the_numbers_of_its_step(folder):
    card = model_card(folder, 20)
    assert "checkpoint of step 20" in card
    assert "| step 0 | step 20 |" in card
    assert "128 GFLOP" in card


def test_a_base_model_of_a_hub_is_named(folder):
    text = (folder / "recipe.yaml").read_text().replace("checkpoints/arithmetic/student", "owner/base")
    (folder / "recipe.yaml").write_text(text)
    assert front(model_card(folder))["base_model"] == "owner/base"


def test_names_stay_names(folder, tmp_path):
    tree = {
        "student": {"model": EVIL},
        "teacher": {"model": EVIL},
        "data": {"prompts": EVIL},
        "method": {"type": EVIL},
        "seed": EVIL,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    (folder / "run.json").write_text(json.dumps({"version": EVIL, "device": EVIL}))
    shutil.move(folder, tmp_path / "<img src=x>`#")
    card = model_card(tmp_path / "<img src=x>`#")
    *outside, last = re.split(r"^`{3,}\w*$", card, flags=re.MULTILINE)
    assert last.strip() == ""
    text = re.sub(r"`[^`\n]*`", "", outside[0].split("---", 2)[2])
    assert not re.search(r"(?<!\\)<", text)
    assert not re.search(r"^# .*onerror", text, flags=re.MULTILINE)
    assert isinstance(front(card), dict)


def test_an_empty_run_still_has_a_card(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    card = model_card(tmp_path)
    assert "Nothing was evaluated" in card
    assert "states no licence" in card


# ------------------------------------------------------------------ export


@pytest.fixture(scope="module")
def run(models, tmp_path_factory) -> kibitz.Run:
    tree = recipe(*models, tmp_path_factory.mktemp("export") / "run", steps=2)
    return kibitz.train(tree)


def test_export_writes_the_card_of_its_run(run, tmp_path):
    answer = CliRunner().invoke(app, ["export", str(run.folder), "--output", str(tmp_path / "out")])
    assert answer.exit_code == 0, answer.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert "checkpoint of step 2" in card
    assert not (tmp_path / "out" / "training").exists()
    CliRunner().invoke(app, ["export", str(run.checkpoint), "--output", str(tmp_path / "same")])
    assert (tmp_path / "same" / "README.md").read_text() == card


def test_a_model_without_a_run_keeps_its_own_card(models, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(models[0], source)
    (source / "README.md").write_text("mine")
    CliRunner().invoke(app, ["export", str(source), "--output", str(tmp_path / "out")])
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


@pytest.fixture
def hub():
    """What a hub answers to an upload of small files, and what it was sent."""
    sent: list[tuple[str, dict, object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = [json.loads(line) for line in data.decode().splitlines() if line.strip()]
            sent.append((self.path, dict(self.headers), body))
            if self.path.endswith("/repos/create"):
                self._answer(
                    {"url": f"http://{self.headers['Host']}/{body[0].get('organization', 'me')}/{body[0]['name']}"}
                )
            elif "/preupload/" in self.path:
                files = [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in body[0]["files"]
                ]
                self._answer({"files": files})
            else:
                self._answer(
                    {
                        "success": True,
                        "commitUrl": f"http://{self.headers['Host']}/me/my-model/commit/1",
                        "commitOid": "1" * 40,
                    }
                )

        def _answer(self, tree: dict) -> None:
            data = json.dumps(tree).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", sent
    server.shutdown()
    server.server_close()


PUSH = "import sys; from pathlib import Path; from kibitz.models.hub import push; print(push(Path(sys.argv[1]), sys.argv[2]))"


def pushed(folder: Path, name: str, endpoint: str) -> subprocess.CompletedProcess:
    """In a process of its own, because the hub's library reads its address once."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret"}
    return subprocess.run(
        [sys.executable, "-c", PUSH, str(folder), name],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_push_makes_a_private_model_and_sends_every_file(hub, tmp_path):
    endpoint, sent = hub
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "config.json").write_text("{}")
    answer = pushed(tmp_path, "me/my-model", endpoint)
    assert answer.returncode == 0, answer.stderr
    paths = [path for path, _, _ in sent]
    assert paths[0].endswith("/api/repos/create")
    created = sent[0][2][0]
    assert created["name"].endswith("my-model")
    assert created.get("private", created.get("visibility") == "private")
    assert all(
        headers["authorization" if "authorization" in headers else "Authorization"] == "Bearer hf_secret"
        for _, headers, _ in sent
    )
    files = {line["value"]["path"] for line in sent[-1][2] if line["key"] == "file"}
    assert {"README.md", "config.json"} <= files
    assert "my-model" in answer.stdout


def test_a_push_that_cannot_be_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="--push model: .* write OWNER/NAME"):
        push(tmp_path, "model")
    with pytest.raises(ValueError, match="--push: HF_HUB_OFFLINE is set"):  # as for all tests
        push(tmp_path, "me/model")
