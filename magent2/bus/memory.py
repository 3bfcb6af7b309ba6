"""The bus of one process: the same promise as Redis, kept in tables under one lock.

It ships, and is not a fake: `magent2 local` runs on it and so do users' tests. It may be used from several threads,
each with its own event loop; nothing survives the process. Time is `clock`, monotonic seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import threading
import time
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Literal

from magent2.bus.interface import (
    START,
    Appended,
    BusConfig,
    Cursor,
    Dedup,
    Delivery,
    Entry,
    QueueDepth,
    parse_cursor,
)
from magent2.errors import CursorExpired, DedupConflict, KeyBusy, LeaseLost, QueueFull
from magent2.models.run import Fence

Clock = Callable[[], float]
_BATCH = 500
_SWEEP_S = 60.0


class _Bell:
    """Wakes everybody who waits, in whatever thread's loop they are. Not a condition: loops have no common lock."""

    def __init__(self) -> None:
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def listen(self) -> asyncio.Future[None]:
        """A future the next `ring` resolves. Take it under the bus lock, before deciding to wait."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiters.append((loop, future))
        return future

    def forget(self, future: asyncio.Future[None]) -> None:
        self._waiters = [waiter for waiter in self._waiters if waiter[1] is not future]

    def ring(self) -> None:
        waiters, self._waiters = self._waiters, []
        for loop, future in waiters:
            _call_in(loop, partial(_resolve, future))

    def __bool__(self) -> bool:
        return bool(self._waiters)


def _call_in(loop: asyncio.AbstractEventLoop, act: Callable[[], None]) -> None:
    """Act at once in the loop's own thread, else as soon as that loop can."""
    try:
        here = asyncio.get_running_loop()
    except RuntimeError:
        here = None
    if here is loop:
        act()
    elif not loop.is_closed():
        loop.call_soon_threadsafe(act)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


@dataclass(slots=True)
class _Message:
    data: bytes
    attempts: int = 0  # counted deliveries that ended
    starts: int = 0
    lapses: int = 0  # in a row


@dataclass(slots=True)
class _Key:
    """All of one ordering key: its messages, the head first, and what the head is doing."""

    messages: deque[_Message] = field(default_factory=deque)
    state: Literal["ready", "flight", "held"] = "ready"
    since: float = 0.0  # when it became ready
    due: float = 0.0  # when a held one becomes ready
    woken: bool = False


@dataclass(slots=True)
class _Queue:
    keys: dict[str, _Key] = field(default_factory=dict)
    ready: deque[str] = field(default_factory=deque)
    flight: dict[str, _MemoryDelivery] = field(default_factory=dict)
    held: list[tuple[float, str]] = field(default_factory=list)  # a heap; entries no longer true are skipped
    total: int = 0
    bell: _Bell = field(default_factory=_Bell)


@dataclass(slots=True)
class _Topic:
    entries: list[tuple[tuple[int, int], bytes]] = field(default_factory=list)
    last: tuple[int, int] = (0, 0)
    expires: float = 0.0
    fences: dict[str, tuple[str, int, Appended]] = field(default_factory=dict)
    bell: _Bell = field(default_factory=_Bell)


class MemoryBus:
    """The `Bus` of one process."""

    def __init__(self, config: BusConfig | None = None, *, clock: Clock = time.monotonic) -> None:
        self.config = config or BusConfig()
        self._clock = clock
        self._lock = threading.RLock()
        self._queues: dict[str, _Queue] = {}
        self._topics: dict[str, _Topic] = {}
        self._dedup: OrderedDict[tuple[str, str], tuple[str, Appended, float]] = OrderedDict()
        # a store that outlives the process remembers tokens: start above all that were ever given
        self._tokens = count(time.time_ns())
        self._swept = clock()

    # queue

    async def enqueue(self, queue: str, key: str, data: bytes, *, only_if_idle: bool = False) -> None:
        with self._lock:
            q = self._queues.setdefault(queue, _Queue())
            slot = q.keys.get(key)
            if slot is not None and only_if_idle:
                raise KeyBusy
            if q.total >= self.config.queue_backlog:
                raise QueueFull(f"the queue {queue!r} holds {q.total} messages")
            if slot is not None and len(slot.messages) > self.config.key_backlog:
                raise QueueFull(f"{key!r} has {len(slot.messages)} messages waiting")
            q.total += 1
            if slot is None:
                slot = q.keys[key] = _Key()
                slot.messages.append(_Message(data))
                self._make_ready(q, key, slot)
            else:
                slot.messages.append(_Message(data))

    @asynccontextmanager
    async def consume(
        self, queue: str, *, name: str | None = None, renew: bool = True
    ) -> AsyncIterator[MemoryConsumer]:
        consumer = MemoryConsumer(self, queue, renew)
        try:
            yield consumer
        finally:
            await consumer.close()

    async def wake(self, queue: str, key: str) -> None:
        with self._lock:
            q = self._queues.get(queue)
            slot = q.keys.get(key) if q else None
            if q is None or slot is None:
                return
            if slot.state == "held":
                self._make_ready(q, key, slot)
            elif slot.state == "flight":
                slot.woken = True

    async def depth(self, queue: str) -> QueueDepth:
        with self._lock:
            q = self._queues.get(queue) or _Queue()
            self._advance(q)
            held = sum(slot.state == "held" for slot in q.keys.values())
            oldest = q.keys[q.ready[0]].since if q.ready else self._clock()
            return QueueDepth(q.total - len(q.flight) - held, len(q.flight), held, self._clock() - oldest)

    def _make_ready(self, q: _Queue, key: str, slot: _Key) -> None:
        slot.state = "ready"
        slot.since = self._clock()
        q.ready.append(key)
        q.bell.ring()

    def _take(
        self, queue: str, max: int, renew: bool
    ) -> tuple[list[_MemoryDelivery], asyncio.Future[None] | None, float]:
        """Deliveries now; or none, a future to wait for, and for how many seconds at most (inf: no bound)."""
        with self._lock:
            q = self._queues.setdefault(queue, _Queue())
            self._advance(q)
            taken: list[_MemoryDelivery] = []
            while q.ready and len(taken) < max:
                key = q.ready.popleft()
                taken.append(self._start(queue, q, key, renew))
            if taken:
                return taken, None, 0.0
            return [], q.bell.listen(), self._next_due(q) - self._clock()

    def _start(self, queue: str, q: _Queue, key: str, renew: bool) -> _MemoryDelivery:
        slot = q.keys[key]
        message = slot.messages[0]
        message.starts += 1
        slot.state, slot.woken = "flight", False
        deadline = float("inf") if renew else self._clock() + self.config.lease_s
        delivery = _MemoryDelivery(self, queue, key, message, f"{next(self._tokens):020d}", deadline)
        q.flight[key] = delivery
        return delivery

    def _advance(self, q: _Queue) -> None:
        """Take back lapsed leases and let due ones go."""
        now = self._clock()
        for key, delivery in [item for item in q.flight.items() if item[1].deadline <= now]:
            delivery.lose()
            del q.flight[key]
            slot = q.keys[key]
            slot.messages[0].attempts += 1
            slot.messages[0].lapses += 1
            slot.state, slot.since = "ready", now
            q.ready.appendleft(key)  # it has waited longest
        while q.held and q.held[0][0] <= now:
            due, key = heapq.heappop(q.held)
            held = q.keys.get(key)
            if held is not None and held.state == "held" and held.due == due:
                self._make_ready(q, key, held)

    def _next_due(self, q: _Queue) -> float:
        lapses = min((delivery.deadline for delivery in q.flight.values()), default=float("inf"))
        return min(lapses, q.held[0][0] if q.held else float("inf"))

    def _settle(self, delivery: _MemoryDelivery, how: Literal["ack", "again", "hold"], *, counted: int = 0,
                for_s: float = 0.0) -> None:  # fmt: skip
        with self._lock:
            q = self._queues.setdefault(delivery.queue, _Queue())
            self._advance(q)
            if q.flight.get(delivery.key) is not delivery:
                delivery.lose()
                raise LeaseLost
            del q.flight[delivery.key]
            slot = q.keys[delivery.key]
            if how == "ack":
                slot.messages.popleft()
                q.total -= 1
                if not slot.messages:
                    del q.keys[delivery.key]
                    return
            else:
                slot.messages[0].attempts += counted
                slot.messages[0].lapses = 0
                if how == "hold" and not slot.woken:
                    slot.state, slot.due = "held", self._clock() + for_s
                    heapq.heappush(q.held, (slot.due, delivery.key))
                    q.bell.ring()  # whoever waits must wait less
                    return
            self._make_ready(q, delivery.key, slot)

    # topics

    async def append(
        self, topic: str, *data: bytes, fence: Fence | None = None, dedup: Dedup | None = None, forever: bool = False
    ) -> Appended:
        with self._lock:
            now = self._clock()
            self._sweep(now)
            t = self._live(topic) or self._topics.setdefault(topic, _Topic())
            if fence is not None and (repeated := _check(t, fence)) is not None:
                return repeated
            if dedup is not None and (earlier := self._earlier(topic, dedup, now)) is not None:
                if fence is not None:  # the writer is the newest all the same: from here on an older one is refused
                    t.fences[fence.writer] = (fence.token, fence.seq, earlier)
                return earlier
            appended = self._extend(t, data, forever, dedup.origin if dedup else "")
            t.expires = float("inf") if forever else now + self.config.stream_ttl_s
            if fence is not None:
                t.fences[fence.writer] = (fence.token, fence.seq, appended)
            if dedup is not None:
                self._dedup[topic, dedup.id] = (dedup.digest, appended, now + self.config.dedup_ttl_s)
            t.bell.ring()
            return appended

    async def find(self, topic: str, dedup_id: str) -> tuple[str, Appended] | None:
        with self._lock:
            known = self._dedup.get((topic, dedup_id))
            return known[:2] if known is not None and known[2] > self._clock() else None

    async def read(self, topic: str, after: Cursor = "", limit: int = 500, *, last: bool = False) -> Sequence[Entry]:
        with self._lock:
            return self._read(topic, parse_cursor(after), limit, last)

    async def tail(self, topic: str) -> Cursor:
        with self._lock:
            t = self._live(topic)
            return _spell(t.entries[-1][0]) if t and t.entries else START

    @asynccontextmanager
    async def subscribe(self, topic: str, after: Cursor = "") -> AsyncIterator[MemorySubscription]:
        yield MemorySubscription(self, topic, parse_cursor(after))

    async def expire(self, topic: str, ttl_s: float) -> None:
        with self._lock:
            if t := self._live(topic):
                t.expires = self._clock() + ttl_s

    async def ping(self) -> None:
        """Always there."""

    def _live(self, topic: str) -> _Topic | None:
        t = self._topics.get(topic)
        if t is not None and t.entries and t.expires <= self._clock():
            # who waits keeps its topic, so that the bell it listens to is the one that rings
            t.entries.clear()
            t.fences.clear()
        return t

    def _extend(self, t: _Topic, data: Sequence[bytes], forever: bool, origin: str) -> Appended:
        before = t.entries[-1][0] if t.entries else (0, 0)
        for payload in data:
            ms = max(time.time_ns() // 1_000_000, t.last[0])
            t.last = (ms, t.last[1] + 1 if ms == t.last[0] else 0)
            t.entries.append((t.last, payload))
        excess = len(t.entries) - self.config.stream_maxlen
        # trim with slack, as `MAXLEN ~` does: one entry at a time would move the whole list for each append
        if excess > self.config.stream_maxlen // 10 and not forever:
            del t.entries[:excess]
        return Appended(_spell(before), _spell(t.last) if data else _spell(before), origin=origin)

    def _earlier(self, topic: str, dedup: Dedup, now: float) -> Appended | None:
        known = self._dedup.get((topic, dedup.id))
        if known is None or known[2] <= now:
            return None
        if known[0] != dedup.digest:
            raise DedupConflict
        return replace(known[1], duplicate=True)

    def _read(self, topic: str, after: tuple[int, int], limit: int, last: bool = False) -> list[Entry]:
        t = self._live(topic)
        entries = t.entries if t else []
        start = 0
        if after > (0, 0):
            start = bisect_right(entries, after, key=_position)
            if start == 0 or entries[start - 1][0] != after:
                raise CursorExpired(earliest=_spell(entries[0][0]) if entries else None)
        if last:
            start = max(start, len(entries) - limit)
        return [Entry(_spell(position), data) for position, data in entries[start : start + limit]]

    def _poll(self, topic: str, after: tuple[int, int]) -> tuple[list[Entry], asyncio.Future[None] | None]:
        """Entries now, or a future to wait for."""
        with self._lock:
            batch = self._read(topic, after, _BATCH)
            if batch:
                return batch, None
            return [], self._topics.setdefault(topic, _Topic()).bell.listen()

    def _forget(self, topic: str, future: asyncio.Future[None]) -> None:
        with self._lock:
            if t := self._topics.get(topic):
                t.bell.forget(future)
                if not t.entries and not t.bell:
                    del self._topics[topic]

    def _sweep(self, now: float) -> None:
        while self._dedup and next(iter(self._dedup.values()))[2] <= now:
            self._dedup.popitem(last=False)
        if now - self._swept < _SWEEP_S:
            return
        self._swept = now
        for name in [name for name, t in self._topics.items() if t.expires <= now and not t.bell]:
            del self._topics[name]


def _position(entry: tuple[tuple[int, int], bytes]) -> tuple[int, int]:
    return entry[0]


def _spell(position: tuple[int, int]) -> Cursor:
    return f"{position[0]}-{position[1]}"


def _check(t: _Topic, fence: Fence) -> Appended | None:
    """What a repeat returned the first time, None for a new write; `LeaseLost` for a stale one."""
    known = t.fences.get(fence.writer)
    if known is None or fence.token > known[0]:
        return None
    if fence.token < known[0]:
        raise LeaseLost
    return known[2] if fence.seq <= known[1] else None


class MemoryConsumer:
    """A `Consumer` of a `MemoryBus`."""

    def __init__(self, bus: MemoryBus, queue: str, renew: bool) -> None:
        self._bus = bus
        self._queue = queue
        self._renew = renew
        self._handed: list[_MemoryDelivery] = []

    async def receive(self, max: int = 1) -> Sequence[Delivery]:
        while True:
            taken, bell, wait_s = self._bus._take(self._queue, max, self._renew)
            if bell is None:
                # no await between taking and returning: a cancelled receive has taken nothing
                self._handed = [delivery for delivery in self._handed if delivery.open] + taken
                return taken
            try:
                await asyncio.wait({bell}, timeout=None if wait_s == float("inf") else wait_s if wait_s > 0 else 0.0)
            finally:
                if not bell.done():
                    with self._bus._lock:
                        self._bus._queues[self._queue].bell.forget(bell)

    async def stop(self) -> None:
        """Nothing arrives that no `receive` returns."""

    async def close(self) -> None:
        """Hand back what was received and not settled."""
        for delivery in self._handed:
            if delivery.open:
                with contextlib.suppress(LeaseLost):  # it lapsed and nobody has looked since
                    await delivery.release()
                delivery.lose()


class _MemoryDelivery:
    """A `Delivery` of a `MemoryBus`. Being the object in the flight table is holding the lease."""

    def __init__(self, bus: MemoryBus, queue: str, key: str, message: _Message, token: str, deadline: float) -> None:
        self._bus = bus
        self._loop = asyncio.get_running_loop()
        self.queue = queue
        self.key = key
        self.data = message.data
        self.attempt = message.attempts + 1
        self.starts = message.starts
        self.lapses = message.lapses
        self.token = token
        self.deadline = deadline
        self.lost = asyncio.Event()
        self.open = True

    def lose(self) -> None:
        self.open = False
        _call_in(self._loop, self.lost.set)

    async def ack(self) -> None:
        self._bus._settle(self, "ack")
        self.open = False

    async def nack(self, *, delay_s: float = 0.0) -> None:
        self._bus._settle(self, "hold" if delay_s > 0 else "again", counted=1, for_s=delay_s)
        self.open = False

    async def park(self, for_s: float) -> None:
        self._bus._settle(self, "hold", for_s=for_s)
        self.open = False

    async def release(self) -> None:
        self._bus._settle(self, "again")
        self.open = False


class MemorySubscription:
    """A `Subscription` of a `MemoryBus`: it reads the log itself, so a slow reader costs nothing but its place."""

    def __init__(self, bus: MemoryBus, topic: str, after: tuple[int, int]) -> None:
        self._bus = bus
        self._topic = topic
        self._after = after

    async def __aiter__(self) -> AsyncIterator[Sequence[Entry]]:
        while True:
            batch, bell = self._bus._poll(self._topic, self._after)
            if bell is None:
                self._after = parse_cursor(batch[-1].cursor)
                yield batch
                continue
            try:
                await bell
            finally:
                if not bell.done() or bell.cancelled():
                    self._bus._forget(self._topic, bell)


__all__ = ["MemoryBus"]
