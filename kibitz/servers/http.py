"""Requests to one server or to several alike: what its answers mean, retries, waiting for one that is down."""

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from typing import Any

import httpx

from kibitz.config.servers import ServerConfig
from kibitz.servers import ServerError
from kibitz.servers.connection import Closed, Connection, Fetched, TooLong
from kibitz.servers.keys import api_key, shown
from kibitz.servers.workers import Workers

log = logging.getLogger(__name__)

PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which the same request may succeed. An engine that died answers 500 until somebody starts it again."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 5.0  # seconds between two attempts, doubled each time
BROKEN_ANSWERS = 3
"""Answers cut off in the middle that are asked for again, before it is no accident any more."""


class Passing(Exception):
    """A fault that may be gone at the next attempt; `reached` is whether the server itself answered."""

    def __init__(self, text: str, reached: bool):
        super().__init__(text)
        self.reached = reached


class Server:
    """One address. `lost` counts the times that it could not be reached: what it held may be gone with it."""

    def __init__(self, url: str, role: str, timeout: float):
        self.url, self.role, self.timeout = url.rstrip("/"), role, timeout
        self._connection = Connection(self.url, timeout, api_key(url))
        self.lost = 0
        self.down_until = 0.0
        self._pause = FIRST_PAUSE
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return f"the {self.role} at {self.url}"

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """One attempt: POST of a body, else GET; the JSON of the answer.

        Passing for what may be over at the next attempt, ServerError for a refusal."""
        data = self._send(path, body).data
        try:
            return json.loads(data, object_pairs_hook=_object)
        except (ValueError, RecursionError):
            raise Broken(
                f"{self.name} sent an answer that is not JSON, or that breaks off: {shown(_text(data), 80)!r}"
            ) from None

    def order(self, path: str, body: dict[str, Any] | None = None) -> None:
        """The same for a request of which only the success matters."""
        self._send(path, body)

    def _send(self, path: str, body: dict[str, Any] | None) -> Fetched:
        try:
            answer = self._connection.fetch(path, body)
        except (httpx.TimeoutException, TimeoutError) as error:
            lacks = (
                "connection" if isinstance(error, httpx.ConnectTimeout) else f"whole answer within {self.timeout:g} s"
            )
            raise Passing(f"{self.name} did not answer in time (no {lacks})", reached=False) from None
        except TooLong as error:
            raise ServerError(f"{self.name} sent an answer to {path} that is {error}") from None
        except Closed:
            raise ServerError(f"{self.name} is not asked any more") from None
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            raise Passing(f"{self.name} cannot be reached ({shown(_why(error))})", reached=False) from None
        if answer.status in PASSING:
            raise Passing(f"{self.name} answered {answer.status}: {_message(answer)}", answer.status < 500)
        if 300 <= answer.status < 400:
            raise Refused(
                f"{self.name} sends {path} on to another address, where neither key nor text goes: write the server's own",
                answer.status,
            )
        if answer.status >= 300:
            raise Refused(f"{self.name} refused {path}: {_message(answer)}", answer.status)
        return answer

    def failed(self, lost: bool) -> None:
        with self._lock:
            self.lost += lost
            self.down_until = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def worked(self) -> None:
        with self._lock:
            self.down_until, self._pause = 0.0, FIRST_PAUSE

    def close(self) -> None:
        """Give back the connections; requests under way end with a ServerError."""
        self._connection.close()


class Refused(ServerError):
    """The server will not do it, now or later; `status` is that of HTTP."""

    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.status = status


class Broken(ServerError):
    """The answer arrived in pieces; the next one may be whole."""


def _why(error: BaseException) -> str:
    """Return the message of the first error in a chain, which is the system's, or the kind of the last."""
    first: BaseException = error
    while (before := first.__cause__ or first.__context__) is not None:
        first = before
    return str(first) or str(error) or type(error).__name__


def _message(answer: Fetched) -> str:
    """The sentence in an error's JSON, or the beginning of whatever it is."""
    try:
        tree = json.loads(answer.data)
    except (ValueError, RecursionError):
        return shown(_text(answer.data) or answer.reason)
    for key in ("error", "message", "detail"):
        if isinstance(tree, dict) and key in tree:
            tree = tree[key]
    try:
        return shown(str(tree))
    except RecursionError:  # nested almost too deep to be read
        return shown(answer.reason)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raise ValueError if a name occurs twice: nobody knows which value is meant."""
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("one name twice in an object")
    return tree


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


class Servers:
    """Some servers that serve the same model: requests go round, away from those that are down.

    A request that fails is tried again, elsewhere if there is another, until `patience` seconds have passed since its
    first failure; while all are down, requests wait for them. `ready(server)` runs before a request to it, for what
    it must hold. The log says when a server goes down and when it is back."""

    def __init__(
        self, config: ServerConfig, urls: Sequence[str], role: str, ready: Callable[[Server], None] | None = None
    ):
        self.config, self.servers = config, [Server(url, role, config.timeout) for url in urls]
        self._ready = ready or (lambda server: None)
        self._next, self._lock, self._down = 0, threading.Lock(), set()
        self._stopped = threading.Event()
        self._workers = Workers(config.in_flight * len(self.servers), f"kibitz-{role}")

    def submit(self, work: Callable[[Server], Any]) -> Future:
        """`work(server)` in a thread, repeated as long as it fails in a way that passes."""
        return self._workers.submit(lambda: self._persist(work, self._choose, self._ready))

    def each(self, work: Callable[[Server], Any]) -> list[Any]:
        """`work` on every server, in order."""
        return [self._persist(work, lambda one=server: one, lambda _: None) for server in self.servers]

    def gather(self, futures: Sequence[Future]) -> list[Any]:
        """All results, in order. One mistake, or Ctrl-C, ends the others: nobody asks these servers again."""
        try:
            for done in as_completed(futures):
                done.result()
            return [future.result() for future in futures]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._stopped.set()
        self._workers.close()
        for server in self.servers:
            server.close()

    def _choose(self) -> Server:
        """The next one that is up; else the one that may be back soonest."""
        with self._lock:
            order = self.servers[self._next :] + self.servers[: self._next]
            self._next = (self._next + 1) % len(self.servers)
        now = time.monotonic()
        return min(order, key=lambda one: max(one.down_until, now))

    def _persist(
        self, work: Callable[[Server], Any], choose: Callable[[], Server], ready: Callable[[Server], None]
    ) -> Any:
        since, num_broken = math.inf, 0  # the first failure's time; answers that broke off
        while True:
            server = choose()
            if self._stopped.wait(max(0.0, server.down_until - time.monotonic())):
                raise ServerError(f"{server.name} is not asked any more")
            try:
                ready(server)
                result = work(server)
            except Passing as error:
                since = min(since, time.monotonic())
                self._failed(server, error, since)
            except Broken as error:
                num_broken += 1
                if num_broken == BROKEN_ANSWERS:
                    raise ServerError(f"{error}, {num_broken} times in a row") from None
            else:
                self._worked(server)
                return result

    def _failed(self, server: Server, error: Passing, since: float) -> None:
        server.failed(lost=not error.reached)
        patience = self.config.patience
        if time.monotonic() - since >= patience or self._stopped.is_set():
            raise ServerError(
                f"{error}, for {patience:g} seconds: start it again and continue with --resume, or write a longer patience"
            ) from None
        with self._lock:
            news = server not in self._down
            self._down.add(server)
        if news:
            log.warning("%s; waiting for it, up to %g seconds", error, patience)

    def _worked(self, server: Server) -> None:
        server.worked()
        with self._lock:
            news = server in self._down
            self._down.discard(server)
        if news:
            log.warning("%s is back", server.name)
