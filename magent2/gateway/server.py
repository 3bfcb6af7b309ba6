"""Uvicorn around the gateway: a socket bound before anything heavy is imported, and an end of our own choosing."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from magent2.errors import BadSettings
from magent2.log import leave
from magent2.settings import GatewayConfig

GRACE_S = 3
"""After this long of an orderly end connections are cut."""


def bind(config: GatewayConfig, *, allow_anonymous: bool) -> socket.socket:
    """A listening socket, before anything else is started. Raises `BadSettings` in plain words."""
    if not (_is_loopback(config.host) or config.tokens or allow_anonymous):
        raise BadSettings(
            f"GATEWAY_HOST={config.host} can be reached from elsewhere: set MAGENT2_API_TOKEN, "
            "or MAGENT2_ALLOW_ANONYMOUS=1 if everybody may use it"
        )
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # accepted sockets inherit it; event loops set it only on sockets they made: without it a token waits 40 ms for the
    # acknowledgement of the one before
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind((config.host.strip("[]"), config.port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise BadSettings(f"port {config.port} is in use: stop what listens there or set GATEWAY_PORT") from None
        raise BadSettings(f"cannot listen on {config.host}:{config.port}: {error.strerror}") from None
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # another name: who knows where it leads
        return False


class Server(uvicorn.Server):
    """Serves an app until told to stop; unlike uvicorn it does not raise the signal again at the end.

    `on_stop` is called with the first signal, in the main thread, before connections are waited for.
    """

    def __init__(self, app: Starlette, on_stop: Callable[[signal.Signals], object] | None = None) -> None:
        super().__init__(
            uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=GRACE_S, lifespan="on")
        )
        self.told: signal.Signals | None = None
        self._on_stop = on_stop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM for the length of the block, in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends the service in order, the second at once."""
        if self.told is not None:
            leave(130 if sig == signal.SIGINT else 0)
        self.told = signal.Signals(sig)
        self.should_exit = True
        if self._on_stop is not None:
            self._on_stop(self.told)

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 0 after SIGTERM."""
        return 130 if self.told == signal.SIGINT else 0
