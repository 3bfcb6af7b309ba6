"""What every bus must do. A new keeper adds one line to `make_bus`."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest

from magent2.bus import redis_queue
from magent2.bus.interface import Bus, BusConfig, Cursor, Dedup, Delivery, Entry
from magent2.bus.memory import MemoryBus
from magent2.bus.redis import RedisBus
from magent2.errors import BadCursor, CursorExpired, DedupConflict, KeyBusy, LeaseLost, QueueFull
from magent2.models.run import Fence
from magent2.redis_link import RedisLink
from tests.conftest import REDIS_NAMES, server_named
from tests.support.servers import RedisServer
from tests.support.wait import wait_until

pytestmark = pytest.mark.anyio

LEASE_S = 0.2
"""Of the tests about leases; the others have one that never lapses, however slow the machine."""
MakeBus = Callable[..., Awaitable[Bus]]


@asynccontextmanager
async def redis_bus(url: str, config: BusConfig) -> AsyncIterator[RedisBus]:
    link = RedisLink(url)
    bus = RedisBus(link, config)
    try:
        yield bus
    finally:
        await bus.aclose()
        await link.aclose()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for lapsed leases and due messages often: once a second would be most of the time these tests take."""
    monkeypatch.setattr(redis_queue, "TICK_S", 0.02)


@pytest.fixture(params=["memory", *(pytest.param(name, marks=pytest.mark.redis) for name in REDIS_NAMES)])
def keeper(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
async def make_bus(keeper: str, servers: dict[str, RedisServer]) -> AsyncIterator[MakeBus]:
    """Makes a bus with its bounds changed; each is closed at the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(**bounds: float) -> Bus:
            config = BusConfig(**bounds)  # type: ignore[arg-type]
            if keeper == "memory":
                return MemoryBus(config)
            return await stack.enter_async_context(redis_bus(server_named(servers, keeper).url, config))

        yield make


@pytest.fixture
async def bus(make_bus: MakeBus) -> Bus:
    return await make_bus()


@pytest.fixture
async def short_lease_bus(make_bus: MakeBus, keeper: str) -> Bus:
    # in one process no renewal can come late: there a lease may be short
    return await make_bus(lease_s=LEASE_S / 4 if keeper == "memory" else LEASE_S)


@pytest.fixture
def queue() -> str:
    return f"agent:{uuid4().hex}"


@pytest.fixture
def topic() -> str:
    return f"log:{uuid4().hex}"


async def receive(consumer: object, max: int = 1) -> Sequence[Delivery]:
    async with asyncio.timeout(10):
        return await consumer.receive(max)  # type: ignore[attr-defined, no-any-return]


async def take(bus: Bus, topic: str, n: int, after: Cursor = "") -> list[Entry]:
    """The first `n` entries a subscription yields."""
    entries: list[Entry] = []
    async with asyncio.timeout(10), bus.subscribe(topic, after) as subscription:
        async for batch in subscription:
            entries += batch
            if len(entries) >= n:
                break
    return entries


# the queue


@pytest.mark.promise("bus.fifo")
async def test_messages_of_a_key_come_in_order_over_all_consumers(bus: Bus, queue: str) -> None:
    for n in range(30):
        await bus.enqueue(queue, f"k{n % 3}", b"%d" % n)
    seen: dict[str, list[int]] = {}

    async def work(consumers: int) -> None:
        async with bus.consume(queue, name=f"c{consumers}") as consumer:
            while sum(map(len, seen.values())) < 30:
                deliveries: Sequence[Delivery] = ()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        deliveries = await consumer.receive(2)
                for delivery in deliveries:
                    seen.setdefault(delivery.key, []).append(int(delivery.data))
                    await delivery.ack()

    async with asyncio.timeout(20):
        await asyncio.gather(*(work(n) for n in range(3)))

    assert seen == {f"k{k}": list(range(k, 30, 3)) for k in range(3)}


@pytest.mark.promise("bus.one_in_flight")
async def test_one_message_of_a_key_is_in_flight_over_all_consumers(bus: Bus, queue: str) -> None:
    await bus.enqueue(queue, "k", b"1")
    await bus.enqueue(queue, "k", b"2")
    await bus.enqueue(queue, "other", b"3")

    async with bus.consume(queue) as one, bus.consume(queue) as two:
        [first] = await receive(one)
        [other] = await receive(two, 5)
        waiting = asyncio.create_task(receive(two))
        depth = await bus.depth(queue)
        await first.ack()
        [second] = await waiting

        assert (first.data, other.data, second.data) == (b"1", b"3", b"2")
        assert (depth.waiting, depth.in_flight) == (1, 2)


@pytest.mark.promise("bus.redelivery")
async def test_a_lapsed_lease_is_delivered_again_with_the_next_attempt(short_lease_bus: Bus, queue: str) -> None:
    await short_lease_bus.enqueue(queue, "k", b"1")

    async with short_lease_bus.consume(queue, renew=False) as dead, short_lease_bus.consume(queue) as alive:
        [first] = await receive(dead)
        [second] = await receive(alive)

        assert (first.attempt, second.attempt, second.starts, second.data) == (1, 2, 2, b"1")
        assert (first.lapses, second.lapses) == (0, 1)
        assert second.token > first.token
        await second.ack()


@pytest.mark.promise("bus.fence")
async def test_a_stale_delivery_settles_nothing(short_lease_bus: Bus, queue: str) -> None:
    await short_lease_bus.enqueue(queue, "k", b"1")

    async with short_lease_bus.consume(queue, renew=False) as dead, short_lease_bus.consume(queue) as alive:
        [stale] = await receive(dead)
        [current] = await receive(alive)
        for settle in (stale.ack, stale.nack, stale.release, lambda: stale.park(1)):
            with pytest.raises(LeaseLost):
                await settle()

        assert stale.lost.is_set()
        await current.ack()
        depth = await short_lease_bus.depth(queue)
        assert (depth.waiting, depth.in_flight, depth.parked) == (0, 0, 0)


async def test_a_redelivery_to_the_same_consumer_fences_its_earlier_delivery(short_lease_bus: Bus, queue: str) -> None:
    await short_lease_bus.enqueue(queue, "k", b"1")

    async with short_lease_bus.consume(queue, name="same", renew=False) as consumer:
        [stale] = await receive(consumer)
        [current] = await receive(consumer)
        with pytest.raises(LeaseLost):
            await stale.ack()
        await current.ack()


@pytest.mark.promise("bus.renewal")
async def test_a_renewed_lease_outlives_its_length(short_lease_bus: Bus, queue: str) -> None:
    await short_lease_bus.enqueue(queue, "k", b"1")

    async with short_lease_bus.consume(queue) as one, short_lease_bus.consume(queue) as two:
        [held] = await receive(one)
        # every tick of the second consumer looks for lapsed leases: three leases long it finds none
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3 * LEASE_S):
                await two.receive()
        await held.ack()


async def test_a_refused_renewal_sets_lost(make_bus: MakeBus, queue: str, keeper: str) -> None:
    if keeper == "memory":
        return  # one process: a lease that is renewed cannot be refused
    bus = await make_bus(lease_s=0.3)
    thief_bus = await make_bus(lease_s=0.01)
    await bus.enqueue(queue, "k", b"1")

    async with bus.consume(queue) as one, thief_bus.consume(queue, renew=False) as thief:
        [held] = await receive(one)
        await receive(thief)
        async with asyncio.timeout(5):
            await held.lost.wait()


async def test_nack_delivers_again_and_counts(bus: Bus, queue: str) -> None:
    await bus.enqueue(queue, "k", b"1")
    await bus.enqueue(queue, "k", b"2")

    async with bus.consume(queue) as consumer:
        [first] = await receive(consumer)
        await first.nack()
        [again] = await receive(consumer)

        assert (again.data, again.attempt, again.starts, again.lapses) == (b"1", 2, 2, 0)


@pytest.mark.promise("bus.delay")
async def test_a_delayed_nack_blocks_its_key_and_comes_back(bus: Bus, queue: str) -> None:
    await bus.enqueue(queue, "k", b"1")
    await bus.enqueue(queue, "k", b"2")

    async with bus.consume(queue) as consumer:
        [first] = await receive(consumer)
        await first.nack(delay_s=0.2)
        depth = await bus.depth(queue)
        [again] = await receive(consumer)

        assert (depth.parked, depth.in_flight, depth.waiting) == (1, 0, 1)
        assert (again.data, again.attempt) == (b"1", 2)


@pytest.mark.promise("bus.release")
async def test_release_hands_back_uncounted_before_what_waits_behind(bus: Bus, queue: str) -> None:
    await bus.enqueue(queue, "k", b"1")
    await bus.enqueue(queue, "k", b"2")

    async with bus.consume(queue) as consumer:
        [first] = await receive(consumer)
        await first.release()
        [again] = await receive(consumer)

        assert (again.data, again.attempt, again.starts) == (b"1", 1, 2)
        assert again.token > first.token


@pytest.mark.promise("bus.park")
async def test_a_parked_key_waits_for_wake_and_counts_nothing(bus: Bus, queue: str) -> None:
    await bus.enqueue(queue, "k", b"1")
    await bus.enqueue(queue, "k", b"2")
    await bus.enqueue(queue, "free", b"3")

    async with bus.consume(queue) as consumer:
        first, free = sorted(await receive_all(consumer, 2), key=lambda delivery: delivery.data)
        await first.park(60)
        await free.ack()
        parked = await bus.depth(queue)
        await bus.wake(queue, "k")
        [again] = await receive(consumer)

        assert (parked.parked, parked.waiting, parked.in_flight) == (1, 1, 0)
        assert (again.data, again.attempt, again.starts) == (b"1", 1, 2)


async def receive_all(consumer: object, n: int) -> list[Delivery]:
    got: list[Delivery] = []
    while len(got) < n:
        got += await receive(consumer, n - len(got))
    return got


@pytest.mark.promise("bus.park")
async def test_a_parked_key_comes_back_when_its_time_is_over(bus: Bus, queue: str) -> None:
    await bus.enqueue(queue, "k", b"1")

    async with bus.consume(queue) as consumer:
        [first] = await receive(consumer)
        await first.park(0.1)
        [again] = await receive(consumer)

        assert (again.attempt, again.starts) == (1, 2)


@pytest.mark.promise("bus.park")
async def test_a_wake_before_the_park_makes_it_return_at_once(bus: Bus, queue: str) -> None:
    await bus.enqueue(queue, "k", b"1")

    async with bus.consume(queue) as consumer:
        [first] = await receive(consumer)
        await bus.wake(queue, "k")
        await first.park(60)
        [again] = await receive(consumer)
        await again.park(0.2)  # the wake was used up: this one waits
        assert (await bus.depth(queue)).parked == 1


async def test_a_wake_for_an_idle_or_waiting_key_does_nothing(bus: Bus, queue: str) -> None:
    await bus.wake(queue, "k")
    await bus.enqueue(queue, "k", b"1")
    await bus.wake(queue, "k")

    async with bus.consume(queue) as consumer:
        [first] = await receive(consumer)
        await first.park(60)
        assert (await bus.depth(queue)).parked == 1


async def test_a_wake_does_not_carry_over_to_the_next_message(bus: Bus, queue: str) -> None:
    await bus.enqueue(queue, "k", b"1")
    await bus.enqueue(queue, "k", b"2")

    async with bus.consume(queue) as consumer:
        [first] = await receive(consumer)
        await bus.wake(queue, "k")
        await first.ack()
        [second] = await receive(consumer)
        await second.park(60)
        assert (await bus.depth(queue)).parked == 1


async def test_a_wake_does_not_carry_over_to_the_next_delivery(short_lease_bus: Bus, queue: str) -> None:
    bus = short_lease_bus
    await bus.enqueue(queue, "k", b"1")

    async with bus.consume(queue, renew=False) as dead, bus.consume(queue) as alive:
        await receive(dead)
        await bus.wake(queue, "k")
        [again] = await receive(alive)  # whoever is delivered it now sees by itself what the wake was about
        await again.park(60)
        assert (await bus.depth(queue)).parked == 1


@pytest.mark.promise("bus.cancel")
async def test_a_cancelled_receive_loses_nothing(bus: Bus, queue: str) -> None:
    seen: list[int] = []
    async with bus.consume(queue) as consumer:
        for n in range(60):
            waiting = asyncio.create_task(consumer.receive(5))
            await asyncio.sleep(0)
            sending = asyncio.create_task(bus.enqueue(queue, f"k{n}", b"%d" % n))
            for _ in range(n % 7):  # cancel at ever other points of the delivery
                await asyncio.sleep(0)
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                for delivery in await waiting:
                    seen.append(int(delivery.data))
                    await delivery.ack()
            await sending
        while len(seen) < 60:
            for delivery in await receive(consumer, 60):
                assert delivery.attempt == 1
                seen.append(int(delivery.data))
                await delivery.ack()

    assert sorted(seen) == list(range(60))


async def test_leaving_hands_back_what_was_not_settled(bus: Bus, queue: str) -> None:
    for n in range(3):
        await bus.enqueue(queue, f"k{n}", b"%d" % n)

    async with bus.consume(queue) as leaving:
        got = await receive_all(leaving, 3)
    async with bus.consume(queue) as staying:
        again = await receive_all(staying, 3)

    assert sorted(delivery.data for delivery in again) == [b"0", b"1", b"2"]
    assert {delivery.attempt for delivery in again} == {1}
    assert all(delivery.lost.is_set() for delivery in got)


async def test_leaving_after_the_lease_lapsed_hands_back_all_the_same(short_lease_bus: Bus, queue: str) -> None:
    bus = short_lease_bus
    await bus.enqueue(queue, "k", b"1")
    async with bus.consume(queue, renew=False) as leaving:
        [stale] = await receive(leaving)
        await asyncio.sleep(1.1 * LEASE_S)  # past the lease, and nobody else looks

    assert stale.lost.is_set()
    async with bus.consume(queue) as staying:
        [again] = await receive(staying)
        assert (again.data, again.starts) == (b"1", 2)


async def test_a_stopped_consumer_hands_back_what_it_did_not_return_and_keeps_what_it_did(bus: Bus, queue: str) -> None:
    await bus.enqueue(queue, "k", b"held")
    async with bus.consume(queue) as stopping, bus.consume(queue) as other:
        [held] = await receive(stopping)
        waiting = asyncio.create_task(stopping.receive(5))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        await bus.enqueue(queue, "l", b"late")
        await stopping.stop()
        [late] = await receive(other)

        assert (late.data, late.attempt) == (b"late", 1)
        await held.ack()


@pytest.mark.promise("bus.bounds")
async def test_the_queue_and_each_key_are_bounded(make_bus: MakeBus, queue: str) -> None:
    bus = await make_bus(key_backlog=2, queue_backlog=5)
    for n in range(3):
        await bus.enqueue(queue, "k", b"%d" % n)
    with pytest.raises(QueueFull):
        await bus.enqueue(queue, "k", b"one too many for the key")
    await bus.enqueue(queue, "l", b"")
    await bus.enqueue(queue, "m", b"")
    with pytest.raises(QueueFull):
        await bus.enqueue(queue, "n", b"one too many for the queue")

    async with bus.consume(queue) as consumer:
        for delivery in await receive_all(consumer, 3):
            await delivery.ack()
    await bus.enqueue(queue, "n", b"room again")


@pytest.mark.promise("bus.idle")
async def test_enqueue_only_if_idle_refuses_a_key_with_work(bus: Bus, queue: str) -> None:
    await bus.enqueue(queue, "k", b"1", only_if_idle=True)
    with pytest.raises(KeyBusy):
        await bus.enqueue(queue, "k", b"2", only_if_idle=True)
    await bus.enqueue(queue, "other", b"3", only_if_idle=True)

    async with bus.consume(queue) as consumer:
        for delivery in await receive_all(consumer, 2):
            with pytest.raises(KeyBusy):
                await bus.enqueue(queue, delivery.key, b"4", only_if_idle=True)
            await delivery.ack()
    await bus.enqueue(queue, "k", b"5", only_if_idle=True)


@pytest.mark.promise("bus.idle")
async def test_only_one_of_many_wins_an_idle_key(bus: Bus, queue: str) -> None:
    results = await asyncio.gather(
        *(bus.enqueue(queue, "k", b"%d" % n, only_if_idle=True) for n in range(20)), return_exceptions=True
    )
    assert sum(result is None for result in results) == 1


async def test_depth_counts_and_tells_the_oldest_age(bus: Bus, queue: str) -> None:
    await bus.enqueue(queue, "a", b"1")
    await bus.enqueue(queue, "b", b"2")
    await wait_until(lambda: _older(bus, queue, 0.02), description="the age of the oldest grows")

    depth = await bus.depth(queue)
    assert (depth.waiting, depth.in_flight, depth.parked) == (2, 0, 0)


async def _older(bus: Bus, queue: str, age_s: float) -> bool:
    return (await bus.depth(queue)).oldest_age_s > age_s


@pytest.mark.promise("bus.opaque")
async def test_payloads_are_opaque_bytes(bus: Bus, queue: str, topic: str) -> None:
    hostile = bytes(range(256)) + "\u2028\r\n 1-1:5".encode()
    await bus.enqueue(queue, "k", hostile)
    await bus.append(topic, hostile, b"", hostile)

    async with bus.consume(queue) as consumer:
        [delivery] = await receive(consumer)
        await delivery.nack(delay_s=0.01)
        [delivery] = await receive(consumer)
        assert delivery.data == hostile
    assert [entry.data for entry in await bus.read(topic)] == [hostile, b"", hostile]


# topics


async def test_append_tells_where_it_landed(bus: Bus, topic: str) -> None:
    first = await bus.append(topic, b"1")
    second = await bus.append(topic, b"2", b"3")
    entries = await bus.read(topic)

    assert first.before == "0-0"
    assert second.before == first.last == entries[0].cursor
    assert second.last == entries[2].cursor == await bus.tail(topic)
    assert [entry.data for entry in await bus.read(topic, second.before)] == [b"2", b"3"]


async def test_read_pages_and_reads_the_end(bus: Bus, topic: str) -> None:
    await bus.append(topic, *(b"%d" % n for n in range(10)))
    page = await bus.read(topic, limit=4)

    assert [entry.data for entry in page] == [b"0", b"1", b"2", b"3"]
    assert [entry.data for entry in await bus.read(topic, page[-1].cursor, 2)] == [b"4", b"5"]
    assert [entry.data for entry in await bus.read(topic, limit=3, last=True)] == [b"7", b"8", b"9"]
    assert [e.data for e in await bus.read(topic, page[-1].cursor, 100, last=True)] == [b"%d" % n for n in range(4, 10)]
    assert await bus.read(topic, await bus.tail(topic)) == []


async def test_an_unknown_topic_is_empty(bus: Bus, topic: str) -> None:
    assert await bus.read(topic) == []
    assert await bus.read(topic, "0-0") == []
    assert await bus.tail(topic) == "0-0"
    assert await bus.find(topic, "x") is None


@pytest.mark.parametrize("garbage", ["abc", "-1", "1", "1-", "1-2-3", "1-2 ", "+1-2", "$", "\uff11-1", "9" * 30 + "-0"])
async def test_garbage_is_no_cursor(bus: Bus, topic: str, garbage: str) -> None:
    with pytest.raises(BadCursor):
        await bus.read(topic, garbage)
    with pytest.raises(BadCursor):
        async with bus.subscribe(topic, garbage):
            pass


@pytest.mark.promise("bus.expired")
async def test_a_cursor_whose_entry_is_not_kept_has_expired(make_bus: MakeBus, topic: str) -> None:
    bus = await make_bus(stream_maxlen=100)
    first = await bus.append(topic, b"first")
    for _ in range(30):
        await bus.append(topic, *[b"x"] * 10)
    earliest = (await bus.read(topic, limit=1))[0].cursor

    assert 100 <= len(await bus.read(topic, limit=1000)) < 250
    for cursor in (first.last, "1-1", "99999999999999-0"):
        with pytest.raises(CursorExpired) as caught:
            await bus.read(topic, cursor)
        assert caught.value.earliest == earliest
        with pytest.raises(CursorExpired):
            await take(bus, topic, 1, cursor)
    with pytest.raises(CursorExpired) as caught:
        await bus.read("log:nothing-here", first.last)
    assert caught.value.earliest is None


@pytest.mark.promise("bus.forever")
async def test_forever_neither_trims_nor_expires(make_bus: MakeBus, topic: str) -> None:
    bus = await make_bus(stream_maxlen=100, stream_ttl_s=0.05)
    for _ in range(30):
        await bus.append(topic, *[b"x"] * 10, forever=True)
    other = f"{topic}-expires"
    await bus.append(other, b"x")
    await wait_until(lambda: _empty(bus, other), description="the other topic expires")

    assert len(await bus.read(topic, limit=1000)) == 300


async def _empty(bus: Bus, topic: str) -> bool:
    return not await bus.read(topic)


async def test_a_topic_expires_after_its_last_append(make_bus: MakeBus, topic: str) -> None:
    bus = await make_bus(stream_ttl_s=60)
    await bus.append(topic, b"x")
    await bus.expire(topic, 0.05)
    await wait_until(lambda: _empty(bus, topic), description="the topic expires")
    await bus.append(topic, b"y")

    assert [entry.data for entry in await bus.read(topic)] == [b"y"]


@pytest.mark.promise("bus.fence")
async def test_an_older_fence_is_refused_and_writes_nothing(bus: Bus, topic: str) -> None:
    await bus.append(topic, b"old", fence=Fence("w", "1", 1))
    await bus.append(topic, b"new", fence=Fence("w", "2", 1))
    with pytest.raises(LeaseLost):
        await bus.append(topic, b"stale", fence=Fence("w", "1", 2))
    await bus.append(topic, b"other", fence=Fence("v", "1", 1))

    assert [entry.data for entry in await bus.read(topic)] == [b"old", b"new", b"other"]


async def test_a_fenced_append_answered_by_dedup_fences_all_the_same(bus: Bus, topic: str) -> None:
    await bus.append(topic, b"1", dedup=Dedup("id"))
    await bus.append(topic, b"1", dedup=Dedup("id"), fence=Fence("w", "2", 1))
    with pytest.raises(LeaseLost):
        await bus.append(topic, b"stale", fence=Fence("w", "1", 1))


@pytest.mark.promise("bus.append_once")
async def test_an_append_repeated_after_a_lost_answer_makes_no_second_entry(bus: Bus, topic: str) -> None:
    first = await bus.append(topic, b"1", b"2", fence=Fence("w", "1", 1))
    again = await bus.append(topic, b"1", b"2", fence=Fence("w", "1", 1))
    await bus.append(topic, b"3", fence=Fence("w", "1", 2))

    assert (again.before, again.last) == (first.before, first.last)
    assert [entry.data for entry in await bus.read(topic)] == [b"1", b"2", b"3"]


@pytest.mark.promise("bus.dedup")
async def test_dedup_returns_the_earlier_place(bus: Bus, topic: str) -> None:
    first = await bus.append(topic, b"1", dedup=Dedup("id", "digest"))
    await bus.append(topic, b"2")
    again = await bus.append(topic, b"1", dedup=Dedup("id", "digest"))

    assert not first.duplicate
    assert (again.before, again.last, again.duplicate) == (first.before, first.last, True)
    assert await bus.find(topic, "id") == ("digest", first)
    assert [entry.data for entry in await bus.read(topic)] == [b"1", b"2"]


@pytest.mark.promise("bus.dedup")
async def test_dedup_refuses_another_digest(bus: Bus, topic: str) -> None:
    await bus.append(topic, b"1", dedup=Dedup("id", "digest"))
    with pytest.raises(DedupConflict):
        await bus.append(topic, b"2", dedup=Dedup("id", "other"))

    assert len(await bus.read(topic)) == 1


async def test_dedup_is_forgotten_after_its_window(make_bus: MakeBus, topic: str) -> None:
    bus = await make_bus(dedup_ttl_s=0.05)
    await bus.append(topic, b"1", dedup=Dedup("id"))
    await wait_until(lambda: _forgotten(bus, topic), description="the dedup id is forgotten")
    assert not (await bus.append(topic, b"1", dedup=Dedup("id"))).duplicate


async def _forgotten(bus: Bus, topic: str) -> bool:
    return await bus.find(topic, "id") is None


@pytest.mark.promise("bus.dedup")
async def test_of_many_appends_with_one_id_one_lands(bus: Bus, topic: str) -> None:
    results = await asyncio.gather(*(bus.append(topic, b"x", dedup=Dedup("id")) for _ in range(20)))

    assert sum(not result.duplicate for result in results) == 1
    assert len(await bus.read(topic)) == 1


async def test_a_subscription_replays_then_follows(bus: Bus, topic: str) -> None:
    await bus.append(topic, b"1", b"2")
    following = asyncio.create_task(take(bus, topic, 4))
    await asyncio.sleep(0)
    await bus.append(topic, b"3")
    await bus.append(topic, b"4")

    assert [entry.data for entry in await following] == [b"1", b"2", b"3", b"4"]


async def test_a_subscription_starts_after_its_cursor(bus: Bus, topic: str) -> None:
    first = await bus.append(topic, b"1")
    await bus.append(topic, b"2")

    assert [entry.data for entry in await take(bus, topic, 1, first.last)] == [b"2"]


@pytest.mark.promise("bus.follow")
async def test_readers_that_join_and_leave_at_random_see_each_entry_once(bus: Bus, topic: str) -> None:
    total = 300

    async def write() -> None:
        for n in range(total):
            await bus.append(topic, b"%d" % n)

    async def read(step: int) -> list[int]:
        seen: list[int] = []
        cursor = ""
        while len(seen) < total:
            entries = await take(bus, topic, min(step, total - len(seen)), cursor)
            seen += [int(entry.data) for entry in entries]
            cursor = entries[-1].cursor
            step = step % 17 + 1
        return seen

    async with asyncio.timeout(30):
        _, *readers = await asyncio.gather(write(), *(read(step) for step in range(1, 9)))
    assert all(seen == list(range(total)) for seen in readers)


@pytest.mark.promise("bus.follow")
async def test_a_slow_reader_falls_back_to_replay_and_misses_nothing(bus: Bus, topic: str) -> None:
    big = b"x" * 40_000
    async with bus.subscribe(topic) as subscription:
        batches = aiter(subscription)
        await bus.append(topic, b"first" + big)
        seen = list(await anext(batches))
        for n in range(40):  # 1.6 MB while nobody reads
            await bus.append(topic, b"%d:" % n + big)
        async with asyncio.timeout(10):
            while len(seen) < 41:
                seen += await anext(batches)
        await batches.aclose()  # type: ignore[attr-defined]

    assert [entry.data.split(b":")[0] for entry in seen[1:]] == [b"%d" % n for n in range(40)]


@pytest.mark.promise("bus.expired")
async def test_a_reader_behind_the_trimmed_part_is_told(make_bus: MakeBus, topic: str) -> None:
    bus = await make_bus(stream_maxlen=100)
    async with bus.subscribe(topic) as subscription:
        batches = aiter(subscription)
        await bus.append(topic, b"first")
        assert [entry.data for entry in await anext(batches)] == [b"first"]
        for _ in range(60):
            await bus.append(topic, *[b"y" * 2000] * 10)
        with pytest.raises(CursorExpired):
            await drain(batches)


async def drain(batches: AsyncIterator[Sequence[Entry]]) -> None:
    async with asyncio.timeout(10):
        async for _ in batches:
            pass


@pytest.mark.promise("bus.threads")
async def test_the_bus_serves_several_threads(bus: Bus, queue: str, topic: str, keeper: str) -> None:
    if keeper != "memory":
        return  # a Redis link belongs to one event loop; other threads make their own
    got: list[bytes] = []

    async def work() -> None:
        async with bus.consume(queue) as consumer:
            while len(got) < 50:
                for delivery in await consumer.receive(10):
                    got.append(delivery.data)
                    await bus.append(topic, delivery.data)
                    await delivery.ack()

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    for n in range(50):
        await bus.enqueue(queue, f"k{n % 5}", b"%d" % n)
    entries = await take(bus, topic, 50)
    await asyncio.to_thread(thread.join, 10)

    assert not thread.is_alive()
    assert sorted(entry.data for entry in entries) == sorted(b"%d" % n for n in range(50))
