"""Consumers of a queue on Redis: deliveries under a lease that a thread renews.

The ready stream holds one entry per ordering key, carrying the key's head message; the group's pending list is the
table of leases. (consumer, delivery count) of an entry says whose it is, and every settling script checks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import redis
from redis.exceptions import NoScriptError, RedisError, ResponseError

from magent2.bus.interface import BusConfig, Delivery
from magent2.errors import LeaseLost, Unavailable
from magent2.redis_link import Arg, RedisLink, as_ours, load_script

logger = logging.getLogger(__name__)

GROUP = "workers"
BLOCK_S = 0.5
"""How long a read blocks at most. It is never cancelled: redis-py would lose what was delivered meanwhile."""
TICK_S = 1.0
"""How often lapsed leases and due messages are looked for, at least."""
_FORGET_CONSUMER_S = 600.0
_SWEEP_EVERY_TICKS = 60

_PACKAGE = "magent2.bus"
_SETTLE = load_script(_PACKAGE, "settle")
_TICK = load_script(_PACKAGE, "tick")
_RENEW = load_script(_PACKAGE, "renew")
_REVIVE = load_script(_PACKAGE, "revive")
_LEAVE = load_script(_PACKAGE, "leave")


@dataclass(frozen=True, slots=True)
class QueueKeys:
    """The Redis keys of one queue, all with its tag, so that they share a cluster slot."""

    ready: str
    keys: str
    total: str
    held: str
    due: str
    woken: str
    backlogs: str

    @classmethod
    def of(cls, kind: str, rest: str) -> QueueKeys:
        """The keys of the queue `kind:rest`."""
        base = f"magent2:{kind}:{{{rest}}}"
        names = ("ready", "keys", "total", "held", "due", "woken", "backlog:")
        return cls(*(f"{base}:{name}" for name in names))

    def backlog(self, key: str) -> str:
        """The list of what waits behind the head of an ordering key."""
        return self.backlogs + key


class RedisDelivery:
    """A `Delivery`: one entry of the ready stream, held by one consumer at one delivery count."""

    def __init__(self, consumer: RedisConsumer, id: str, count: int, fields: dict[bytes, bytes]) -> None:
        self._consumer = consumer
        self.id = id
        self.count = count
        self.key = fields[b"k"].decode()
        self.data = fields[b"d"]
        self.attempt = int(fields[b"a"]) + count
        self.starts = int(fields[b"n"]) + count
        self.lapses = count - 1  # settling makes a new entry
        ms, _, seq = id.partition("-")
        # entry ids of one stream only grow, and so does the delivery count of one entry
        self.token = f"{int(ms):020d}-{int(seq):020d}-{count:010d}"
        self.lost = asyncio.Event()

    async def ack(self) -> None:
        await self._consumer.settle(self, "ack")

    async def nack(self, *, delay_s: float = 0.0) -> None:
        await self._consumer.settle(self, "hold" if delay_s > 0 else "again", counted=True, for_s=delay_s)

    async def park(self, for_s: float) -> None:
        await self._consumer.settle(self, "hold", for_s=for_s)

    async def release(self) -> None:
        await self._consumer.settle(self, "again")


class RedisConsumer:
    """A `Consumer`. One blocking connection reads, the shared link settles, a thread renews."""

    def __init__(self, link: RedisLink, keys: QueueKeys, name: str, config: BusConfig, *, renew: bool) -> None:
        self.name = name
        self.keys = keys
        self._link = link
        self._config = config
        self._arrived: deque[RedisDelivery] = deque()
        self._open: dict[str, RedisDelivery] = {}
        self._reading: asyncio.Task[None] | None = None
        self._blocking = link.blocking_client(BLOCK_S)
        self._blocking_id: int | None = None  # the server's id of that connection, while it lives
        self._closing = False
        self._ticked = 0.0
        self._ticks = 0
        self._due_s = TICK_S
        self._leases = _LeaseKeeper(link, keys.ready, name, config, self.lose) if renew else None

    async def receive(self, max: int = 1) -> Sequence[Delivery]:
        while not self._arrived:
            if self._reading is None:
                self._reading = asyncio.create_task(self._read(max), name="magent2-receive")
            reading = self._reading
            await asyncio.wait({reading})  # unlike awaiting the task, cancelling this does not cancel it
            if self._reading is reading:  # else another receive has seen to it
                self._reading = None
                reading.result()
        return [self._arrived.popleft() for _ in range(min(max, len(self._arrived)))]

    async def settle(
        self, delivery: RedisDelivery, how: Literal["ack", "again", "hold"], *, counted: bool = False, for_s: float = 0
    ) -> None:
        """End a delivery. After `Unavailable` it is still open and may be settled again."""
        keys = self.keys
        script_keys = [keys.ready, keys.keys, keys.backlog(delivery.key), keys.total, keys.held, keys.due, keys.woken]
        args: list[Arg] = [GROUP, self.name, delivery.id, delivery.count, delivery.key, how]
        args += [int(counted), int(for_s * 1000)]
        try:
            await self._link.script(_SETTLE, script_keys, args)
        except LeaseLost:
            delivery.lost.set()
            self._forget(delivery)
            raise
        self._forget(delivery)
        if how == "hold":  # look again in time
            self._due_s = min(self._due_s, time.monotonic() - self._ticked + for_s)

    def lose(self, delivery: RedisDelivery) -> None:
        """Note that somebody else holds it now; nothing to do if it was settled meanwhile."""
        if self._open.get(delivery.id) is delivery:
            delivery.lost.set()
            self._forget(delivery)
            if delivery in self._arrived:
                self._arrived.remove(delivery)

    async def stop(self) -> None:
        self._closing = True
        await self._end_reading()
        while self._arrived:
            with contextlib.suppress(LeaseLost, Unavailable):
                await self._arrived.popleft().release()

    async def close(self) -> None:
        """Hand back what was received and not settled, and leave the group."""
        if self._leases is not None:
            self._leases.stop()  # first: were this cancelled, the thread would hold the leases for ever
        await self.stop()
        for delivery in list(self._open.values()):
            # who cannot be reached now gets it back when the lease lapses
            with contextlib.suppress(LeaseLost, Unavailable):
                await delivery.release()
            delivery.lost.set()
        if self._leases is not None:
            await asyncio.to_thread(self._leases.join)
        with contextlib.suppress(Unavailable):
            await self._link.script(_LEAVE, [self.keys.ready], [GROUP, self.name, int(_FORGET_CONSUMER_S * 1000)])
        await self._blocking.aclose()

    async def _end_reading(self) -> None:
        """Unblock the read under way and keep what it brings; it would end by itself within `BLOCK_S`."""
        if self._reading is None:
            return
        with contextlib.suppress(Unavailable):
            if self._blocking_id is not None:
                await self._link.command("CLIENT", "UNBLOCK", self._blocking_id)
        await asyncio.wait({self._reading})
        if error := self._reading.exception():
            logger.debug("the last read failed: %s", type(error).__name__)

    def _forget(self, delivery: RedisDelivery) -> None:
        if self._open.get(delivery.id) is delivery:
            del self._open[delivery.id]
        if self._leases is not None:
            self._leases.remove(delivery)

    async def _read(self, max: int) -> None:
        """One round: what is due or lapsed if it is time to look, else what is ready, waiting for up to `BLOCK_S`."""
        try:
            if time.monotonic() - self._ticked >= min(TICK_S, self._due_s):
                await self._tick(max)
            if not self._arrived:
                await self._read_ready(max)
        except ResponseError as error:
            if str(error).startswith("UNBLOCKED"):  # the stream went while we waited: the next round sees to it
                return
            if "NOGROUP" not in str(error):  # a script says it with a prefix of its own
                raise
            # no stream or no group: a new queue, or the server lost it
            await self._link.script(_REVIVE, [self.keys.ready, self.keys.keys, self.keys.total],
                                    [GROUP, self.keys.backlogs])  # fmt: skip

    async def _tick(self, max: int) -> None:
        keys, lease_ms = self.keys, int(self._config.lease_s * 1000)
        due_ms, *claimed = await self._link.script(
            _TICK, [keys.ready, keys.keys, keys.held, keys.due, keys.woken], [GROUP, self.name, lease_ms, max]
        )
        self._ticked = time.monotonic()
        self._due_s = TICK_S if due_ms < 0 else due_ms / 1000
        for id, count, key, data, attempts, starts in claimed:
            self._add(id, count, {b"k": key, b"d": data, b"a": attempts, b"n": starts})
        self._ticks += 1
        if self._ticks % _SWEEP_EVERY_TICKS == 0:
            await self._link.script(_LEAVE, [keys.ready], [GROUP, "", int(_FORGET_CONSUMER_S * 1000)])

    async def _read_ready(self, max: int) -> None:
        wait_s = min(BLOCK_S, self._due_s, self._ticked + TICK_S - time.monotonic())
        block_ms = int(wait_s * 1000)
        if block_ms < 1:
            block_ms = 1  # 0 would block for ever
        try:
            if self._blocking_id is None:
                self._blocking_id = int(await self._blocking.client_id())
            if self._closing:
                return
            reply = await self._blocking.execute_command(  # type: ignore[no-untyped-call]
                "XREADGROUP",
                "GROUP",
                GROUP,
                self.name,
                "COUNT",
                max,
                "BLOCK",
                block_ms,
                "STREAMS",
                self.keys.ready,
                ">",
            )
        except RedisError as error:
            if isinstance(ours := as_ours(error), Unavailable):
                self._blocking_id = None
                raise ours from error
            raise
        for _, entries in reply or ():
            for id, fields in entries:
                if fields:
                    self._add(id, 1, fields)

    def _add(self, id: bytes, count: int, fields: dict[bytes, bytes]) -> None:
        delivery = RedisDelivery(self, id.decode(), count, fields)
        if older := self._open.get(delivery.id):
            self.lose(older)  # it lapsed and came back to us: one of a key is in flight
        self._open[delivery.id] = delivery
        self._arrived.append(delivery)
        if self._leases is not None:
            self._leases.add(delivery)


class _LeaseKeeper:
    """Renews leases every third of the lease, from a thread with a client of its own: a busy event loop keeps its jobs.

    A loop that has not run for `stall_s` is taken for dead, and its leases lapse.
    """

    def __init__(
        self, link: RedisLink, ready: str, consumer: str, config: BusConfig, lose: Callable[[RedisDelivery], None]
    ) -> None:
        self._client = link.thread_client()
        self._ready = ready
        self._consumer = consumer
        self._config = config
        self._lose = lose
        self._loop = asyncio.get_running_loop()
        self._held: dict[str, RedisDelivery] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._seen_alive = time.monotonic()
        self._alive_asked = False
        self._thread = threading.Thread(target=self._run, name="magent2-leases", daemon=True)
        self._thread.start()

    def add(self, delivery: RedisDelivery) -> None:
        with self._lock:
            self._held[delivery.id] = delivery

    def remove(self, delivery: RedisDelivery) -> None:
        with self._lock:
            if self._held.get(delivery.id) is delivery:
                del self._held[delivery.id]

    def stop(self) -> None:
        """Renew no more. Does not wait."""
        self._stop.set()

    def join(self) -> None:
        """Wait for the thread to end."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._renew_until_stopped()
        finally:
            self._client.close()

    def _renew_until_stopped(self) -> None:
        wait_s = self._config.lease_s / 3
        while not self._stop.wait(wait_s):
            try:
                self._ask_alive()
                if time.monotonic() - self._seen_alive < self._config.stall_s:
                    self._renew()
                wait_s = self._config.lease_s / 3
            except (RedisError, OSError) as error:
                logger.warning("leases not renewed (%s), trying again", type(error).__name__)
                wait_s = min(0.5, self._config.lease_s / 10)
            except RuntimeError:
                return  # the loop is closed
            except Exception:
                logger.exception("leases not renewed, trying again")  # the thread must not die before its worker

    def _ask_alive(self) -> None:
        """Have the loop note that it runs; one question at a time."""
        if not self._alive_asked:
            self._alive_asked = True
            self._loop.call_soon_threadsafe(self._alive)

    def _alive(self) -> None:
        self._seen_alive = time.monotonic()
        self._alive_asked = False

    def _renew(self) -> None:
        with self._lock:
            held = list(self._held.values())
        if not held:
            return
        args: list[str | int] = [GROUP, self._consumer]
        for delivery in held:
            args += [delivery.id, delivery.count]
        lost = {id.decode() for id in self._call(args)}
        for delivery in held:
            if delivery.id in lost:
                self.remove(delivery)
                self._loop.call_soon_threadsafe(self._lose, delivery)

    def _call(self, args: list[str | int]) -> list[bytes]:
        client: redis.Redis = self._client
        try:
            reply = client.evalsha(_RENEW.sha, 1, self._ready, *args)
        except NoScriptError:
            reply = client.eval(_RENEW.source, 1, self._ready, *args)
        ids: list[bytes] = reply
        return ids
