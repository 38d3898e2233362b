"""One request over HTTP, bounded in bytes and in time, whatever the other end does.

A limit of time for each read is none: a byte now and then keeps any read alive, be it of a head, of a body or of a chunk's
length. So requests run in an event loop, in a thread of their own, where one deadline ends a request wherever it stands.
Bodies are read as they are sent. A compressed one is refused, because a few bytes of it may stand for gigabytes.
"""

import asyncio
import ipaddress
import json
import threading
from concurrent.futures import CancelledError
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any
from urllib.parse import urlsplit

import httpx

from kibitz.servers import own

LEAST = 4 * 2**20
"""Bytes of an answer to any question: a list of models, an error, a text."""
ERROR = 2**16  # bytes that are read of an error
WRITTEN, SCORED, NAMED, READ = 1024, 256, 16, 32
"""Bytes for a written token with its log-probability and text, for one log-probability by name, for one in an .npy array,
and for a token of the prompt that the answer repeats: two to four times what vLLM sends at the most."""
APART = 0.002  # seconds between two new connections


class Closed(Exception):
    """The connection was closed before the request, or under it."""


class TooLong(Exception):
    """An answer with more bytes than such an answer can have, or one that is compressed."""


@dataclass(frozen=True)
class Fetched:
    status: int
    reason: str
    data: bytes


def is_loopback(host: str) -> bool:
    """Return whether the host name is reachable from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def most_bytes(body: dict[str, Any] | None) -> int:
    """The most that an answer to a request may have, by what the request asks for."""
    if body is None:
        return LEAST
    asked = {**body, **(body.get("sampling_params") or {})}
    ids = asked.get("token_ids") or asked.get("prompt") or ()
    num_read, num_written = len(ids), asked.get("n", 1) * asked.get("max_tokens", 0)
    scored = 0 if asked.get("prompt_logprobs") is None else num_read * (asked["prompt_logprobs"] + 1)
    named = sum(len(row) for row in asked.get("prompt_logprob_token_ids") or ())
    return LEAST + WRITTEN * num_written + SCORED * scored + NAMED * named + READ * num_read


class Connection:
    """The connections to one address, and the thread that they live in."""

    def __init__(self, url: str, timeout: float, key: str | None):
        self._timeout = timeout
        path = own.socket_of(url)
        self._client = httpx.AsyncClient(
            base_url=url if path is None else "http://localhost",
            transport=None
            if path is None
            else httpx.AsyncHTTPTransport(uds=path, limits=httpx.Limits(max_connections=None)),
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            limits=httpx.Limits(max_connections=None),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # a server has nothing to store here
            trust_env=not is_loopback(urlsplit(url).hostname or ""),
        )
        self._lock, self._closed = threading.Lock(), False
        self._gate = asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, name=f"kibitz-http-{urlsplit(url).port}", daemon=True).start()

    def fetch(self, path: str, body: dict[str, Any] | None) -> Fetched:
        """POST of a body, else GET. A redirect is not followed.

        Raises TimeoutError after `timeout` seconds in all, TooLong, Closed, httpx.HTTPError and OSError."""
        content = None if body is None else json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
        with self._lock:
            if self._closed:
                raise Closed
            future = asyncio.run_coroutine_threadsafe(self._fetch(path, content, most_bytes(body)), self._loop)
        try:
            return future.result()
        except CancelledError:
            raise Closed from None
        except BaseException:  # Ctrl-C among them
            future.cancel()
            raise

    def close(self) -> None:
        """End the requests under way, which raise Closed, and give the connections back."""
        with self._lock:
            if not self._closed:
                self._closed = True
                asyncio.run_coroutine_threadsafe(self._end(), self._loop)

    async def _fetch(self, path: str, content: bytes | None, limit: int) -> Fetched:
        method, headers = ("GET", {}) if content is None else ("POST", {"Content-Type": "application/json"})
        async with (
            asyncio.timeout(self._timeout),
            self._client.stream(
                method, path, content=content, headers=headers, extensions={"trace": self._apart}
            ) as answer,
        ):
            well, data = answer.status_code < 300, bytearray()
            if answer.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
                if well:
                    raise TooLong("compressed, which it was asked not to be")
                return Fetched(answer.status_code, answer.reason_phrase, b"")
            async for piece in answer.aiter_raw():
                data += piece
                if len(data) > (limit if well else ERROR):
                    if well:
                        raise TooLong(
                            f"longer than {limit / 1e6:.3g} MB, and no answer to what was asked can be so long"
                        )
                    break
            return Fetched(answer.status_code, answer.reason_phrase, bytes(data[: limit if well else ERROR]))

    async def _apart(self, event: str, about: dict[str, Any]) -> None:
        """New connections one by one: the queue of those that a server has not accepted yet may hold only five."""
        if event.startswith("connection.connect_") and event.endswith(".started"):
            async with self._gate:
                await asyncio.sleep(APART)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()
        self._loop.stop()

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()
