"""Random histories against a simple model: what the queue and the topics promise, in any order of calls.

One engine drives every keeper. Time is moved, not waited for: `MemoryBus` takes a clock, and on Redis the ages of
leases and the dates of held messages are shifted.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from uuid import uuid4

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from magent2.bus import redis_queue
from magent2.bus.interface import Appended, Bus, BusConfig, Consumer, Dedup, Delivery, Entry
from magent2.bus.memory import MemoryBus
from magent2.bus.redis import RedisBus
from magent2.bus.redis_queue import GROUP, QueueKeys
from magent2.errors import CursorExpired, DedupConflict, KeyBusy, LeaseLost, QueueFull
from magent2.models.run import Fence
from magent2.redis_link import RedisLink
from tests.conftest import REDIS_NAMES, server_named
from tests.support.servers import RedisServer

T = TypeVar("T")

KEYS = ("a", "b", "c")
# Time passes in steps of 35 s, a lease is 60 s, delays are 25 s and 65 s: no two of them ever meet, so the real time a
# test takes decides nothing.
STEP_S = 35
CONFIG = BusConfig(lease_s=60, key_backlog=4, queue_backlog=9, stream_maxlen=20, stall_s=600)
DELAYS = (25.0, 65.0)


class Keeper(Protocol):
    """A bus under test and the way to let time pass for it."""

    async def open(self, stack: AsyncExitStack) -> Bus:
        """A bus, closed with the stack."""

    def advance(self, queue: str, unrenewed: set[str]) -> None:
        """Let `STEP_S` pass; leases of the consumers `unrenewed` age, those of others are renewed."""


class MemoryKeeper:
    def __init__(self) -> None:
        self._now = 1000.0

    async def open(self, stack: AsyncExitStack) -> Bus:
        return MemoryBus(CONFIG, clock=lambda: self._now)

    def advance(self, queue: str, unrenewed: set[str]) -> None:
        self._now += STEP_S


class RedisKeeper:
    def __init__(self, server: RedisServer, client: redis.Redis) -> None:
        self._url = server.url
        self._client = client

    async def open(self, stack: AsyncExitStack) -> Bus:
        link = RedisLink(self._url)
        stack.push_async_callback(link.aclose)
        bus = RedisBus(link, CONFIG)
        stack.push_async_callback(bus.aclose)
        return bus

    def advance(self, queue: str, unrenewed: set[str]) -> None:
        keys = QueueKeys.of(*queue.split(":"))
        for member in self._client.zrange(keys.due, 0, -1):
            self._client.zincrby(keys.due, -STEP_S * 1000, member)  # type: ignore[arg-type]
        try:
            pending: list[dict[str, Any]] = self._client.xpending_range(keys.ready, GROUP, "-", "+", 100)
        except redis.ResponseError:  # nobody has received yet: there is no group
            return
        for held in pending:
            name = held["consumer"].decode()
            if name in unrenewed:
                idle = held["time_since_delivered"] + STEP_S * 1000
                self._client.xclaim(keys.ready, GROUP, name, 0, [held["message_id"]], idle=idle, justid=True)


class Machine(RuleBasedStateMachine):
    """An event loop, a bus and fresh names; subclasses add the rules and the model."""

    keeper: Keeper

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.name = uuid4().hex
        self.bus: Bus = self.run(self.keeper.open(self.stack))

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(10):
                return await call

        return self.runner.run(bounded())

    def finish(self) -> None:
        """What must hold at the end."""

    def teardown(self) -> None:
        try:
            self.finish()
        finally:
            self.run(self.stack.aclose())
            self.runner.close()


# the queue


@dataclass
class Message:
    """`attempts`: how many were counted so far; a hand-back after the lease lapsed may or may not have been."""

    data: bytes
    attempts: set[int] = field(default_factory=lambda: {0})
    starts: int = 0


@dataclass(eq=False)
class Held:
    """A delivery as the model sees it."""

    delivery: Delivery
    member: Member
    since: int


@dataclass(eq=False)
class Member:
    name: str
    consumer: Consumer
    renew: bool
    stack: AsyncExitStack


@dataclass
class Key:
    messages: list[Message] = field(default_factory=list)
    flight: Held | None = None
    due: float | None = None  # while parked or delayed
    woken: bool = False
    token: str = ""


class QueueMachine(Machine):
    def __init__(self) -> None:
        super().__init__()
        self.queue = f"agent:{self.name}"
        self.now = 0
        self.sent = 0
        self.model = {key: Key() for key in KEYS}
        self.members: list[Member] = []
        self.over: list[Held] = []  # deliveries that ended in whatever way
        self.joined = 0

    # what the model knows

    def lapsed(self, key: Key) -> bool:
        held = key.flight
        return held is not None and not held.member.renew and held.since + CONFIG.lease_s <= self.now

    def available(self, key: Key) -> bool:
        if key.flight is not None:
            return self.lapsed(key)
        return bool(key.messages) and (key.due is None or key.due <= self.now)

    def in_flight(self) -> list[Held]:
        return [key.flight for key in self.model.values() if key.flight is not None]

    def end(self, key: Key, *, counted: bool | None = False) -> None:
        """A delivery is over; None: nobody knows whether it counted."""
        assert key.flight is not None
        attempts = key.messages[0].attempts
        bumped = {n + 1 for n in attempts}
        key.messages[0].attempts = attempts | bumped if counted is None else bumped if counted else attempts
        self.over.append(key.flight)
        key.flight, key.due, key.woken = None, None, False

    # rules

    @initialize()
    def start(self) -> None:
        """Enough to do, so that few steps go far."""
        for renew in (True, False):
            self.join(renew)
        for key in (*KEYS, *KEYS[:2]):
            self.send(key, False)

    @rule(key=st.sampled_from(KEYS), only_if_idle=st.booleans())
    def send(self, key: str, only_if_idle: bool) -> None:
        slot = self.model[key]
        total = sum(len(each.messages) for each in self.model.values())
        self.sent += 1
        data = b"%d" % self.sent
        sending = self.bus.enqueue(self.queue, key, data, only_if_idle=only_if_idle)
        if only_if_idle and slot.messages:
            with pytest.raises(KeyBusy):
                self.run(sending)
        elif total >= CONFIG.queue_backlog or len(slot.messages) > CONFIG.key_backlog:
            with pytest.raises(QueueFull):
                self.run(sending)
        else:
            self.run(sending)
            slot.messages.append(Message(data))

    @precondition(lambda self: len(self.members) < 3)
    @rule(renew=st.booleans())
    def join(self, renew: bool) -> None:
        self.joined += 1
        name = f"c{self.joined}"
        stack = AsyncExitStack()
        entering = stack.enter_async_context(self.bus.consume(self.queue, name=name, renew=renew))
        self.members.append(Member(name, self.run(entering), renew, stack))

    @precondition(lambda self: len(self.members) > 1)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        member = data.draw(st.sampled_from(self.members))
        self.members.remove(member)
        self.run(member.stack.aclose())
        for key in self.model.values():
            if key.flight is not None and key.flight.member is member:
                assert key.flight.delivery.lost.is_set()
                self.end(key, counted=None if self.lapsed(key) else False)

    @precondition(lambda self: any(self.available(key) for key in self.model.values()))
    @rule(data=st.data(), max=st.integers(1, 4))
    def receive(self, data: st.DataObject, max: int) -> None:
        self.take(data.draw(st.sampled_from(self.members)), max)

    @precondition(lambda self: any(self.available(key) for key in self.model.values()))
    @rule(data=st.data(), steps=st.integers(0, 2))
    def receive_after_a_while(self, data: st.DataObject, steps: int) -> None:
        for _ in range(steps):
            self.time_passes()
        self.take(data.draw(st.sampled_from(self.members)), 4)

    def take(self, member: Member, max: int) -> None:
        deliveries = self.run(member.consumer.receive(max))
        assert 1 <= len(deliveries) <= max
        for delivery in deliveries:
            key = self.model[delivery.key]
            assert self.available(key), "a key in flight, held or empty was delivered"
            if key.flight is not None:  # lapsed
                self.end(key, counted=True)
            message = key.messages[0]
            message.starts += 1
            assert delivery.data == message.data
            assert delivery.starts == message.starts
            assert delivery.attempt - 1 in message.attempts
            assert delivery.token > key.token
            assert not delivery.lost.is_set()
            message.attempts = {delivery.attempt - 1}
            key.token, key.due, key.woken = delivery.token, None, False
            key.flight = Held(delivery, member, self.now)

    def settle(self, held: Held, settling: Coroutine[Any, Any, None], *, counted: bool = False) -> Key | None:
        """Settle; the model's key if it is to be changed, None if the lease had lapsed."""
        key = self.model[held.delivery.key]
        try:
            self.run(settling)
        except LeaseLost:
            assert self.lapsed(key), "a lease was lost that had not lapsed"
            assert held.delivery.lost.is_set()
            if key.due is None:
                self.end(key, counted=True)
            return None
        woken = key.woken
        self.end(key, counted=counted)
        key.woken = woken
        return key

    @precondition(lambda self: self.in_flight())
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.in_flight()))
        if key := self.settle(held, held.delivery.ack()):
            key.messages.pop(0)
            key.woken = False

    @precondition(lambda self: self.in_flight())
    @rule(data=st.data(), delay_s=st.sampled_from((0.0, *DELAYS)))
    def nack(self, data: st.DataObject, delay_s: float) -> None:
        held = data.draw(st.sampled_from(self.in_flight()))
        if key := self.settle(held, held.delivery.nack(delay_s=delay_s), counted=True):
            self.hold(key, delay_s)

    @precondition(lambda self: self.in_flight())
    @rule(data=st.data(), for_s=st.sampled_from(DELAYS))
    def park(self, data: st.DataObject, for_s: float) -> None:
        held = data.draw(st.sampled_from(self.in_flight()))
        if key := self.settle(held, held.delivery.park(for_s)):
            self.hold(key, for_s)

    def hold(self, key: Key, for_s: float) -> None:
        key.due = self.now + for_s if for_s and not key.woken else None
        key.woken = False

    @precondition(lambda self: self.in_flight())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.in_flight()))
        if key := self.settle(held, held.delivery.release()):
            key.woken = False

    @precondition(lambda self: self.over)
    @rule(data=st.data(), how=st.sampled_from(("ack", "nack", "park", "release")))
    def settle_what_is_over(self, data: st.DataObject, how: str) -> None:
        # above all those whose message another delivery has now
        taken_over = [held for held in self.over if (now := self.model[held.delivery.key].flight) is not None
                      and now.delivery.data == held.delivery.data]  # fmt: skip
        delivery = data.draw(st.sampled_from(taken_over or self.over)).delivery
        with pytest.raises(LeaseLost):
            self.run(delivery.park(25) if how == "park" else getattr(delivery, how)())

    @rule(key=st.sampled_from(KEYS))
    def wake(self, key: str) -> None:
        slot = self.model[key]
        self.run(self.bus.wake(self.queue, key))
        slot.due = None
        slot.woken = slot.flight is not None

    @rule()
    def time_passes(self) -> None:
        self.now += STEP_S
        self.keeper.advance(self.queue, {member.name for member in self.members if not member.renew})

    # what must always hold

    @invariant()
    def depth_counts(self) -> None:
        depth = self.run(self.bus.depth(self.queue))
        keys = self.model.values()
        flight, lapsed = len(self.in_flight()), sum(self.lapsed(key) for key in keys)
        held = [key.due for key in keys if key.due is not None]
        due = sum(when <= self.now for when in held)
        # who lapsed or is due counts as before until somebody has looked
        assert flight - lapsed <= depth.in_flight <= flight
        assert len(held) - due <= depth.parked <= len(held)
        assert depth.waiting + depth.in_flight + depth.parked == sum(len(key.messages) for key in keys)
        assert depth.oldest_age_s >= 0

    def finish(self) -> None:
        """Nothing is lost: drain, and see each message left, in order."""
        for member in self.members:
            self.run(member.stack.aclose())
        for key in self.model.values():
            if key.flight is not None:
                self.end(key, counted=None if self.lapsed(key) else False)
        self.members = []
        self.join(True)
        for name in KEYS:
            self.wake(name)
        while any(key.messages for key in self.model.values()):
            self.take(self.members[0], 2)
            for held in self.in_flight():
                self.run(held.delivery.ack())
                key = self.model[held.delivery.key]
                self.end(key)
                key.messages.pop(0)
        self.depth_counts()
        self.run(self.members[0].stack.aclose())


# topics


@dataclass
class Writer:
    token: int = 0
    seq: int = 0
    last: Appended | None = None


class TopicMachine(Machine):
    def __init__(self) -> None:
        super().__init__()
        self.topic = f"log:{self.name}"
        self.entries: list[Entry] = []
        self.sent = 0
        self.writers = {"v": Writer(), "w": Writer()}
        self.known: dict[str, tuple[str, Appended]] = {}

    def payloads(self, n: int) -> list[bytes]:
        self.sent += n
        return [b"%d" % number for number in range(self.sent - n, self.sent)]

    def landed(self, appended: Appended, data: list[bytes]) -> None:
        """Note new entries, and check what the append said of their place."""
        assert not appended.duplicate
        assert appended.before == (self.entries[-1].cursor if self.entries else "0-0")
        new = self.run(self.bus.read(self.topic, appended.before, 100))
        assert [entry.data for entry in new] == data
        assert new[-1].cursor == appended.last == self.run(self.bus.tail(self.topic))
        self.entries += new
        places = [tuple(map(int, entry.cursor.split("-"))) for entry in self.entries[-len(data) - 1 :]]
        assert places == sorted(set(places))

    @rule(n=st.integers(1, 15))  # less than what is kept, so that the entry before them still is
    def append(self, n: int) -> None:
        data = self.payloads(n)
        self.landed(self.run(self.bus.append(self.topic, *data)), data)

    @rule(name=st.sampled_from("vw"), n=st.integers(1, 3), step=st.integers(1, 2), new_token=st.booleans())
    def append_fenced(self, name: str, n: int, step: int, new_token: bool) -> None:
        writer, data = self.writers[name], self.payloads(n)
        token, seq = (writer.token + step, 1) if new_token or not writer.token else (writer.token, writer.seq + step)
        appended = self.run(self.bus.append(self.topic, *data, fence=Fence(name, f"{token:04d}", seq)))
        self.landed(appended, data)
        self.writers[name] = Writer(token, seq, appended)

    @rule(name=st.sampled_from("vw"), back=st.integers(0, 1))
    def repeat(self, name: str, back: int) -> None:
        writer = self.writers[name]
        if writer.last is not None:
            fence = Fence(name, f"{writer.token:04d}", writer.seq - back)
            again = self.run(self.bus.append(self.topic, *self.payloads(1), fence=fence))
            assert (again.before, again.last) == (writer.last.before, writer.last.last)

    @rule(name=st.sampled_from("vw"))
    def append_stale(self, name: str) -> None:
        writer = self.writers[name]
        if writer.last is not None:
            fence = Fence(name, f"{writer.token - 1:04d}", writer.seq + 1)
            with pytest.raises(LeaseLost):
                self.run(self.bus.append(self.topic, *self.payloads(1), fence=fence))

    @rule(id=st.sampled_from("xyz"), digest=st.sampled_from("de"), n=st.integers(1, 3))
    def append_once(self, id: str, digest: str, n: int) -> None:
        data = self.payloads(n)
        appending = self.bus.append(self.topic, *data, dedup=Dedup(id, digest))
        earlier = self.known.get(id)
        if earlier is None:
            appended = self.run(appending)
            self.landed(appended, data)
            self.known[id] = (digest, appended)
        elif earlier[0] != digest:
            with pytest.raises(DedupConflict):
                self.run(appending)
        else:
            again = self.run(appending)
            assert (again.before, again.last, again.duplicate) == (earlier[1].before, earlier[1].last, True)

    @rule(id=st.sampled_from("xyz"))
    def find(self, id: str) -> None:
        found, known = self.run(self.bus.find(self.topic, id)), self.known.get(id)
        assert (found and (found[0], found[1].last)) == (known and (known[0], known[1].last))

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), limit=st.integers(1, 40), last=st.booleans())
    def read_from_earlier(self, data: st.DataObject, limit: int, last: bool) -> None:
        index = data.draw(st.integers(0, len(self.entries) - 1))
        cursor, kept = self.entries[index].cursor, self.kept()
        if len(self.entries) - index > len(kept):
            with pytest.raises(CursorExpired) as caught:
                self.run(self.bus.read(self.topic, cursor, limit, last=last))
            assert caught.value.earliest == kept[0].cursor
        else:
            after = self.entries[index + 1 :]
            assert self.run(self.bus.read(self.topic, cursor, limit, last=last)) == (
                after[-limit:] if last else after[:limit]
            )

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def follow_from_earlier(self, data: st.DataObject) -> None:
        kept = self.kept()
        index = data.draw(st.integers(0, len(kept) - 1))
        due = kept[index + 1 :]

        async def follow() -> list[Entry]:
            seen: list[Entry] = []
            async with self.bus.subscribe(self.topic, kept[index].cursor) as subscription:
                batches = aiter(subscription)
                while len(seen) < len(due):
                    seen += await anext(batches)
            return seen

        assert self.run(follow()) == due

    def kept(self) -> list[Entry]:
        return list(self.run(self.bus.read(self.topic, limit=10_000)))

    @invariant()
    def what_is_kept_is_the_newest(self) -> None:
        kept = self.kept()
        assert kept == self.entries[len(self.entries) - len(kept) :]
        assert len(kept) >= min(len(self.entries), CONFIG.stream_maxlen)
        assert len(kept) <= CONFIG.stream_maxlen + 100 + 15  # Redis lets go of whole nodes of a hundred


def run_machine(machine: type[Machine], keeper: Keeper, examples: int) -> None:
    bound = type(machine.__name__, (machine,), {"keeper": keeper})
    run_state_machine_as_test(
        bound,
        settings=settings(
            max_examples=examples // 4 if settings.get_current_profile_name() == "quick" else examples,
            stateful_step_count=40,
            deadline=None,
            print_blob=True,
            derandomize="CI" in os.environ,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture
def redis_keeper(servers: dict[str, RedisServer], monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisKeeper]:
    monkeypatch.setattr(redis_queue, "TICK_S", 0.002)  # look for what lapsed and is due at each receive
    server = server_named(servers, REDIS_NAMES[0])
    with redis.Redis.from_url(server.url) as client:
        yield RedisKeeper(server, client)


@pytest.mark.parametrize(("machine", "examples"), [(QueueMachine, 120), (TopicMachine, 60)])
@pytest.mark.promise("M15")
def test_the_memory_bus_behaves_as_the_model(machine: type[Machine], examples: int) -> None:
    run_machine(machine, MemoryKeeper(), examples)


@pytest.mark.redis
@pytest.mark.parametrize(("machine", "examples"), [(QueueMachine, 40), (TopicMachine, 20)])
@pytest.mark.promise("M15")
def test_the_redis_bus_behaves_as_the_model(machine: type[Machine], examples: int, redis_keeper: RedisKeeper) -> None:
    run_machine(machine, redis_keeper, examples)
