"""A TCP proxy that misbehaves when told: cut connections, half-open ones, answers that get lost."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(eq=False)
class _Pair:
    """A connection of a client and the one to the server made for it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    running: asyncio.Event = field(default_factory=asyncio.Event)

    def cut(self) -> None:
        for writer in (self.client, self.server):
            peer: socket.socket | None = writer.get_extra_info("socket")
            if peer is not None and peer.fileno() >= 0:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()
        self.running.set()  # let the pumps see that it is over


class Proxy:
    """Forwards to a port of this machine; `url` is where it listens, as a Redis URL."""

    def __init__(self, target: int) -> None:
        self.port = 0
        self.dropped = 0
        """Answers swallowed so far."""
        self._target = target
        self._to_drop = 0
        self._pairs: set[_Pair] = set()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def connections(self) -> int:
        """How many are open now."""
        return len(self._pairs)

    def cut(self) -> None:
        """Reset all connections open now."""
        for pair in list(self._pairs):
            pair.cut()

    def pause(self) -> None:
        """Forward nothing on the connections open now, and keep them open; new ones work."""
        for pair in self._pairs:
            pair.running.clear()

    def resume(self) -> None:
        """Forward again, first what came meanwhile."""
        for pair in self._pairs:
            pair.running.set()

    def drop_answers(self, n: int = 1) -> None:
        """Forward requests, swallow the next `n` answers (as they come off the wire), then reset that connection."""
        self._to_drop = n

    async def _serve(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            server_reader, server = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            client.transport.abort()
            return
        pair = _Pair(client, server)
        pair.running.set()
        self._pairs.add(pair)
        try:
            pumps = (self._pump(pair, client_reader, server), self._pump(pair, server_reader, client, answers=True))
            await asyncio.gather(*pumps)
        finally:
            self._pairs.discard(pair)
            pair.cut()

    async def _pump(
        self, pair: _Pair, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool = False
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await pair.running.wait()
                if answers and self._to_drop:
                    self._to_drop -= 1
                    self.dropped += 1
                    if self._to_drop == 0:
                        break
                    continue
                writer.write(data)
                await writer.drain()
        pair.cut()


@asynccontextmanager
async def running_proxy(target: int) -> AsyncIterator[Proxy]:
    """A proxy to that port for the length of the block."""
    proxy = Proxy(target)
    server = await asyncio.start_server(proxy._serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        async with asyncio.timeout(5):
            while proxy.connections:
                proxy.cut()
                await asyncio.sleep(0)
        await server.wait_closed()
