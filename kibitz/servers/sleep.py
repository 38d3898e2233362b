"""Servers that give their GPU's memory back while others work: vLLM's sleep mode, level 1, where weights wait in host memory."""

import threading

from kibitz.servers import ServerError
from kibitz.servers.http import Refused, Server, Servers

SLEEP, WAKE = "/sleep?level=1", "/wake_up"


class Sleepers:
    """Which of some servers are asleep. A server that is started anew is awake, and waking it once more changes nothing."""

    def __init__(self, servers: Servers):
        self.servers = servers
        self._asleep: dict[str, bool] = {}
        self._lock = threading.Lock()

    def wake(self, server: Server) -> None:
        """Return when the server is awake."""
        with self._lock:
            if not self._asleep.get(server.url, False):
                return
            _order(server, WAKE)
            self._asleep[server.url] = False

    def sleep(self) -> None:
        """Put those to sleep that are up. They must have answered all requests."""
        self.servers.reach(self._sleep)

    def _sleep(self, server: Server) -> None:
        _order(server, SLEEP)
        self._asleep[server.url] = True


def _order(server: Server, path: str) -> None:
    try:
        server.order(path, {})
    except Refused as error:
        if error.status not in (403, 404, 405):
            raise
        raise ServerError(
            f"{error}; it sleeps only if it was started with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1: write sleep: "
            "false, or leave out its address, so that kibitz starts it"
        ) from None
