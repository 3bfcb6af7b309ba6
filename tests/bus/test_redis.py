"""What only Redis can show: lost answers, broken and half-open connections, a server that dies, fills up or forgets."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest
import redis

from magent2 import redis_link
from magent2.bus import redis_hub, redis_queue
from magent2.bus.interface import BusConfig, Cursor, Delivery, Entry
from magent2.bus.redis import RedisBus
from magent2.bus.redis_queue import RedisConsumer
from magent2.errors import CursorExpired, LeaseLost, Unavailable
from magent2.log import without_password
from magent2.models.run import Fence
from magent2.redis_link import RedisLink
from tests.conftest import BINARIES, REDIS_NAMES
from tests.support.proxy import Proxy, running_proxy
from tests.support.servers import RedisServer, free_port, running_server
from tests.support.wait import wait_until

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

LEASE_S = 0.3


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often, and do not wait long."""
    monkeypatch.setattr(redis_queue, "TICK_S", 0.05)
    monkeypatch.setattr(redis_hub, "_RECONNECT_S", (0.01, 0.05))


@pytest.fixture
def queue() -> str:
    return f"agent:{uuid4().hex}"


@pytest.fixture
def topic() -> str:
    return f"log:{uuid4().hex}"


@pytest.fixture(params=REDIS_NAMES)
def own_server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A server of each kind for one test."""
    with running_server(BINARIES[request.param]) as server:
        yield server


@asynccontextmanager
async def redis_bus(url: str, **bounds: float) -> AsyncIterator[RedisBus]:
    link = RedisLink(url)
    bus = RedisBus(link, BusConfig(**{"lease_s": LEASE_S, **bounds}))  # type: ignore[arg-type]
    try:
        yield bus
    finally:
        await bus.aclose()
        await link.aclose()


@pytest.fixture
async def bus(redis_server: RedisServer) -> AsyncIterator[RedisBus]:
    async with redis_bus(redis_server.url) as bus:
        yield bus


@pytest.fixture
async def proxy(redis_server: RedisServer) -> AsyncIterator[Proxy]:
    async with running_proxy(redis_server.port) as proxy:
        yield proxy


@contextlib.contextmanager
def admin(server: RedisServer) -> Iterator[redis.Redis]:
    """A plain client, to look and to break things."""
    with redis.Redis.from_url(server.url) as client:
        yield client


def ready_key(queue: str) -> str:
    return redis_queue.QueueKeys.of(*queue.split(":")).ready


async def receive(consumer: RedisConsumer, max: int = 1) -> Sequence[Delivery]:
    async with asyncio.timeout(10):
        return await consumer.receive(max)


async def receive_all(consumer: RedisConsumer, n: int) -> list[Delivery]:
    got: list[Delivery] = []
    while len(got) < n:
        got += await receive(consumer, n - len(got))
    return got


async def data_of(bus: RedisBus, topic: str) -> list[bytes]:
    return [entry.data for entry in await bus.read(topic)]


async def take(batches: AsyncIterator[Sequence[Entry]], n: int) -> list[bytes]:
    seen: list[bytes] = []
    async with asyncio.timeout(15):
        while len(seen) < n:
            seen += [entry.data for entry in await anext(batches)]
    return seen


async def is_blocked(client: redis.Redis) -> bool:
    blocked: int = client.info("clients")["blocked_clients"]
    return blocked > 0


# answers that get lost


@pytest.mark.promise("bus.append_once")
async def test_an_append_repeated_after_its_answer_was_lost_makes_no_second_entry(proxy: Proxy, topic: str) -> None:
    async with redis_bus(proxy.url) as bus:
        await bus.append(topic, b"0", fence=Fence("w", "1", 1))
        proxy.drop_answers()
        with pytest.raises(Unavailable):
            await bus.append(topic, b"1", fence=Fence("w", "1", 2))
        repeated = await bus.append(topic, b"1", fence=Fence("w", "1", 2))

        assert proxy.dropped == 1
        assert repeated.last == await bus.tail(topic)
        assert await data_of(bus, topic) == [b"0", b"1"]


async def test_no_write_whose_answer_was_lost_is_repeated_by_the_library(proxy: Proxy, topic: str, queue: str) -> None:
    async with redis_bus(proxy.url) as bus:
        await bus.append(topic, b"0")
        await bus.enqueue(queue, "k0", b"0")
        proxy.drop_answers()
        with pytest.raises(Unavailable):
            await bus.append(topic, b"1")
        await bus.ping()  # connected again
        proxy.drop_answers()
        with pytest.raises(Unavailable):
            await bus.enqueue(queue, "k1", b"1")

        assert proxy.dropped == 2
        assert await data_of(bus, topic) == [b"0", b"1"]
        assert (await bus.depth(queue)).waiting == 2


async def test_all_calls_of_a_batch_are_told_when_the_connection_breaks(proxy: Proxy, topic: str) -> None:
    async with redis_bus(proxy.url) as bus:
        await bus.append(topic, b"0")
        proxy.drop_answers()
        async with asyncio.timeout(10):
            results = await asyncio.gather(*(bus.append(topic, b"%d" % n) for n in range(1000)), return_exceptions=True)
        unknown = sum(isinstance(result, Unavailable) for result in results)
        kept = len(await bus.read(topic, limit=2000)) - 1

        assert 1 <= unknown <= 256 + 1
        assert 1000 - unknown <= kept <= 1000


async def test_a_settle_whose_answer_was_lost_may_be_repeated(proxy: Proxy, queue: str) -> None:
    async with redis_bus(proxy.url, lease_s=15) as bus:
        await bus.enqueue(queue, "warm", b"")
        await bus.enqueue(queue, "k", b"")
        async with bus.consume(queue) as consumer:
            warm, delivery = sorted(await receive_all(consumer, 2), key=lambda delivery: delivery.key, reverse=True)
            await warm.ack()
            proxy.drop_answers()
            with pytest.raises(Unavailable):
                await delivery.ack()
            with pytest.raises(LeaseLost):  # it had been done
                await delivery.ack()
        depth = await bus.depth(queue)
        assert (depth.waiting, depth.in_flight) == (0, 0)


# readers and their connection


@pytest.mark.promise("bus.follow")
async def test_readers_see_each_entry_once_while_connections_are_killed_and_readers_come_and_go(
    redis_server: RedisServer,
) -> None:
    rng = random.Random(7)
    names = [f"log:{uuid4().hex}" for _ in range(5)]
    totals = dict.fromkeys(names, 0)
    done = asyncio.Event()

    async def kill() -> None:
        with admin(redis_server) as client:
            for _ in range(40):
                client.client_kill_filter(_type=rng.choice(["pubsub", "pubsub", "normal"]))
                await asyncio.sleep(rng.random() * 0.05)
        done.set()

    async def write(bus: RedisBus, topic: str) -> None:
        seq = 0
        while not done.is_set():
            seq += 1
            batch = [b"%d" % (totals[topic] + n) for n in range(rng.randint(1, 4))]
            while True:
                with contextlib.suppress(Unavailable):
                    await bus.append(topic, *batch, fence=Fence("w", "1", seq))
                    break
            totals[topic] += len(batch)
            await asyncio.sleep(rng.random() * 0.01)

    async def read(bus: RedisBus, topic: str) -> list[int]:
        seen: list[bytes] = []
        cursor: Cursor = ""
        while b"end" not in seen[-1:]:
            stay = rng.randint(1, 40)
            async with bus.subscribe(topic, cursor) as subscription:
                async for batch in subscription:
                    seen += [entry.data for entry in batch]
                    cursor = batch[-1].cursor
                    stay -= 1
                    if stay == 0 or seen[-1] == b"end":
                        break
        return [int(data) for data in seen[:-1]]

    async with redis_bus(redis_server.url) as writing, redis_bus(redis_server.url) as reading, asyncio.timeout(30):
        readers = asyncio.gather(*(read(reading, names[n % 5]) for n in range(20)))
        await asyncio.gather(kill(), *(write(writing, name) for name in names))
        for name in names:
            await wait_until(lambda name=name: _appended(writing, name, b"end"))  # type: ignore[misc]
        results = await readers

    assert min(totals.values()) > 50
    for n, seen in enumerate(results):
        assert seen == list(range(totals[names[n % 5]]))


async def _appended(bus: RedisBus, topic: str, data: bytes) -> bool:
    try:
        await bus.append(topic, data, fence=Fence("end", "1", 1))
    except Unavailable:
        return False
    return True


async def test_the_tail_lost_with_the_connection_comes_without_a_further_append(
    proxy: Proxy, bus: RedisBus, topic: str
) -> None:
    async with redis_bus(proxy.url) as reading, reading.subscribe(topic) as subscription:
        batches = aiter(subscription)
        await bus.append(topic, b"0")
        assert await take(batches, 1) == [b"0"]
        waiting = asyncio.ensure_future(anext(batches))
        await wait_until(lambda: _follows(bus, topic), description="subscribed")
        proxy.pause()
        await bus.append(topic, b"1", b"2")
        proxy.cut()

        async with asyncio.timeout(10):
            assert [entry.data for entry in await waiting] == [b"1", b"2"]


async def _follows(bus: RedisBus, topic: str) -> bool:
    kind, rest = topic.split(":")
    [_, readers] = await bus._link.command("PUBSUB", "NUMSUB", f"magent2:{kind}:{{{rest}}}")
    return bool(readers)


async def test_a_half_open_connection_is_found_by_the_ping(
    proxy: Proxy, bus: RedisBus, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_hub, "PING_S", 0.1)
    monkeypatch.setattr(redis_link, "COMMAND_TIMEOUT_S", 0.3)
    async with redis_bus(proxy.url) as reading, reading.subscribe(topic) as subscription:
        batches = aiter(subscription)
        await bus.append(topic, b"0")
        assert await take(batches, 1) == [b"0"]
        proxy.pause()
        await bus.append(topic, b"1")

        assert await take(batches, 1) == [b"1"]


async def test_a_living_connection_without_traffic_is_not_taken_for_dead(
    proxy: Proxy, topic: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(redis_hub, "PING_S", 0.05)
    async with redis_bus(proxy.url) as bus, bus.subscribe(topic) as subscription:
        batches = aiter(subscription)
        await bus.append(topic, b"0")
        assert await take(batches, 1) == [b"0"]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):  # five times what an unanswered ping gets
                await anext(batches)
    assert "connection lost" not in caplog.text


async def test_a_reader_cancelled_while_joining_or_leaving_breaks_no_other(bus: RedisBus, topic: str) -> None:
    async def join(ticks: int) -> None:
        async with bus.subscribe(topic) as subscription:
            async for _ in subscription:
                ticks -= 1

    async with bus.subscribe("log:other") as subscription:
        other = aiter(subscription)
        await bus.append("log:other", b"0")
        await take(other, 1)
        connection = bus._hub._connection
        for ticks in range(40):
            leaving = asyncio.create_task(join(ticks))
            for _ in range(ticks % 8):
                await asyncio.sleep(0)
            leaving.cancel()
            async with bus.subscribe(topic, await bus.tail(topic)) as following:
                batches = aiter(following)
                waiting = asyncio.ensure_future(anext(batches))
                await asyncio.wait({leaving})
                await bus.append(topic, b"%d" % ticks)
                async with asyncio.timeout(5):
                    assert [entry.data for entry in await waiting] == [b"%d" % ticks]

        assert bus._hub._connection is connection
        assert len(bus._hub._readers) == 1


async def test_a_subscription_whose_iteration_was_cancelled_misses_nothing(bus: RedisBus, topic: str) -> None:
    await bus.append(topic, b"0", b"1")
    async with bus.subscribe(topic) as subscription:
        for ticks in range(6):
            waiting = asyncio.ensure_future(anext(aiter(subscription)))
            for _ in range(ticks):
                await asyncio.sleep(0)
            if waiting.done():
                break
            waiting.cancel()
            await asyncio.wait({waiting})
        else:
            assert await take(aiter(subscription), 2) == [b"0", b"1"]
            return
    assert [entry.data for entry in waiting.result()] == [b"0", b"1"]


async def test_an_append_of_nothing_disturbs_no_reader(bus: RedisBus, topic: str) -> None:
    async with bus.subscribe(topic) as subscription:
        waiting = await live(bus, topic, subscription)
        nothing = await bus.append(topic)
        await bus.append(topic, b"1")

        assert nothing.before == nothing.last
        assert await waiting == [b"1"]


async def test_a_foreign_publication_disturbs_no_reader(redis_server: RedisServer, bus: RedisBus, topic: str) -> None:
    async with bus.subscribe(topic) as subscription:
        waiting = await live(bus, topic, subscription)
        with admin(redis_server) as client:
            for garbage in (b"\xff", b"", b"0-0 ", b"0-0 1-1:x\n", b"0-0\n"):
                assert client.publish("magent2:log:{" + topic.split(":")[1] + "}", garbage) == 1
        await bus.append(topic, b"1")

        assert await waiting == [b"1"]


async def live(bus: RedisBus, topic: str, subscription: redis_hub.RedisSubscription) -> asyncio.Task[list[bytes]]:
    """A reader that has followed the topic live for a while and waits for one more entry."""
    batches = aiter(subscription)
    for _ in range(5):
        await bus.append(topic, b"0")
        await take(batches, 1)
    waiting = asyncio.create_task(take(batches, 1))
    await wait_until(lambda: _follows(bus, topic), description="subscribed")
    await wait_until(lambda: not subscription._behind, description="live")
    return waiting


async def test_closing_the_link_finishes_what_was_submitted_even_when_cancelled(
    redis_server: RedisServer, topic: str
) -> None:
    link = RedisLink(redis_server.url)
    bus = RedisBus(link)
    appends = [asyncio.create_task(bus.append(topic, b"%d" % n)) for n in range(600)]
    await asyncio.sleep(0)
    closing = asyncio.create_task(link.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    async with asyncio.timeout(10):
        await asyncio.gather(*appends)
    await link.aclose()
    assert len({append.result().last for append in appends}) == 600


async def test_text_that_is_no_utf8_fails_its_own_call_only(bus: RedisBus, queue: str) -> None:
    results = await asyncio.gather(
        bus.enqueue(queue, "a", b""),
        bus.enqueue(queue, "\ud800", b""),
        bus.enqueue(queue, "b", b""),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [type(None), UnicodeEncodeError, type(None)]
    assert (await bus.depth(queue)).waiting == 2


# a server that forgets


@pytest.mark.promise("bus.flush")
async def test_a_flush_loses_what_was_held_and_the_consumer_goes_on(own_server: RedisServer, queue: str) -> None:
    with admin(own_server) as client:
        async with redis_bus(own_server.url) as bus:
            await bus.enqueue(queue, "k", b"1")
            await bus.enqueue(queue, "k", b"2")
            async with bus.consume(queue) as consumer:
                [held] = await receive(consumer)
                waiting = asyncio.create_task(receive(consumer))
                await wait_until(lambda: is_blocked(client), description="the consumer waits")
                client.flushall()
                await bus.enqueue(queue, "k", b"3")
                [delivery] = await waiting
                async with asyncio.timeout(5):
                    await held.lost.wait()

                assert (delivery.data, delivery.attempt) == (b"3", 1)
                with pytest.raises(LeaseLost):
                    await held.ack()
                await delivery.ack()


async def test_what_is_enqueued_after_a_flush_before_there_is_a_group_is_delivered(
    own_server: RedisServer, queue: str
) -> None:
    with admin(own_server) as client:
        async with redis_bus(own_server.url) as bus:
            async with bus.consume(queue):
                pass
            client.flushall()
            await bus.enqueue(queue, "k", b"1")
            async with bus.consume(queue) as consumer:
                [delivery] = await receive(consumer)
                assert delivery.data == b"1"


@pytest.mark.promise("bus.flush")
async def test_a_reader_is_told_after_a_flush(own_server: RedisServer, topic: str) -> None:
    with admin(own_server) as client:
        async with redis_bus(own_server.url) as bus, bus.subscribe(topic) as subscription:
            batches = aiter(subscription)
            await bus.append(topic, b"0")
            assert await take(batches, 1) == [b"0"]
            client.flushall()
            earliest = await bus.append(topic, b"1")
            with pytest.raises(CursorExpired) as caught:
                await take(batches, 1)
            assert caught.value.earliest == earliest.last


async def test_keys_do_not_stay_blocked_when_the_ready_stream_is_lost(own_server: RedisServer, queue: str) -> None:
    with admin(own_server) as client:
        async with redis_bus(own_server.url) as bus:
            for key in ("flight", "ready", "held", "single"):
                await bus.enqueue(queue, key, b"1")
                if key != "single":
                    await bus.enqueue(queue, key, b"2")
            async with bus.consume(queue) as consumer:
                deliveries = {delivery.key: delivery for delivery in await receive_all(consumer, 4)}
                await deliveries["held"].park(60)
                await deliveries["ready"].release()
                client.delete(ready_key(queue))
                again = {delivery.key: delivery for delivery in await receive_all(consumer, 2)}

                assert {key: delivery.data for key, delivery in again.items()} == {"flight": b"2", "ready": b"2"}
                with pytest.raises(LeaseLost):
                    await deliveries["flight"].ack()
                for delivery in again.values():
                    await delivery.ack()
                await bus.wake(queue, "held")
                for expected in (b"1", b"2"):
                    [held] = await receive(consumer)
                    assert held.data == expected
                    await held.ack()
                await bus.enqueue(queue, "single", b"3", only_if_idle=True)
                [single] = await receive(consumer)
                await single.ack()
            depth = await bus.depth(queue)
            assert (depth.waiting, depth.in_flight, depth.parked) == (0, 0, 0)


# a server that goes away


@pytest.mark.promise("bus.restart")
async def test_a_killed_server_comes_back_with_all_it_acknowledged(
    own_redis_server: RedisServer, queue: str, topic: str
) -> None:
    server = own_redis_server
    async with redis_bus(server.url, lease_s=15) as bus:
        await bus.enqueue(queue, "held", b"held")
        async with bus.consume(queue) as consumer:
            [held] = await receive(consumer)
            sent = [b"%d" % n for n in range(50)]
            await asyncio.gather(*(bus.enqueue(queue, f"k{n}", data) for n, data in enumerate(sent)))
            await asyncio.gather(*(bus.append(topic, data) for data in sent))
            server.kill()
            for _ in range(2):
                with pytest.raises(Unavailable):
                    await receive(consumer)
            with pytest.raises(Unavailable):
                await bus.enqueue(queue, "k", b"refused")
            with pytest.raises(Unavailable):
                await held.ack()
            server.start()
            await wait_until(lambda: _answers(bus), description="the server is back")

            assert sorted(await data_of(bus, topic)) == sorted(sent)
            assert not held.lost.is_set()
            await held.ack()
            got = await receive_all(consumer, 50)
            assert sorted(delivery.data for delivery in got) == sorted(sent)
            for delivery in got:
                await delivery.ack()
        depth = await bus.depth(queue)
        assert (depth.waiting, depth.in_flight) == (0, 0)


async def _answers(bus: RedisBus) -> bool:
    try:
        await bus.ping()
    except Unavailable:
        return False
    return True


async def test_a_reader_outlives_a_restart_of_the_server(own_redis_server: RedisServer, topic: str) -> None:
    async with redis_bus(own_redis_server.url) as bus, bus.subscribe(topic) as subscription:
        batches = aiter(subscription)
        await bus.append(topic, b"0")
        assert await take(batches, 1) == [b"0"]
        own_redis_server.kill()
        waiting = asyncio.ensure_future(take(batches, 1))
        own_redis_server.start()
        await wait_until(lambda: _answers(bus), description="the server is back")
        await bus.append(topic, b"1")
        assert await waiting == [b"1"]


async def test_a_paused_server_delays_and_then_is_unavailable(
    own_redis_server: RedisServer, queue: str, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_link, "COMMAND_TIMEOUT_S", 0.4)
    monkeypatch.setattr(redis_queue, "BLOCK_S", 0.1)
    with admin(own_redis_server) as client:
        async with redis_bus(own_redis_server.url, lease_s=15) as bus, bus.consume(queue) as consumer:
            await bus.append(topic, b"0", fence=Fence("w", "1", 1))
            client.client_pause(100)
            await bus.enqueue(queue, "k", b"1")
            [delivery] = await receive(consumer)
            await delivery.ack()

            client.client_pause(1200)
            with pytest.raises(Unavailable):
                await receive(consumer)
            with pytest.raises(Unavailable):
                await bus.append(topic, b"1", fence=Fence("w", "1", 2))
            await wait_until(lambda: _answers(bus), description="the server answers again")
            await bus.append(topic, b"1", fence=Fence("w", "1", 2))
            await bus.enqueue(queue, "k", b"2")
            [delivery] = await receive(consumer)

            assert delivery.data == b"2"
            assert await data_of(bus, topic) == [b"0", b"1"]


@pytest.mark.promise("bus.full")
async def test_a_full_server_refuses_and_writes_nothing_by_halves(
    own_server: RedisServer, queue: str, topic: str
) -> None:
    with admin(own_server) as client:
        async with redis_bus(own_server.url, lease_s=15) as bus, bus.consume(queue) as consumer:
            await bus.append(topic, b"0", fence=Fence("w", "1", 1))
            for data in (b"1", b"2"):
                await bus.enqueue(queue, "k", data)
            [first] = await receive(consumer)
            size, total = client.dbsize(), (await bus.depth(queue)).waiting
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "1")
            for call in (
                bus.enqueue(queue, "k", b"3"),
                bus.enqueue(queue, "new", b"3"),
                bus.append(topic, b"1", fence=Fence("w", "1", 2)),
                bus.append(f"{topic}-new", b"1"),
            ):
                with pytest.raises(Unavailable):
                    await call
            async with bus.consume("agent:new-while-full") as other:
                with pytest.raises(Unavailable):
                    await receive(other)  # its group cannot be made

            assert client.dbsize() == size
            assert (await bus.depth(queue)).waiting == total
            await first.ack()  # settling needs no new memory
            [second] = await receive(consumer)
            assert second.data == b"2"

            client.config_set("maxmemory", "0")
            await bus.append(topic, b"1", fence=Fence("w", "1", 2))
            await bus.enqueue(queue, "new", b"3")
            [third] = await receive(consumer)
            assert third.data == b"3"
            assert await data_of(bus, topic) == [b"0", b"1"]


async def test_a_read_only_replica_is_unavailable(own_server: RedisServer, queue: str, topic: str) -> None:
    with admin(own_server) as client:
        async with redis_bus(own_server.url) as bus:
            await bus.append(topic, b"0")
            client.replicaof("127.0.0.1", free_port())
            with pytest.raises(Unavailable):
                await bus.append(topic, b"1")
            with pytest.raises(Unavailable):
                await bus.enqueue(queue, "k", b"1")
            async with bus.consume(queue) as consumer:
                with pytest.raises(Unavailable):
                    await receive(consumer)
            client.replicaof("NO", "ONE")
            await bus.append(topic, b"1")
            assert await data_of(bus, topic) == [b"0", b"1"]


@pytest.mark.promise("bus.password")
async def test_a_wrong_password_is_unavailable_and_not_shown(own_server: RedisServer, queue: str, topic: str) -> None:
    with admin(own_server) as client:
        client.config_set("requirepass", "right")
        for url in (own_server.url, own_server.url.replace("//", "//:hunter2@")):
            assert "hunter2" not in without_password(url)
            async with redis_bus(url) as bus, bus.consume(queue) as consumer:
                for call in (bus.append(topic, b"1"), bus.enqueue(queue, "k", b"1"), receive(consumer)):
                    with pytest.raises(Unavailable) as caught:
                        await call
                    error: BaseException | None = caught.value
                    while error is not None:
                        assert "hunter2" not in str(error)
                        error = error.__cause__ or error.__context__
        async with redis_bus(own_server.url.replace("//", "//:right@")) as bus:
            await bus.append(topic, b"1")


# leases and consumers


@contextlib.contextmanager
def rival(url: str, queue: str) -> Iterator[threading.Event]:
    """Another consumer in a thread of its own; the event says that it got something."""
    got, leave = threading.Event(), threading.Event()

    async def work() -> None:
        async with redis_bus(url) as bus, bus.consume(queue) as consumer:
            while not leave.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        for delivery in await consumer.receive():
                            got.set()
                            await delivery.ack()

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    try:
        yield got
    finally:
        leave.set()
        thread.join(10)


@pytest.mark.promise("bus.renewal")
async def test_a_blocked_event_loop_keeps_its_leases(redis_server: RedisServer, bus: RedisBus, queue: str) -> None:
    await bus.enqueue(queue, "k", b"1")
    async with bus.consume(queue) as consumer:
        [held] = await receive(consumer)
        with rival(redis_server.url, queue) as got:
            time.sleep(3 * LEASE_S)
            assert not got.is_set()
            await held.ack()


@pytest.mark.promise("bus.stall")
async def test_a_loop_that_stalls_too_long_loses_its_leases(redis_server: RedisServer, queue: str) -> None:
    async with redis_bus(redis_server.url, stall_s=0.2) as bus:
        await bus.enqueue(queue, "k", b"1")
        async with bus.consume(queue) as consumer:
            [held] = await receive(consumer)
            with rival(redis_server.url, queue) as got:
                assert got.wait(10)
                async with asyncio.timeout(5):
                    await held.lost.wait()
                with pytest.raises(LeaseLost):
                    await held.ack()


async def test_names_of_dead_consumers_go_unless_they_hold_something(
    redis_server: RedisServer, bus: RedisBus, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_queue, "_FORGET_CONSUMER_S", 0.3)
    monkeypatch.setattr(redis_queue, "_SWEEP_EVERY_TICKS", 1)
    ready = ready_key(queue)
    with admin(redis_server) as client:

        def names() -> set[bytes]:
            return {info["name"] for info in client.xinfo_consumers(ready, redis_queue.GROUP)}

        async with redis_bus(redis_server.url, lease_s=600) as bus:
            await bus.enqueue(queue, "k", b"1")
            client.xgroup_create(ready, redis_queue.GROUP, "0")
            client.xreadgroup(redis_queue.GROUP, "holds", {ready: ">"})
            for n in range(5):
                client.xgroup_createconsumer(ready, redis_queue.GROUP, f"dead{n}")
            async with bus.consume(queue, name="alive") as consumer:
                waiting = asyncio.create_task(consumer.receive())
                await wait_until(lambda: names() == {b"holds", b"alive"}, description="the dead are forgotten")
                waiting.cancel()
            assert names() == {b"holds"}


async def test_cancelled_receives_in_a_race_with_deliveries_lose_nothing(bus: RedisBus, queue: str) -> None:
    rng = random.Random(11)
    seen: list[int] = []

    async def settle(deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            assert delivery.attempt == 1
            seen.append(int(delivery.data))
            await delivery.ack()

    async with asyncio.timeout(30):
        async with bus.consume(queue) as consumer:
            for n in range(300):
                waiting = asyncio.create_task(consumer.receive(rng.randint(1, 5)))
                sending = asyncio.create_task(bus.enqueue(queue, f"k{n}", b"%d" % n))
                deadline = time.perf_counter() + rng.random() * 0.003
                while time.perf_counter() < deadline and not waiting.done():
                    await asyncio.sleep(0)
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await settle(await waiting)
                await sending
        async with bus.consume(queue) as consumer:  # what the first took and never handed out comes back at once
            while len(seen) < 300:
                await settle(await consumer.receive(50))

    assert sorted(seen) == list(range(300))


async def test_two_receives_at_once_share_what_comes(bus: RedisBus, queue: str) -> None:
    async with bus.consume(queue) as consumer, asyncio.timeout(10):
        for n in range(50):
            both = [asyncio.create_task(consumer.receive()) for _ in range(2)]
            await asyncio.gather(*(bus.enqueue(queue, f"{n}-{k}", b"") for k in range(2)))
            for deliveries in await asyncio.gather(*both):
                for delivery in deliveries:
                    await delivery.ack()


async def test_a_consumer_whose_leaving_is_cancelled_holds_no_lease(bus: RedisBus, queue: str) -> None:
    await bus.enqueue(queue, "k", b"1")
    entered = asyncio.Event()

    async def work() -> None:
        async with bus.consume(queue) as consumer:
            await receive(consumer)
            entered.set()
            await consumer.receive()

    working = asyncio.create_task(work())
    await entered.wait()
    while not working.done():  # as the cancel scopes of anyio do
        working.cancel()
        await asyncio.sleep(0)
    async with bus.consume(queue) as consumer:
        [delivery] = await receive(consumer)
        await delivery.ack()


async def test_a_lapsed_delivery_that_comes_back_to_its_own_consumer_is_lost(
    redis_server: RedisServer, queue: str
) -> None:
    async with redis_bus(redis_server.url, lease_s=60) as bus:
        await bus.enqueue(queue, "k", b"1")
        async with bus.consume(queue, name="me") as consumer:
            [first] = await receive(consumer)
            with admin(redis_server) as client:  # as after an outage longer than the lease
                id: bytes = client.xrange(ready_key(queue))[0][0]  # type: ignore[assignment, index]
                client.xclaim(ready_key(queue), redis_queue.GROUP, "me", 0, [id], idle=61_000, justid=True)
            [second] = await receive(consumer)

            assert first.lost.is_set()
            assert not second.lost.is_set()
            assert second.attempt == 2
            await second.ack()


# processes


@asynccontextmanager
async def worker(url: str, queue: str, n: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """A real second process that takes `n` deliveries; see `tests/support/bus_worker.py`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.bus_worker", url, queue, str(LEASE_S), str(n),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def lines(process: asyncio.subprocess.Process, n: int) -> list[str]:
    assert process.stdout is not None
    async with asyncio.timeout(20):
        return [(await process.stdout.readline()).decode().strip() for _ in range(n)]


@pytest.mark.promise("bus.redelivery")
async def test_what_a_killed_process_held_goes_to_another(redis_server: RedisServer, bus: RedisBus, queue: str) -> None:
    for n in range(3):
        await bus.enqueue(queue, f"k{n}", b"%d" % n)
    async with worker(redis_server.url, queue, 3) as process:
        assert sorted(await lines(process, 3)) == ["k0 1", "k1 1", "k2 1"]
        async with bus.consume(queue) as consumer:
            with pytest.raises(TimeoutError):  # while it lives it keeps them
                async with asyncio.timeout(2 * LEASE_S):
                    await consumer.receive(3)
            process.send_signal(signal.SIGKILL)
            got = await receive_all(consumer, 3)

            assert sorted((delivery.key, delivery.attempt) for delivery in got) == [("k0", 2), ("k1", 2), ("k2", 2)]
            for delivery in got:
                await delivery.ack()


@pytest.mark.promise("bus.fence")
async def test_a_process_stopped_past_its_lease_settles_nothing(
    redis_server: RedisServer, bus: RedisBus, queue: str
) -> None:
    await bus.enqueue(queue, "k", b"1")
    async with worker(redis_server.url, queue, 1) as process:
        assert await lines(process, 1) == ["k 1"]
        process.send_signal(signal.SIGSTOP)
        async with bus.consume(queue) as consumer:
            [delivery] = await receive(consumer)
            process.send_signal(signal.SIGCONT)
            assert process.stdin is not None
            process.stdin.write(b"ack\n")
            assert await lines(process, 1) == ["lost"]

            assert (delivery.attempt, delivery.lost.is_set()) == (2, False)
            await delivery.ack()
