"""lm-evaluation-harness on a tiny random model, by a task file in its own format."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from support.models import language_model, make_model
from typer.testing import CliRunner

from kibitz.cli import app
from kibitz.data import encode_prompt
from kibitz.engines.torch import TorchEngine
from kibitz.types import Prompt, Sampling

TASK = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
QUESTIONS = ["1+2", "3*4", "5-2", "7+7", "9*2", "8-5"]


def says(*line):
    answer = CliRunner().invoke(app, ["--json", *map(str, line)])
    return answer.exit_code, answer.stdout, answer.stderr


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A model, and a task whose answers are what the model says of the first four questions, and wrong of the last two."""
    home = tmp_path_factory.mktemp("harness")
    model = language_model(make_model(home / "model", seed=3))
    prompts = []
    for question in QUESTIONS:
        ids = encode_prompt(model.tokenizer, [{"role": "user", "content": question}], {})
        prompts.append(Prompt(tuple(ids), question, question))
    stops = (model.tokenizer.eos_token_id,)
    rollouts = TorchEngine(model).generate(prompts, Sampling(max_tokens=6, temperature=0.0, stop_ids=stops))
    answers = [model.tokenizer.decode(r.response_ids, skip_special_tokens=True) for r in rollouts]
    rows = [
        {"question": q, "answer": a if i < 4 else a + "9"}
        for i, (q, a) in enumerate(zip(QUESTIONS, answers, strict=True))
    ]
    (home / "tasks").mkdir()
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "tasks" / "sums.yaml").write_text(TASK.format(rows=home / "rows.jsonl"))
    return home


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness
def test_a_task_file_measures_a_folder(task):
    pytest.importorskip("lm_eval")
    code, out, error = says("eval", task / "model", "--tasks", "sums", "--task-folder", task / "tasks")
    assert code == 0, error
    assert json.loads(out)["tasks"]["sums"]["exact_match,none"] == pytest.approx(4 / 6)
    code, out, error = says(
        "eval", task / "model", "--tasks", "sums", "--task-folder", task / "tasks", "eval.num_prompts=3"
    )
    assert json.loads(out)["tasks"]["sums"]["exact_match,none"] == 1.0
    code, _, error = says("eval", task / "model", "--tasks", "gsm9k", "--task-folder", task / "tasks")
    assert code == 2 and "knows no task gsm9k" in error


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_task_file_measures_a_server(task):
    """A server that speaks the completions protocol and answers 1 to everything; it sees token ids and the model's name."""
    pytest.importorskip("lm_eval")
    seen = []

    class Completions(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(asked)
            choices = [{"index": 0, "text": "1", "finish_reason": "stop"}]
            body = json.dumps({"choices": choices, "model": asked["model"]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Completions)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        code, out, error = says(
            "eval", task / "model", "--tasks", "sums", "--url", url, "--task-folder", task / "tasks"
        )
    finally:
        server.shutdown()
        server.server_close()
    assert code == 0, error
    expected = [json.loads(line)["answer"] == "1" for line in (task / "rows.jsonl").read_text().splitlines()]
    assert json.loads(out)["tasks"]["sums"]["exact_match,none"] == pytest.approx(sum(expected) / 6)
    assert len(seen) == 6 and all(asked["model"] == str(task / "model") for asked in seen)
    assert all(isinstance(asked["prompt"][0], int | list) for asked in seen)


def test_what_does_not_go_together_is_refused(tmp_path, monkeypatch):
    model = make_model(tmp_path)
    assert "leave out --world" in says("eval", model, "--tasks", "gsm8k", "--world", "arithmetic")[2]
    assert "go with it" in says("eval", model, "--world", "arithmetic", "--url", "http://127.0.0.1:1")[2]
    assert "leave out optim.lr" in says("eval", model, "--tasks", "gsm8k", "optim.lr=1")[2]
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    code, _, error = says("eval", model, "--tasks", "gsm8k")
    assert code == 2 and "pip install 'kibitz[evals]'" in error
