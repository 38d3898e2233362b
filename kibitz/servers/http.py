"""Requests to one server or to several alike: what its answers mean, retries, waiting for one that is down."""

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, as_completed
from typing import Any

import httpx

from kibitz.config.servers import ServerConfig
from kibitz.servers import ServerError, own
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
    """A fault that may be gone at the next attempt. `reached`: the server itself answered. `slow`: it was there, and did not
    answer in time; of servers of this program, which were started one after another, that of this number."""

    def __init__(self, text: str, reached: bool, slow: int = 0):
        super().__init__(text)
        self.reached, self.slow = reached, slow


class Server:
    """One address. `lost` counts the times that it could not be reached: what it held may be gone with it."""

    def __init__(self, url: str, role: str, timeout: float):
        self.url, self.role, self.timeout, self.own = url.rstrip("/"), role, timeout, own.of(url)
        self._connection = Connection(self.url, timeout, api_key(url))
        self.lost, self.received = 0, 0  # times, and bytes of answers
        self.down_until = 0.0
        self._pause = FIRST_PAUSE
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return f"the {self.role} at {self.url}" if self.own is None else self.own.name

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
        asked = 1 if self.own is None else self.own.number
        try:
            answer = self._connection.fetch(path, body)
        except (httpx.TimeoutException, TimeoutError) as error:
            self._refuse_ended()
            lacks = (
                "connection" if isinstance(error, httpx.ConnectTimeout) else f"whole answer within {self.timeout:g} s"
            )
            raise Passing(f"{self.name} did not answer in time (no {lacks})", reached=False, slow=asked) from None
        except TooLong as error:
            raise ServerError(f"{self.name} sent an answer to {path} that is {error}") from None
        except Closed:
            raise ServerError(f"{self.name} is not asked any more") from None
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            self._refuse_ended()
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
        with self._lock:
            self.received += len(answer.data)
        return answer

    def _refuse_ended(self) -> None:
        if self.own is not None and self.own.ended is not None:
            raise Ended(self.own.ended)

    @property
    def gone(self) -> bool:
        """Whether nobody will start it again."""
        return self.own is not None and self.own.ended is not None

    def failed(self, error: Passing) -> None:
        """Ask others for a while; for as long as a request may take, if this one kept a request waiting that long. One of this
        program's own is replaced then."""
        with self._lock:
            self.lost += not error.reached
            self.down_until = time.monotonic() + max(self._pause, self.timeout if error.slow else 0.0)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if error.slow and self.own is not None:
            self.own.replace(str(error), error.slow)

    def worked(self) -> None:
        with self._lock:
            self.down_until, self._pause = 0.0, FIRST_PAUSE

    def take_received(self) -> int:
        with self._lock:
            size, self.received = self.received, 0
        return size

    def close(self) -> None:
        """Give back the connections; requests under way end with a ServerError."""
        self._connection.close()


class Refused(ServerError):
    """The server will not do it, now or later; `status` is that of HTTP."""

    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.status = status

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        """For the other processes of a run, which raise it as well."""
        return Refused, (str(self), self.status)


class Ended(ServerError):
    """A server of this program that is not started again."""


class Broken(ServerError):
    """The answer arrived in pieces; the next one may be whole."""


class NoneUsable(Exception):
    """None of the servers that may be asked is left."""


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

    def submit_among(self, usable: Callable[[Server], bool], work: Callable[[Server], Any]) -> Future:
        """The same by servers that are `usable`, while there is one; None without any. None of them is made ready."""

        def choose() -> Server:
            return self._choose(usable)

        def job() -> Any:
            try:
                return self._persist(work, choose)
            except NoneUsable:
                return None

        return self._workers.submit(job)

    def each(self, work: Callable[[Server], Any]) -> list[Any]:
        """`work` on every server, on all at the same time; the results in order."""
        return self.gather(
            [self._workers.submit(lambda one=one: self._persist(work, lambda: one)) for one in self.servers]
        )

    def reach(self, work: Callable[[Server], Any]) -> None:
        """`work` on every server that is up, on all at the same time. While none is, wait for one. Those that are down must be
        looked after when they are back: `ready` runs before the next request to them."""
        jobs = [self._workers.submit(lambda one=one: self._once(work, one)) for one in self.servers if not one.gone]
        if not any(self.gather(jobs)):
            self._persist(work, self._choose)

    def _once(self, work: Callable[[Server], Any], server: Server) -> bool:
        """Whether one attempt went well."""
        try:
            work(server)
        except Passing as error:
            server.failed(error)
            self._note(f"{error}; it gets what is new when it is back", server)
            return False
        except Ended:
            return False
        self._worked(server)
        return True

    def gather(self, futures: Sequence[Future]) -> list[Any]:
        """All results, in order. One mistake, or Ctrl-C, ends the others: nobody asks these servers again."""
        try:
            for done in as_completed(futures):
                done.result()
            return [future.result() for future in futures]
        except CancelledError:
            raise ServerError(f"{self.servers[0].name} is not asked any more, because of another mistake") from None
        except BaseException:
            self.close()
            raise

    def take_received(self) -> int:
        """The bytes of all answers since the last call."""
        return sum(server.take_received() for server in self.servers)

    def close(self) -> None:
        self._stopped.set()
        self._workers.close()
        for server in self.servers:
            server.close()

    def _choose(self, usable: Callable[[Server], bool] = lambda server: True) -> Server:
        """The next one that is up; else the one that may be back soonest. NoneUsable without any."""
        with self._lock:
            order = self.servers[self._next :] + self.servers[: self._next]
            self._next = (self._next + 1) % len(self.servers)
        order, now = [one for one in order if usable(one)], time.monotonic()
        if not order:
            raise NoneUsable
        return min(order, key=lambda one: (one.gone, max(one.down_until, now)))

    def _persist(
        self,
        work: Callable[[Server], Any],
        choose: Callable[[], Server],
        ready: Callable[[Server], None] = lambda server: None,
    ) -> Any:
        since, num_broken = math.inf, 0  # the first failure's time; answers that broke off
        while True:
            server = choose()
            if self._stopped.wait(min(LONGEST_PAUSE, max(0.0, server.down_until - time.monotonic()))):
                raise ServerError(f"{server.name} is not asked any more")
            try:
                ready(server)
                result = work(server)
            except Passing as error:
                since = min(since, time.monotonic())
                self._failed(server, error, since)
            except Ended as error:
                if all(one.gone for one in self.servers) or choose() is server:
                    raise
                self._note(f"{error} The others go on without it.", server)
            except Broken as error:
                num_broken += 1
                if num_broken == BROKEN_ANSWERS:
                    raise ServerError(f"{error}, {num_broken} times in a row") from None
            else:
                self._worked(server)
                return result

    def _failed(self, server: Server, error: Passing, since: float) -> None:
        server.failed(error)
        patience = self.config.patience
        if time.monotonic() - since >= patience or self._stopped.is_set():
            raise ServerError(
                f"{error}, for {patience:g} seconds: start it again and continue with --resume, or write a longer patience"
            ) from None
        others = any(one is not server and one not in self._down for one in self.servers)
        self._note(
            f"{error}; {'others do its work' if others else 'waiting for it'}, up to {patience:g} seconds", server
        )

    def _note(self, text: str, server: Server) -> None:
        """Say once that a server is down."""
        with self._lock:
            news = server not in self._down
            self._down.add(server)
        if news:
            log.warning("%s", text)

    def _worked(self, server: Server) -> None:
        server.worked()
        with self._lock:
            news = server in self._down
            self._down.discard(server)
        if news:
            log.warning("%s is back", server.name)
