"""Ports that stay a test's own, also while nobody listens there."""

import socket


def held(port: int = 0) -> socket.socket:
    """A socket that keeps a port (a free one for 0) without listening: who connects is refused, the system gives the port to
    nobody, and whoever reuses addresses, as HTTP servers do, may listen there nevertheless."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", port))
    return holder
