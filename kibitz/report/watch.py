"""`kibitz watch`: a local page that follows run folders while they grow.

    with serve([Path("runs/a"), Path("runs/b")], port=8770) as watch:
        print(watch.url)
        watch.server.serve_forever()

It reads files and nothing else: a run does not know of it, and it may begin and end at any moment. The page gets what is
new as server-sent events, and draws it with the report's own parts. Two addresses for one person need no web framework:
the server is the standard library's, one thread for each page that is open. It listens on the loopback only, and answers
nobody who does not know the token in its address, nor a page of another site that has the browser ask (by `Host`).
"""

import gzip
import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kibitz.report import page
from kibitz.report.curves import CHARTS, figure
from kibitz.report.formats import safe_lines
from kibitz.report.live import LINES, Followed, as_json, card, points
from kibitz.report.tail import Island, stamp

EVERY = 0.5
"""Seconds between two looks at the files."""
MAX_TOKENS = 24_000
"""Tokens of the heat-map that a page is sent, of all runs together: some 4 MB at each evaluation."""
MAX_PAGES = 12
LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@dataclass
class Seen:
    """What one open page has: of each run the version, and the rows of metrics and evals; the cards; the rollouts."""

    rows: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    cards: dict[int, bytes] = field(default_factory=dict)
    rollouts: Any = None


class Watched:
    """The runs that are watched. They are read when a page asks, at most every half second, whoever asks."""

    def __init__(self, folders: list[Path], price: float | None = None):
        self.runs = [Followed(folder) for folder in folders]
        names = [followed.run.name for followed in self.runs]
        for place, followed in enumerate(self.runs):
            if before := names[:place].count(names[place]):
                followed.run.name += f" ({before + 1})"
        self.price = price
        self.lock = threading.Lock()
        self.looked = 0.0
        self.island, self.island_of = "", None

    def news(self, seen: Seen) -> Iterator[tuple[str, str]]:
        """The events that bring a page up to date: their names and their data as JSON."""
        with self.lock:
            if time.monotonic() - self.looked >= EVERY / 2:
                for followed in self.runs:
                    followed.look()
                self.looked = time.monotonic()
            events = [*self._new_points(seen), *self._new_cards(seen), *self._new_rollouts(seen)]
        yield from events

    def _new_points(self, seen: Seen) -> Iterator[tuple[str, str]]:
        for index, followed in enumerate(self.runs):
            now = (followed.version, len(followed.run.metrics), len(followed.run.evals))
            before = seen.rows.get(index)
            if before == now:
                continue
            again = before is None or before[0] != now[0]
            lines = points(followed, (0, 0) if again or before is None else before[1:])
            seen.rows[index] = now
            yield "points", as_json({"run": index, "again": again, "lines": lines})

    def _new_cards(self, seen: Seen) -> Iterator[tuple[str, str]]:
        for index, followed in enumerate(self.runs):
            values = card(followed, self.price)
            html = page.render_part("watch_run.html.j2", run=values, index=index)
            digest = hashlib.blake2b(html.encode("utf-8", "replace")).digest()
            if seen.cards.get(index) != digest:
                seen.cards[index] = digest
                beat = values["pulse"]
                yield (
                    "card",
                    as_json(
                        {"run": index, "html": html, "state": beat.state, "share": beat.share, "name": values["name"]}
                        | {"alarms": len(values["alarms"]), "alarm": values["alarms"][0] if values["alarms"] else None}
                    ),
                )

    def _new_rollouts(self, seen: Seen) -> Iterator[tuple[str, str]]:
        now = [stamp(followed.folder / "rollouts.jsonl") for followed in self.runs]
        if now != self.island_of:
            island = Island(MAX_TOKENS // len(self.runs))
            for followed in self.runs:
                island.add(followed.run.name, followed.folder / "rollouts.jsonl")
            self.island, self.island_of = island.as_json(), now
        if seen.rollouts != now:
            seen.rollouts = now
            yield "rollouts", self.island

    def page(self) -> str:
        """The page before it has any numbers."""
        drawn = [
            {
                "key": chart.key,
                "title": chart.title,
                "unit": chart.unit,
                "note": chart.note,
                "lines": " ".join(
                    f"{'Dotted' if line.dash == 'dot' else 'Solid'}: {line.label}." for line in chart.lines
                )
                if len(chart.lines) > 1
                else "",
            }
            for chart in CHARTS
        ]
        names = [safe_lines(followed.run.name) for followed in self.runs]
        return page.render(
            "watch.html.j2",
            ["plotly", "page.js", "heatmap.js", "charts.js", "watch.js"],
            connect="'self'",
            names=names,
            curves=drawn,
            figures={chart.key: figure(chart, []) for chart in CHARTS},
            lines={
                key: {"label": safe_lines(line.label), "dash": line.dash, "dots": line.source == "evals"}
                for key, line in LINES.items()
            },
            heatmap=page.empty_heatmap(names),
        )


class Watch:
    """The server of one page. `url` holds the token without which it answers nothing."""

    def __init__(self, watched: Watched, port: int):
        token = secrets.token_urlsafe(16)
        self.ended = threading.Event()
        self.server = _Server(("127.0.0.1", port), _handler(watched, token, self.ended))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/{token}/"

    def close(self) -> None:
        """Leave the port, and end the streams of the pages that are open."""
        self.ended.set()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


@contextmanager
def serve(folders: list[Path], port: int = 0, price: float | None = None) -> Iterator[Watch]:
    """Open the port; `server.serve_forever()` of what is given answers until the block ends. OSError if it is taken."""
    watch = Watch(Watched(folders, price), port)
    try:
        yield watch
    finally:
        watch.close()


def _is_here(host: str) -> bool:
    """Whether a `Host` header names this machine, at whatever port."""
    try:
        return urlsplit(f"//{host}").hostname in LOOPBACK
    except ValueError:
        return False


def _handler(watched: Watched, token: str, ended: threading.Event) -> type[BaseHTTPRequestHandler]:
    pages = threading.BoundedSemaphore(MAX_PAGES)

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "kibitz", ""

        def do_GET(self) -> None:
            given, _, what = self.path.removeprefix("/").partition("/")
            if not _is_here(self.headers.get("Host") or "") or not hmac.compare_digest(given.encode(), token.encode()):
                self.send_error(404)
            elif what == "":
                self._page()
            elif what == "events" and pages.acquire(blocking=False):
                try:
                    self._events()
                except (BrokenPipeError, ConnectionError, TimeoutError):
                    pass  # the page was closed
                finally:
                    pages.release()
            else:
                self.send_error(503 if what == "events" else 404)

        def _head(self, kind: str, **more: str) -> None:
            self.send_response(200)
            for name, value in {
                "Content-Type": kind,
                "Cache-Control": "no-store",
                "Referrer-Policy": "no-referrer",
                "X-Content-Type-Options": "nosniff",
                "X-Frame-Options": "DENY",
                "Cross-Origin-Resource-Policy": "same-origin",
                **more,
            }.items():
                self.send_header(name, value)
            self.end_headers()

        def _page(self) -> None:
            body, more = watched.page().encode("utf-8", "replace"), {}
            if "gzip" in (self.headers.get("Accept-Encoding") or ""):
                body, more = gzip.compress(body, 3), {"Content-Encoding": "gzip"}
            self._head("text/html; charset=utf-8", **more, **{"Content-Length": str(len(body))})
            self.wfile.write(body)

        def _events(self) -> None:
            self._head("text/event-stream")
            self.wfile.write(b"retry: 1000\n\n")
            seen = Seen()
            while not ended.is_set():
                for name, data in watched.news(seen):
                    self.wfile.write(f"event: {name}\ndata: {data}\n\n".encode("utf-8", "replace"))
                self.wfile.write(b": still here\n\n")
                self.wfile.flush()
                ended.wait(EVERY)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: what a browser asks is no news."""

    return Handler
