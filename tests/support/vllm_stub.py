"""A model server in a thread that speaks as vLLM 0.32 does, with a real tiny model behind it; tests bend its answers.

What it says was compared with the real one by tests/test_vllm.py, which runs the same checks against both.
"""

import base64
import io
import json
import socket
import socketserver
import threading
import weakref
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file
from support.ports import held

from kibitz.config import ModelConfig
from kibitz.engines.torch import TorchEngine
from kibitz.models.load import load_model
from kibitz.types import Prompt, Rollout, Sampling

Bend = Callable[[str, Any], Any]
"""(path, answer) -> the answer that is sent: a tree, or bytes as they are, or `(status, tree)`; None closes the connection."""


class Stub:
    """`with Stub(folder) as stub:` serves the model of a folder at `stub.url`. `asked` keeps every request's path, headers
    and body; `generous` is whether per-position scoring is there (a GPU's V2 runner); `path` is a socket to listen at instead
    of a port."""

    def __init__(
        self,
        folder: Path,
        name: str = "stub",
        bend: Bend | None = None,
        generous: bool = True,
        port: int = 0,
        path: str | None = None,
    ):
        self.model = load_model(ModelConfig(model=str(folder)), "stub", torch.device("cpu"))
        self.name, self.bend, self.generous = name, bend or (lambda path, answer: answer), generous
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.loads = True  # whether new weights are really taken
        self.key: str | None = None  # that a request must bring
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body: Any) -> None:
                path = self.path.split("?")[0]
                stub.asked.append((path, dict(self.headers), body))
                knows = stub.key is None or self.headers.get("Authorization") == f"Bearer {stub.key}"
                answer = stub.bend(path, stub.answer(path, body)) if knows else (401, {"error": "Unauthorized"})
                status, answer = answer if isinstance(answer, tuple) else (200, answer)
                if answer is None:
                    self.close_connection = True
                    self.connection.close()
                    return
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None: ...

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: object) -> None: ...

        class AtSocket(Quiet):
            address_family = socket.AF_UNIX
            server_bind = socketserver.TCPServer.server_bind  # HTTPServer's wants a host and a port

        holder = held(port)
        weakref.finalize(self, holder.close)  # until then another stub, and nobody else, may listen there
        self.port = holder.getsockname()[1] if path is None else 0
        self.server = Quiet(("127.0.0.1", self.port), Handler) if path is None else AtSocket(path, Handler)  # pyright: ignore
        self.url = f"http://127.0.0.1:{self.port}" if path is None else f"unix:{path}"

    def __enter__(self) -> "Stub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: Any) -> Any:
        with self._lock:
            match path:
                case "/v1/models":
                    return {"data": [{"id": self.name, "parent": None, "max_model_len": 128}]}
                case "/sleep" | "/wake_up":
                    return {}
                case "/health" | "/version":
                    return {"version": "0.33.0"}
                case "/tokenize":
                    return {"tokens": self.model.tokenizer.encode(body["prompt"], add_special_tokens=False)}
                case "/collective_rpc":
                    return self._reload(body["kwargs"]["weights_path"])
                case "/v1/chat/completions":
                    return self._chat(body)
                case "/v1/completions":
                    return self._complete(body)
                case "/inference/v1/generate":
                    return self._generate(body)
        return 404, {"error": {"message": f"nothing at {path}"}}

    def _reload(self, path: str) -> Any:
        if self.loads:
            for file in Path(path).glob("*.safetensors"):
                self.model.model.load_state_dict(load_file(file), strict=False)
        return {"results": [None]}

    def _write(self, ids: list[int], body: dict[str, Any], stop: list[int]) -> list[Rollout]:
        sampling = Sampling(
            max_tokens=body.get("max_tokens", 8),
            temperature=body.get("temperature", 1.0),
            top_k=body.get("top_k", 0),
            num_samples=body.get("n", 1),
            stop_ids=tuple(stop),
        )
        prompt = Prompt(ids=tuple(ids), text="", key=str(body.get("seed")))
        return TorchEngine(self.model).generate([prompt], sampling)

    def _complete(self, body: dict[str, Any]) -> Any:
        if body["model"] != self.name:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        choices = [
            {
                "index": rollout.sample,
                "text": "",
                "token_ids": rollout.response_ids,
                "logprobs": {"token_logprobs": rollout.logp_T.tolist()},
                "finish_reason": "stop" if rollout.finished else "length",
                "prompt_logprobs": None,
            }
            for rollout in self._write(body["prompt"], body, body.get("stop_token_ids", []))
        ]
        if body.get("prompt_logprobs") is not None:
            choices[0]["prompt_logprobs"] = self._prompt_logprobs(body["prompt"], body["prompt_logprobs"])
        return {"model": self.name, "choices": choices}

    def _generate(self, body: dict[str, Any]) -> Any:
        params, ids = body["sampling_params"], body["token_ids"]
        if body["model"] != self.name:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        answer: dict[str, Any] = {"model": self.name, "choices": [{"index": 0, "token_ids": [0]}]}
        answer |= {"prompt_logprobs": None, "prompt_token_id_logprobs": None}
        if params.get("prompt_logprobs") is not None:
            answer["prompt_logprobs"] = self._prompt_logprobs(ids, params["prompt_logprobs"])
        if (rows := params.get("prompt_logprob_token_ids")) is not None:
            if not self.generous:
                message = "prompt_logprob_token_ids requires the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1)."
                return 400, {"error": {"message": message}}
            start = params.get("prompt_logprob_start", 0)
            picked = self.logps(ids)[start : start + len(rows)].gather(-1, torch.tensor(rows))
            buffer = io.BytesIO()
            numpy.save(buffer, picked.numpy())
            answer["prompt_token_id_logprobs"] = base64.b64encode(buffer.getvalue()).decode()
        return answer

    @torch.no_grad()
    def logps(self, ids: list[int]) -> torch.Tensor:
        """log p of every token after each position, `[L, V]`."""
        return self.model.model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)

    def _prompt_logprobs(self, ids: list[int], top_k: int) -> list[Any]:
        rows: list[Any] = [None]
        for logp_V, token in zip(self.logps(ids)[:-1], ids[1:], strict=True):
            own, best = logp_V[token], logp_V.topk(min(top_k, len(logp_V)))
            ranked = {token: (own.item(), int((logp_V >= own).sum()))}
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ranked |= {i: (logp, rank) for rank, (i, logp) in enumerate(pairs, 1)}
            rows.append(
                {str(i): {"logprob": logp, "rank": rank, "decoded_token": None} for i, (logp, rank) in ranked.items()}
            )
        return rows

    def _chat(self, body: dict[str, Any]) -> Any:
        text = self.model.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, tokenize=False)
        ids = self.model.tokenizer.encode(text, add_special_tokens=False)
        end = [self.model.tokenizer.eos_token_id]
        choices = [
            {
                "index": rollout.sample,
                "message": {
                    "role": "assistant",
                    "content": self.model.tokenizer.decode(rollout.response_ids, skip_special_tokens=True),
                },
                "finish_reason": "stop" if rollout.finished else "length",
            }
            for rollout in self._write(ids, body, end)
        ]
        return {"model": self.name, "choices": choices}
