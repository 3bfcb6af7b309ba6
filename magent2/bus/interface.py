"""What a bus promises: a keyed work queue and a replayable topic. Payloads are opaque bytes.

Held by `tests/contracts/test_bus.py`, which runs over every keeper. The bus knows nothing of agents or events; the
layer above is `conversations`. All methods raise `Unavailable` when the server cannot be reached.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from magent2.errors import BadCursor
from magent2.models.run import Fence

Cursor = str
START: Cursor = "0-0"

_CURSOR = re.compile(r"([0-9]{1,20})-([0-9]{1,20})\Z")
_U64 = 2**64


def parse_cursor(cursor: Cursor) -> tuple[int, int]:
    """The cursor as a comparable pair; `""` is the start. Raises `BadCursor` for anything else."""
    match = _CURSOR.match(cursor or START)
    if match is None:
        raise BadCursor
    high, low = int(match[1]), int(match[2])
    if high >= _U64 or low >= _U64:
        raise BadCursor
    return high, low


@dataclass(frozen=True, slots=True)
class BusConfig:
    """Retention, redelivery and bounds. Defaults are those of the settings table."""

    stream_maxlen: int = 10_000
    stream_ttl_s: float = 604_800.0
    dedup_ttl_s: float = 86_400.0
    lease_s: float = 15.0
    stall_s: float = 600.0
    key_backlog: int = 100
    queue_backlog: int = 10_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a topic; `cursor` is its id, and grows."""

    cursor: Cursor
    data: bytes


@dataclass(frozen=True, slots=True)
class Appended:
    """Where an append landed: the cursor just before its first entry, that of its last, and whether it was a repeat.

    `origin` is that of the append which made the entry.
    """

    before: Cursor
    last: Cursor
    duplicate: bool = False
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Dedup:
    """Append once: the same `id` and `digest` within the window returns the earlier place, another digest conflicts.

    `origin` says on whose behalf: two appenders of one entry with one origin know that it is theirs. No spaces in it.
    """

    id: str
    digest: str = ""
    origin: str = ""


@dataclass(frozen=True, slots=True)
class QueueDepth:
    """How full a queue is. `oldest_age_s` is how long the oldest ready message has waited for a consumer."""

    waiting: int
    in_flight: int
    parked: int
    oldest_age_s: float


class Delivery(Protocol):
    """One message handed to one consumer, under a lease. Every settling method raises `LeaseLost` when it is over."""

    @property
    def key(self) -> str:
        """The ordering key."""

    @property
    def data(self) -> bytes:
        """The payload, as enqueued."""

    @property
    def attempt(self) -> int:
        """Counts from 1: lapsed leases and `nack` count, `release` and `park` do not."""

    @property
    def starts(self) -> int:
        """Counts every delivery of this message from 1, whatever ended the one before."""

    @property
    def lapses(self) -> int:
        """How many leases of this message lapsed in a row before this delivery."""

    @property
    def token(self) -> str:
        """The fencing token: grows with every delivery for the same key, over a restart of the bus too."""

    @property
    def lost(self) -> asyncio.Event:
        """Set the moment a renewal is refused."""

    async def ack(self) -> None:
        """Done: forget the message and let the next one of its key go."""

    async def nack(self, *, delay_s: float = 0.0) -> None:
        """Failed: deliver it again after `delay_s`, the key blocked meanwhile. Counts as an attempt."""

    async def park(self, for_s: float) -> None:
        """Wait without a consumer for `for_s` or until `wake`, the key blocked meanwhile. Counts nothing.

        A `wake` that came since this delivery began makes it come back at once.
        """

    async def release(self) -> None:
        """Hand it back untouched (drain). Counts nothing."""


class Consumer(Protocol):
    """One competing consumer of a queue."""

    async def receive(self, max: int = 1) -> Sequence[Delivery]:
        """Wait for one to `max` deliveries; at most one per key is in flight over all consumers.

        Cancelling it loses nothing: what arrived meanwhile is in the next call.
        """

    async def stop(self) -> None:
        """Receive nothing more, and hand back at once what arrived and no `receive` returned. Leases go on."""


class Subscription(Protocol):
    """One reader of a topic."""

    def __aiter__(self) -> AsyncIterator[Sequence[Entry]]:
        """Yield batches for ever, each entry once and in order: first replay, then live.

        Raises `CursorExpired` when the next entry due is no longer kept.
        """


class Bus(Protocol):
    """The queue and the topics of one deployment."""

    async def enqueue(self, queue: str, key: str, data: bytes, *, only_if_idle: bool = False) -> None:
        """Add a message, durably accepted on return. FIFO per key.

        Raises `QueueFull` at a bound, `KeyBusy` when `only_if_idle` and the key has unsettled messages.
        """

    def consume(
        self, queue: str, *, name: str | None = None, renew: bool = True
    ) -> AbstractAsyncContextManager[Consumer]:
        """Join the queue's consumers. Leaving hands back what was received and not settled.

        `renew=False`: no lease is renewed; the caller settles within the lease or loses the job.
        """

    async def wake(self, queue: str, key: str) -> None:
        """A parked or delayed delivery of the key comes now; one in flight will not park."""

    async def depth(self, queue: str) -> QueueDepth:
        """How full the queue is."""

    async def append(
        self,
        topic: str,
        *data: bytes,
        fence: Fence | None = None,
        dedup: Dedup | None = None,
        forever: bool = False,
    ) -> Appended:
        """Add entries at the end, all or none, durable on return. `forever`: neither trim nor expire the topic.

        Raises `LeaseLost` for a fence older than one seen from the same writer, and `DedupConflict`.
        """

    async def find(self, topic: str, dedup_id: str) -> tuple[str, Appended] | None:
        """The digest and the place of the append made with this dedup id, while it is remembered."""

    async def read(self, topic: str, after: Cursor = "", limit: int = 500, *, last: bool = False) -> Sequence[Entry]:
        """Entries after the cursor, oldest first; with `last`, the newest `limit` of them.

        `""` and `0-0` are the start. Raises `BadCursor`, and `CursorExpired` when the entry of `after` is not kept.
        """

    async def tail(self, topic: str) -> Cursor:
        """The cursor of the newest entry; `0-0` when nothing is kept."""

    def subscribe(self, topic: str, after: Cursor = "") -> AbstractAsyncContextManager[Subscription]:
        """Follow the topic after the cursor, without a gap and without a repeat."""

    async def expire(self, topic: str, ttl_s: float) -> None:
        """Forget the topic after `ttl_s` unless something is appended meanwhile."""

    async def ping(self) -> None:
        """Return when the server answers."""
