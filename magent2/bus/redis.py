"""The bus over Redis Streams (Redis 6.2 and later, Valkey): for many processes on one server.

Queue: a ready stream whose entries carry the head message of each ordering key, and a backlog list per key
(`redis_queue`). Topic: a stream; an append also publishes, and `redis_hub` follows. The scripts hold the rules, because
only they are atomic; each opens with its calling contract.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from uuid import uuid4

from magent2.bus import topics
from magent2.bus.interface import (
    START,
    Appended,
    BusConfig,
    Cursor,
    Dedup,
    Entry,
    QueueDepth,
    parse_cursor,
)
from magent2.bus.redis_hub import Hub, RedisSubscription
from magent2.bus.redis_queue import GROUP, QueueKeys, RedisConsumer
from magent2.errors import CursorExpired
from magent2.models.run import Fence
from magent2.redis_link import Arg, RedisLink, load_script

_PACKAGE = "magent2.bus"
_ENQUEUE = load_script(_PACKAGE, "enqueue")
_WAKE = load_script(_PACKAGE, "wake")
_DEPTH = load_script(_PACKAGE, "depth")
_APPEND = load_script(_PACKAGE, "append")

_NO_FENCE = Fence("", "", 0)


def _topic_key(topic: str) -> str:
    kind, rest = topics.split(topic)
    return f"magent2:{kind}:{{{rest}}}"


def _queue_keys(queue: str) -> QueueKeys:
    return QueueKeys.of(*topics.split(queue))


class RedisBus:
    """The `Bus` of a deployment on one server."""

    def __init__(self, link: RedisLink, config: BusConfig | None = None) -> None:
        self.config = config or BusConfig()
        self._link = link
        self._leaving: set[asyncio.Task[None]] = set()
        self._hub = Hub(link, _topic_key, self.read)

    async def enqueue(self, queue: str, key: str, data: bytes, *, only_if_idle: bool = False) -> None:
        keys = _queue_keys(queue)
        await self._link.script(
            _ENQUEUE,
            [keys.ready, keys.keys, keys.backlog(key), keys.total],
            [key, data, int(only_if_idle), self.config.key_backlog, self.config.queue_backlog],
        )

    @asynccontextmanager
    async def consume(self, queue: str, *, name: str | None = None, renew: bool = True) -> AsyncIterator[RedisConsumer]:
        name = name or f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        consumer = RedisConsumer(self._link, _queue_keys(queue), name, self.config, renew=renew)
        try:
            yield consumer
        finally:
            # in a task of its own: cancelled or not, it hands back what it held and closes its connections
            leaving = asyncio.create_task(consumer.close(), name="magent2-leave")
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            await asyncio.wait({leaving})
            leaving.result()

    async def wake(self, queue: str, key: str) -> None:
        keys = _queue_keys(queue)
        await self._link.script(_WAKE, [keys.ready, keys.keys, keys.held, keys.due, keys.woken], [GROUP, key])

    async def depth(self, queue: str) -> QueueDepth:
        keys = _queue_keys(queue)
        total, in_flight, held, age_ms = await self._link.script(_DEPTH, [keys.ready, keys.total, keys.due], [GROUP])
        return QueueDepth(max(total - in_flight - held, 0), in_flight, held, age_ms / 1000)

    async def append(
        self, topic: str, *data: bytes, fence: Fence | None = None, dedup: Dedup | None = None, forever: bool = False
    ) -> Appended:
        stream, guard, once, config = _topic_key(topic), fence or _NO_FENCE, dedup or Dedup(""), self.config
        args: list[Arg] = [
            0 if forever else config.stream_maxlen,
            0 if forever else int(config.stream_ttl_s * 1000),
            guard.writer, guard.token, guard.seq,
            once.digest, int(dedup is not None), int(config.dedup_ttl_s * 1000), once.origin,
        ]  # fmt: skip
        keys = [stream, f"{stream}:fences", f"{stream}:dedup:{dedup.id}" if dedup else stream]
        before, last, duplicate, origin = await self._link.script(_APPEND, keys, [*args, *data])
        return Appended(before.decode(), last.decode(), bool(duplicate), origin.decode())

    async def find(self, topic: str, dedup_id: str) -> tuple[str, Appended] | None:
        known = await self._link.command("GET", f"{_topic_key(topic)}:dedup:{dedup_id}")
        if known is None:
            return None
        before, last, digest, origin = known.decode().split(" ")
        return digest, Appended(before, last, origin=origin)

    async def read(self, topic: str, after: Cursor = "", limit: int = 500, *, last: bool = False) -> Sequence[Entry]:
        key = _topic_key(topic)
        from_start = parse_cursor(after) == (0, 0)
        if last and not from_start:
            await self.read(topic, after, 1)  # says whether the cursor still stands
        if last:
            newest = await self._link.command("XREVRANGE", key, "+", "-" if from_start else f"({after}", "COUNT", limit)
            return _entries(reversed(newest))
        if from_start:
            return _entries(await self._link.command("XRANGE", key, "-", "+", "COUNT", limit))
        # the entry of the cursor itself comes first, or the cursor is no longer one
        reply = await self._link.command("XRANGE", key, after, "+", "COUNT", limit + 1)
        if not reply or parse_cursor(reply[0][0].decode()) != parse_cursor(after):
            earliest = await self._link.command("XRANGE", key, "-", "+", "COUNT", 1)
            raise CursorExpired(earliest=earliest[0][0].decode() if earliest else None)
        return _entries(reply[1:])

    async def tail(self, topic: str) -> Cursor:
        newest = await self._link.command("XREVRANGE", _topic_key(topic), "+", "-", "COUNT", 1)
        return newest[0][0].decode() if newest else START

    def subscribe(self, topic: str, after: Cursor = "") -> AbstractAsyncContextManager[RedisSubscription]:
        parse_cursor(after)
        return self._hub.join(topic, after or START)

    async def expire(self, topic: str, ttl_s: float) -> None:
        key = _topic_key(topic)
        await self._link.command("PEXPIRE", key, int(ttl_s * 1000))
        await self._link.command("PEXPIRE", f"{key}:fences", int(ttl_s * 1000))

    async def ping(self) -> None:
        await self._link.command("PING")

    async def aclose(self) -> None:
        """Stop following. The link is the caller's."""
        if self._leaving:
            await asyncio.wait(self._leaving)
        await self._hub.aclose()


def _entries(reply: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> list[Entry]:
    return [Entry(id.decode(), fields[b"d"]) for id, fields in reply]
