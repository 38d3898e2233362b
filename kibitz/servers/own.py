"""Servers that this program has started itself: their keys, and what has become of them, by their addresses.

They listen at a Unix socket in a folder that no other user can enter: `unix:` and its path are such a server's address. No
port is taken, no other machine can reach it, and nobody else on this one may load weights into it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

SCHEME = "unix:"


@dataclass
class Own:
    """`key` goes into the header of each request. `name` is what messages call the server. `ended` is the sentence that says
    why it is gone for good, None while it runs or is being replaced. `number` counts the servers that were started here one
    after another. `replace(why, number)` ends the one of that number, which does not answer, so that another is started in its
    place, unless that has happened; where another process has started it, nothing happens."""

    name: str
    key: str
    ended: str | None = None
    number: int = 1
    replace: Callable[[str, int], None] = field(default=lambda why, number: None)


_known: dict[str, Own] = {}


def know(address: str, own: Own) -> None:
    _known[address] = own


def forget(address: str) -> None:
    _known.pop(address, None)


def of(address: str) -> Own | None:
    return _known.get(address)


def socket_of(address: str) -> str | None:
    """Return the path of the socket behind an address; None for an address of HTTP."""
    return address.removeprefix(SCHEME) if address.startswith(SCHEME) else None
