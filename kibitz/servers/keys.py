"""API keys: where they come from, and how a stranger's words are shown without any part of them."""

import logging
import os
import re
from urllib.parse import urlsplit

from kibitz.servers import own

NAMES = ("KIBITZ_API_KEY", "OPENAI_API_KEY", "VLLM_API_KEY")
PART = 4
"""So many characters of a key in a row are a part of it. A server may repeat a key cut, or by its last four characters."""

_sent: set[str] = set()


def api_key(url: str) -> str | None:
    """The key that a server gets in its header: its own of a server that this program has started, OpenAI's for
    api.openai.com, else KIBITZ_API_KEY, or none."""
    if (hosted := own.of(url)) is not None:
        _sent.add(hosted.key)
        return hosted.key
    parts = urlsplit(url)
    openai = parts.hostname == "api.openai.com" and parts.scheme == "https" and _read("OPENAI_API_KEY")
    key = openai or _read("KIBITZ_API_KEY")
    if key:
        _sent.add(key)
    return key


def shown(text: str, limit: int = 300) -> str:
    """Return a server's text on one line of printable characters, fit for a terminal and a log. Every part of a key becomes
    `***` before the text is cut to `limit` characters."""
    text = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    for key in sorted(_sent | {key for name in NAMES if (key := os.environ.get(name, "").strip())}):
        text = _without(text, key)
    return text[:limit]


def _read(name: str) -> str | None:
    key = os.environ.get(name, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ValueError(f"{name} holds characters that no key has: write it again, in ASCII and without spaces")
    return key or None


def _without(text: str, key: str) -> str:
    size = min(PART, len(key))
    parts = {key[i : i + size] for i in range(len(key) - size + 1)}
    hidden = [False] * len(text)
    for i in range(len(text) - size + 1):
        if text[i : i + size] in parts:
            hidden[i : i + size] = [True] * size
    return re.sub("\0+", "***", "".join("\0" if hide else sign for sign, hide in zip(text, hidden, strict=True)))


class _Keyless(logging.Filter):
    """httpx logs a server's own words: the reason behind a status, and each header at the level of DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = shown(record.getMessage(), 2000), None
        return True


for _name in ("httpx", "httpcore.connection", "httpcore.http11", "httpcore.proxy"):
    logging.getLogger(_name).addFilter(_Keyless())
