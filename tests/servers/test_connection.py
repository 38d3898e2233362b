"""Servers that never end: each request is bounded in bytes and in its whole time, and no text holds a part of the key.

The hostile servers would end well if somebody waited long enough or read far enough: an answer is then whole, and the test
fails.
"""

import logging
import pickle
import re
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from kibitz.config.servers import ServerConfig
from kibitz.servers import ServerError, served_model
from kibitz.servers.answers import said, written
from kibitz.servers.connection import LEAST, Connection, is_loopback, most_bytes
from kibitz.servers.http import Refused, Server, Servers
from kibitz.servers.keys import PART, api_key, shown

KEY = "sk-qXzvWjKpRtYbNmGhTf"
OK = b"HTTP/1.1 200 OK\r\n"
TREE = b'{"data": [{"id": "stub"}]}'
WHOLE = OK + b"Content-Length: %d\r\n\r\n" % len(TREE) + TREE


def question(peer: socket.socket) -> bytes:
    """The head of a request, whose body is read too."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (piece := peer.recv(65536)):
            raise ConnectionError("hung up before it had asked")
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    while length and len(body) < int(length[1]):
        body += peer.recv(65536)
    return head + b"\r\n"


@contextmanager
def speaking(answer: Callable[[], Iterator[bytes]]) -> Iterator[tuple[str, list[bytes]]]:
    """A socket that reads the head of a request and sends the pieces of `answer`: its address, and what it read."""
    listener, heard, over = socket.create_server(("127.0.0.1", 0)), [], threading.Event()

    def serve() -> None:
        while not over.is_set():
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(peer,), daemon=True).start()

    def one(peer: socket.socket) -> None:
        with peer:
            try:
                heard.append(question(peer))
                for piece in answer():
                    if over.is_set():
                        return
                    peer.sendall(piece)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(65536):
                    """Until the other end closes too: to close earlier would take back what was sent."""
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", heard
    finally:
        over.set()
        listener.close()


@pytest.fixture
def asking():
    """One question to an address."""
    with ExitStack() as stack:

        def ask(url: str, path: str = "/v1/models", body: dict | None = None, timeout: float = 300.0):
            servers = Servers(ServerConfig(timeout=timeout, patience=0.0), [url], "teacher")
            stack.callback(servers.close)
            (answer,) = servers.gather([servers.submit(lambda server: server.ask(path, body))])
            return answer

        yield ask


def slowly(data: bytes) -> Iterator[bytes]:
    """A byte each tenth of a second, which keeps every read alive."""
    for i in range(len(data)):
        time.sleep(0.1)
        yield data[i : i + 1]


def drips_its_body() -> Iterator[bytes]:
    yield WHOLE[: -len(TREE)]
    yield from slowly(TREE)


def drips_the_length_of_a_chunk() -> Iterator[bytes]:
    yield OK + b"Transfer-Encoding: chunked\r\n\r\n"
    yield from slowly(b"%x;extension\r\n" % len(TREE))
    yield TREE + b"\r\n0\r\n\r\n"


def sends_chunks_that_keep_it_alive() -> Iterator[bytes]:
    yield OK + b"Transfer-Encoding: chunked\r\n\r\n"
    for _ in range(40):
        time.sleep(0.05)
        yield b"1\r\n \r\n"
    yield b"%x\r\n" % len(TREE) + TREE + b"\r\n0\r\n\r\n"


def says_continue() -> Iterator[bytes]:
    for _ in range(40):
        time.sleep(0.05)
        yield b"HTTP/1.1 102 Processing\r\n\r\n"
    yield WHOLE


def says_nothing() -> Iterator[bytes]:
    time.sleep(3)
    yield WHOLE


@pytest.mark.parametrize(
    "answer",
    [lambda: slowly(WHOLE), drips_its_body, drips_the_length_of_a_chunk, sends_chunks_that_keep_it_alive, says_continue,
     says_nothing],
    ids=["its head", "its body", "the length of a chunk", "chunks", "interim answers", "silence"],
)  # fmt: skip
def test_the_limit_of_time_is_for_the_whole_answer(asking, answer):
    with speaking(answer) as (url, _):
        said = "no connection"
        while "no connection" in said:  # on a machine in use the time may be over before the question is sent
            with pytest.raises(ServerError, match=f"{url} did not answer in time") as caught:
                asking(url, timeout=0.5)
            said = str(caught.value)
    assert "no whole answer within 0.5 s" in said


def padded(head: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from pieces


def with_length(num: int) -> Iterator[bytes]:
    return padded(OK + b"Content-Length: %d\r\n\r\n" % (num + len(TREE)), iter([b" " * num, TREE]))


def chunked(num: int) -> Iterator[bytes]:
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    end = b"%x\r\n" % len(TREE) + TREE + b"\r\n0\r\n\r\n"
    return padded(OK + b"Transfer-Encoding: chunked\r\n\r\n", iter([chunk] * (num // 65536) + [end]))


def compressed(coding: str) -> Iterator[bytes]:
    """A little that stands for 64 MB, twice compressed if it says so."""
    data = b" " * 2**26 + TREE
    for _ in coding.split(","):
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        data = packer.compress(data) + packer.flush()
    yield OK + b"Content-Encoding: %s\r\nContent-Length: %d\r\n\r\n" % (coding.encode(), len(data)) + data


def many_headers() -> Iterator[bytes]:
    yield OK
    for i in range(20_000):
        yield b"X-%d: a\r\n" % i
    yield WHOLE[len(OK) :]


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda: with_length(LEAST), "longer than 4.19 MB"),
        (lambda: chunked(2 * LEAST), "longer than 4.19 MB"),
        (lambda: compressed("gzip"), "compressed, which it was asked not to be"),
        (lambda: compressed("gzip, gzip"), "compressed, which it was asked not to be"),
        (many_headers, "cannot be reached"),
        (lambda: iter([OK + b"X: " + b"a" * 200_000 + b"\r\n" + WHOLE[len(OK) :]]), "cannot be reached"),
    ],
    ids=["length", "chunks", "gzip", "gzip twice", "headers", "a header"],
)
def test_the_limit_of_bytes_follows_from_the_question(asking, answer, sentence):
    with speaking(answer) as (url, _), pytest.raises(ServerError, match=sentence) as caught:
        asking(url)
    assert url in str(caught.value)


def test_a_larger_question_may_have_a_larger_answer(asking):
    question = {"prompt": [5] * 200, "max_tokens": 1, "prompt_logprobs": 200}
    with speaking(lambda: with_length(LEAST)) as (url, _):
        assert asking(url, "/v1/completions", question) == {"data": [{"id": "stub"}]}
    scored = most_bytes(question) - LEAST
    assert 200 * 201 * 100 < scored < 200 * 201 * 1000
    inner = {"token_ids": [5] * 200, "sampling_params": {"max_tokens": 1, "prompt_logprobs": 200}}
    assert most_bytes(inner) == most_bytes(question)
    assert most_bytes({"prompt": [5], "max_tokens": 1000, "n": 8}) > LEAST + 8 * 1000 * 500
    assert most_bytes({"prompt": "a text", "model": "m"}) >= LEAST and most_bytes(None) == LEAST


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_and_takes_no_key(asking, monkeypatch, status):
    monkeypatch.setenv("KIBITZ_API_KEY", KEY)
    with speaking(lambda: iter([WHOLE])) as (other, heard):
        head = b"HTTP/1.1 %d Moved\r\nLocation: %s/v1/models\r\nContent-Length: 0\r\n\r\n" % (status, other.encode())
        with speaking(lambda: iter([head])) as (url, _), pytest.raises(ServerError, match="on to another address"):
            asking(url)
    assert heard == []


def test_a_server_stores_no_cookie(asking):
    head = WHOLE.replace(b"\r\n\r\n", b"\r\nSet-Cookie: a=b\r\nConnection: close\r\n\r\n", 1)
    with speaking(lambda: iter([head])) as (url, heard):
        server = Server(url, "teacher", 300.0)
        assert server.ask("/v1/models") == server.ask("/v1/models")
        server.close()
    assert len(heard) == 2 and b"cookie" not in heard[1].lower()


def test_closing_ends_what_is_under_way():
    begun, over = threading.Event(), threading.Event()

    def waits() -> Iterator[bytes]:
        begun.set()
        over.wait(600)
        yield WHOLE

    with speaking(waits) as (url, _):
        servers = Servers(ServerConfig(timeout=600, patience=0.0), [url], "teacher")
        job = servers.submit(lambda server: server.ask("/v1/models"))
        assert begun.wait(300)
        servers.close()
        with pytest.raises(ServerError, match="is not asked any more"):
            job.result(300)
        with pytest.raises(ServerError, match="is not asked any more"):
            servers.servers[0].ask("/v1/models")


def test_which_addresses_are_this_machine():
    assert all(is_loopback(host) for host in ("localhost", "127.0.0.1", "127.3.2.1", "::1"))
    assert not any(is_loopback(host) for host in ("", "0.0.0.0", "10.0.0.5", "gpu7", "localhost.evil.org", "::"))


# ------------------------------------------------------------------ keys


def parts_of_the_key(text: str) -> list[str]:
    return [KEY[i : i + PART] for i in range(len(KEY) - PART + 1) if KEY[i : i + PART] in text]


def reply(status: bytes, data: bytes) -> bytes:
    return b"HTTP/1.1 " + status + b"\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(data) + data


SECRET = KEY.encode()


@pytest.mark.parametrize(
    "answer",
    [reply(b"400 Bad", SECRET), reply(b"400 Bad", b"y" * 287 + SECRET), reply(b"400 Bad", b"y" * 297 + b" " + SECRET),
     reply(b"400 Bad", b" " * (2**16 - 9) + SECRET), reply(b"401 " + SECRET, b""), reply(b"503 " + SECRET[:9], b""),
     reply(b"400 Bad", b'{"error": {"message": "no ' + SECRET[3:11] + b'"}}'), reply(b"200 OK", b"z" * 66 + SECRET),
     reply(b"200 OK", SECRET[-4:]), b"HTTP/1.1 " + SECRET + b"\r\n\r\n", OK + SECRET + b"\r\n\r\n",
     OK + b"Set-Cookie: " + SECRET + b"\r\nContent-Length: 2\r\n\r\n[]"],
    ids=lambda answer: repr(answer[9:13]),
)  # fmt: skip
def test_no_part_of_a_key_is_repeated(monkeypatch, caplog, answer):
    """By any error, nor by any log of this process at any level."""
    monkeypatch.setenv("KIBITZ_API_KEY", KEY)
    with caplog.at_level(logging.DEBUG), speaking(lambda: iter([answer])) as (url, heard):
        servers = Servers(ServerConfig(timeout=300, patience=0.0), [url], "teacher")
        with pytest.raises(ServerError) as caught:
            servers.each(lambda server: served_model(server, None, "teacher.model"))
        servers.close()
    assert b"Bearer " + SECRET in heard[0], "the server knows the key"
    text = str(caught.value) + repr(caught.value) + caplog.text + repr(vars(servers.servers[0]))
    assert parts_of_the_key(text) == [] and url in str(caught.value)


@pytest.mark.parametrize(
    "tree",
    [{"model": KEY}, {"model": "m", "prompt_logprobs": [None, {KEY: {"logprob": -1.0}}]},
     {"model": "m", "prompt_logprobs": [None, {"5": {"logprob": "a" * 70 + KEY}}]},
     {"model": "m", "prompt_logprobs": [None, {"5": {"logprob": -1.0, "rank": KEY}}]},
     {"model": "m", "choices": [{"index": KEY}]}],
)  # fmt: skip
def test_no_part_of_a_key_is_quoted_from_an_answer(monkeypatch, tree):
    monkeypatch.setenv("KIBITZ_API_KEY", KEY)
    with pytest.raises(ServerError) as caught:
        said("the teacher", tree, "m", [1, 5], 1, 0, 21) if "choices" not in tree else written(
            "the student", tree, "m", 1, 21, 4
        )
    assert parts_of_the_key(str(caught.value)) == [] and "***" in str(caught.value)


def test_a_text_is_shown_without_the_key_and_otherwise_as_it_is(monkeypatch):
    monkeypatch.setenv("KIBITZ_API_KEY", KEY)
    assert shown(f"bad key {KEY}, {KEY[:9]} and {KEY[-4:]}\n\x1b[31m") == "bad key ***, *** and *** [31m"
    assert shown("a sentence of a server", 10) == "a sentence"
    monkeypatch.delenv("KIBITZ_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    assert shown("axb") == "a***b"


@pytest.mark.parametrize("key", ["sk-two\nlines", "sk-größe", "sk with spaces", "sk-\x00"[:-1] + "\x7f"])
def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(monkeypatch, key):
    monkeypatch.setenv("KIBITZ_API_KEY", key)
    with pytest.raises(ValueError, match="KIBITZ_API_KEY holds characters that no key has") as caught:
        api_key("http://127.0.0.1:1")
    assert key not in str(caught.value)


def test_a_line_break_at_the_end_belongs_to_no_key(monkeypatch):
    monkeypatch.setenv("KIBITZ_API_KEY", KEY + "\n")
    with speaking(lambda: iter([WHOLE])) as (url, heard):
        connection = Connection(url, 300.0, api_key(url))
        assert connection.fetch("/v1/models", None).data == TREE
        connection.close()
    assert b"Bearer " + SECRET + b"\r\n" in heard[0]


def test_a_refusal_reaches_the_other_processes_as_it_is():
    """They raise what the first one raises: it is pickled on its way."""
    found = pickle.loads(pickle.dumps(Refused("the student refused /x", 404)))
    assert isinstance(found, Refused) and str(found) == "the student refused /x" and found.status == 404
