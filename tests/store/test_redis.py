"""What only the Redis store does: a server that goes away, and keys that stay in one slot of a cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from magent2.errors import LeaseLost, Unavailable
from magent2.redis_link import RedisLink
from magent2.store.redis import FENCE_KEPT_S, RedisStore
from tests.support.servers import RedisServer

pytestmark = [pytest.mark.anyio, pytest.mark.redis]


@pytest.fixture
async def link(redis_server: RedisServer) -> AsyncIterator[RedisLink]:
    link = RedisLink(redis_server.url)
    yield link
    await link.aclose()


async def write_everything(store: RedisStore, scope: str) -> None:
    await store.put(scope, "n", b"1", token="1", ttl_s=60)
    await store.put(scope, "n", b"2", token="1")
    await store.delete(scope, "other", token="1")
    await store.add(scope, "l", "1", b"1", token="1", ttl_s=60)
    await store.rank(scope, "i", {"a": 1})
    await store.count(scope, "c")


async def test_a_server_that_is_gone_is_unavailable(own_redis_server: RedisServer) -> None:
    link = RedisLink(own_redis_server.url)
    store = RedisStore(link)
    await store.put("s", "n", b"1")
    own_redis_server.kill()

    for call in (
        store.get("s", "n"),
        store.put("s", "n", b"2"),
        store.delete("s", "n"),
        store.add("s", "l", "1", b""),
        store.find("s", "l", "1"),
        store.entries("s", "l"),
        store.clear("s", "l"),
        store.rank("s", "i", {"a": 1}),
        store.ranked("s", "i", limit=1),
        store.unrank("s", "i", "a", below=1),
        store.count("s", "c"),
        store.ping(),
    ):
        with pytest.raises(Unavailable):
            await call
    await link.aclose()


@pytest.mark.promise("store.survives")
async def test_records_and_fence_outlive_the_server_process(own_redis_server: RedisServer) -> None:
    link = RedisLink(own_redis_server.url)
    store = RedisStore(link)
    version = await store.put("s", "n", b"1", token="2")
    own_redis_server.kill()
    with pytest.raises(Unavailable):
        await store.ping()
    own_redis_server.start()

    # the new process knows none of our scripts
    assert await store.put("s", "n", b"2", expect=version) > version
    with pytest.raises(LeaseLost):
        await store.put("s", "n", b"3", token="1")
    await link.aclose()


async def test_all_keys_of_a_scope_are_in_its_slot(link: RedisLink) -> None:
    scope = f"a}}b{{{uuid4()}"
    await write_everything(RedisStore(link), scope)

    keys = [key.decode() for key in await link.command("KEYS", f"magent2:s:*{scope[-36:]}*")]
    assert len(keys) == 7
    assert {key[: key.index("}") + 1] for key in keys} == {f"magent2:s:{{a%7Db{{{scope[-36:]}}}"}
    assert len({await link.command("CLUSTER", "KEYSLOT", key) for key in keys}) == 1


async def test_fence_and_version_counter_are_kept_for_a_while_after_the_last_write(link: RedisLink) -> None:
    scope = str(uuid4())
    await write_everything(RedisStore(link), scope)

    for kind in ("fence", "versions"):
        left_ms = int(await link.command("PTTL", f"magent2:s:{{{scope}}}:{kind}"))
        assert 0 <= FENCE_KEPT_S * 1000 - left_ms < 60_000


async def test_a_version_is_not_used_again_after_its_counter_expired(link: RedisLink) -> None:
    scope = str(uuid4())
    store = RedisStore(link)
    versions = [await store.put(scope, "n", b"") for _ in range(3)]
    await link.command("DEL", f"magent2:s:{{{scope}}}:versions")

    versions.append(await store.put(scope, "n", b""))
    assert versions == sorted(set(versions))


async def test_both_keys_of_a_ledger_expire_at_one_moment(link: RedisLink) -> None:
    scope = str(uuid4())
    await RedisStore(link).add(scope, "l", "1", b"", ttl_s=60)

    # PEXPIRETIME is of Redis 7; a script sees one frozen time on all
    script = "return {redis.call('PTTL', KEYS[1]), redis.call('PTTL', KEYS[2])}"
    entries, ids = await link.command("EVAL", script, 2, f"magent2:s:{{{scope}}}:l:l", f"magent2:s:{{{scope}}}:i:l")
    assert entries > 0
    assert abs(entries - ids) <= 1  # Redis 6.2 reads the clock for each PTTL
