"""A chat endpoint in a thread, which says what a test wants."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CHAT = "/v1/chat/completions"


def says(text: Any, reason: Any = "stop") -> dict[str, Any]:
    return {
        "model": "big",
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}],
    }


class Endpoint:
    """`answer(body)` is what comes back: a tree, or bytes as they are."""

    def __init__(self, answer: Callable[[dict[str, Any]], Any]):
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send({"data": [{"id": "big"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == CHAT
                endpoint.asked.append(body)
                endpoint.headers.append(dict(self.headers))
                self._send(answer(body))

            def _send(self, tree: Any) -> None:
                data = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Endpoint":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
