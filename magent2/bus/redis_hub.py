"""Followers of topics on Redis: one pub/sub connection per process, whatever the number of topics and readers.

Pub/sub alone loses messages whenever a connection breaks, so it is only the fast path. Each message names the entry
before it; a reader for whom that is not the last one it saw reads the log instead. Each confirmation of a SUBSCRIBE,
the first as well as those after a reconnect, makes the readers of that topic read the log once more: the tail lost
while disconnected has no later message that would show the gap.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError

from magent2.bus.interface import START, Cursor, Entry, parse_cursor
from magent2.errors import Unavailable
from magent2.redis_link import RedisLink

logger = logging.getLogger(__name__)

PING_S = 5.0
"""A pub/sub connection silent for twice this long is dead: a half-open one would never say so."""

# AttributeError: redis-py meets a connection that was closed while it was about to write
_GONE = (RedisError, OSError, AttributeError)
_BUFFER_BYTES = 256 * 1024
_RECONNECT_S = (0.05, 0.1, 0.2, 0.5, 1.0)
_PAGE = 500

Read = Callable[[str, Cursor, int], Awaitable[Sequence[Entry]]]


@dataclass(frozen=True, slots=True)
class _Frame:
    """One publication: the entries of one append, and the cursor before them."""

    before: Cursor
    entries: Sequence[Entry]
    size: int


def _decode(payload: bytes) -> _Frame:
    header, _, body = payload.partition(b"\n")
    before, *index = header.decode().split(" ")
    entries, start = [], 0
    for item in index:
        cursor, _, length = item.partition(":")
        end = start + int(length)
        entries.append(Entry(cursor, body[start:end]))
        start = end
    return _Frame(before, entries, len(payload))


class RedisSubscription:
    """A `Subscription`: live frames while they join up with the cursor, else pages of the log."""

    def __init__(self, topic: str, after: Cursor, read: Read) -> None:
        self._topic = topic
        self._cursor = after
        self._read = read
        self._frames: deque[_Frame] = deque()
        self._buffered = 0
        self._behind = True
        self._bell = asyncio.Event()

    def push(self, frame: _Frame) -> None:
        """A live frame. A reader too slow for its buffer falls back to the log."""
        self._frames.append(frame)
        self._buffered += frame.size
        if self._buffered > _BUFFER_BYTES:
            self.catch_up()
        self._bell.set()

    def catch_up(self) -> None:
        """Read the log before anything else."""
        self._frames.clear()
        self._buffered = 0
        self._behind = True
        self._bell.set()

    async def __aiter__(self) -> AsyncIterator[Sequence[Entry]]:
        while True:
            batch = await self._page() if self._behind else self._live()
            if batch:
                self._cursor = batch[-1].cursor
                yield batch
            elif not self._behind:
                await self._bell.wait()

    async def _page(self) -> Sequence[Entry]:
        self._behind = False  # first: a frame that comes while reading is judged against the page
        self._bell.clear()
        try:
            page = await self._read(self._topic, self._cursor, _PAGE)
        except Unavailable:
            self._behind = True
            await asyncio.sleep(_RECONNECT_S[-1])
            return ()
        except BaseException:
            self._behind = True  # cancelled: who iterates anew starts with the page
            raise
        if len(page) == _PAGE:
            self._behind = True
        return page

    def _live(self) -> Sequence[Entry]:
        """What is buffered and joins up, as one batch."""
        self._bell.clear()
        batch: list[Entry] = []
        cursor = self._cursor
        while self._frames and not self._behind:
            frame = self._frames.popleft()
            self._buffered -= frame.size
            entries = frame.entries if frame.before == cursor else self._overlap(frame, cursor)
            if entries:
                batch.extend(entries)
                cursor = entries[-1].cursor
        return batch

    def _overlap(self, frame: _Frame, cursor: Cursor) -> Sequence[Entry]:
        """The part of a frame that is new; behind a gap none of it, and the log is read instead."""
        place = parse_cursor(cursor)
        fresh = [entry for entry in frame.entries if parse_cursor(entry.cursor) > place]
        # a frame that lies wholly past the cursor has others before it; one that starts a log while the cursor is past
        # its start follows a loss of the store: in both cases the log says what is true
        if len(fresh) == len(frame.entries) or (not fresh and frame.before == START):
            self._behind = True
            return ()
        return fresh


class Hub:
    """The process's one pub/sub connection, opened when the first reader joins."""

    def __init__(self, link: RedisLink, channel_of: Callable[[str], str], read: Read) -> None:
        self._link = link
        self._channel_of = channel_of
        self._read = read
        self._readers: dict[bytes, set[RedisSubscription]] = {}
        self._connection: AbstractConnection | None = None
        self._running: asyncio.Task[None] | None = None
        self._saying: set[asyncio.Task[None]] = set()
        self._heard = 0.0

    @contextlib.asynccontextmanager
    async def join(self, topic: str, after: Cursor) -> AsyncIterator[RedisSubscription]:
        """A subscription for the length of the block."""
        subscription = RedisSubscription(topic, after, self._read)
        channel = self._channel_of(topic).encode()
        readers = self._readers.setdefault(channel, set())
        readers.add(subscription)
        if self._running is None:
            self._running = asyncio.create_task(self._run(), name="magent2-hub")
        elif len(readers) == 1:
            self._say("SUBSCRIBE", channel)
        try:
            yield subscription
        finally:
            readers.discard(subscription)
            if not readers and self._readers.get(channel) is readers:
                del self._readers[channel]
                self._say("UNSUBSCRIBE", channel)

    async def aclose(self) -> None:
        """Close the connection; readers get nothing more."""
        # again and again: `asyncio.wait_for` of Python 3.11, inside redis-py, may swallow a cancellation
        while self._running is not None and not self._running.done():
            self._running.cancel()
            await asyncio.wait({self._running}, timeout=0.05)
        while self._saying:
            await asyncio.wait(self._saying)

    def _say(self, *command: str | bytes) -> None:
        """Send in a task of its own: a reader cancelled while sending would close everybody's connection."""
        # redis-py connects again by itself to send, and nobody would read from that
        if self._connection is not None and self._connection.is_connected:
            task = asyncio.create_task(self._send(self._connection, *command))
            self._saying.add(task)
            task.add_done_callback(self._saying.discard)

    async def _send(self, connection: AbstractConnection, *command: str | bytes) -> None:
        # a connection that breaks here is found broken by its reader, which subscribes to all topics again
        if connection.is_connected:
            with contextlib.suppress(*_GONE):
                await connection.send_command(*command)

    async def _run(self) -> None:
        tries = 0
        while True:
            try:
                connection = await self._link.connection()
            except Unavailable:
                await asyncio.sleep(_RECONNECT_S[min(tries, len(_RECONNECT_S) - 1)])
                tries += 1
                continue
            self._connection = connection
            pinging = asyncio.create_task(self._ping(connection))
            try:
                # all channels known now; whoever joins from here on finds the connection and subscribes itself
                await connection.send_command("SUBSCRIBE", "magent2:hub", *self._readers)
                tries = 0
                while True:
                    self._dispatch(await connection.read_response(disable_decoding=True, timeout=math.inf))
            except _GONE as error:
                logger.warning("pub/sub connection lost (%s), connecting again", type(error).__name__)
            finally:
                self._connection = None
                pinging.cancel()
                with contextlib.suppress(*_GONE):
                    await connection.disconnect(nowait=True)

    async def _ping(self, connection: AbstractConnection) -> None:
        self._heard = time.monotonic()
        with contextlib.suppress(*_GONE):
            while time.monotonic() - self._heard < 2 * PING_S and connection.is_connected:
                await connection.send_command("PING")
                await asyncio.sleep(PING_S)
        # this wakes the reader with an error
        with contextlib.suppress(*_GONE):
            await connection.disconnect(nowait=True)

    def _dispatch(self, reply: Sequence[bytes]) -> None:
        self._heard = time.monotonic()
        kind = reply[0]
        if kind == b"message":
            if readers := self._readers.get(reply[1]):
                try:
                    frame = _decode(reply[2])
                except ValueError:  # not from our script: the log says what is true
                    for reader in readers:
                        reader.catch_up()
                    return
                for reader in readers:
                    reader.push(frame)
        elif kind == b"subscribe":
            for reader in self._readers.get(reply[1], ()):
                reader.catch_up()
