"""What only the in-memory store does: it forgets what expired, and may be used from several threads."""

from __future__ import annotations

import asyncio
import threading

import pytest

from magent2.store.memory import FENCE_KEPT_S, MemoryStore

pytestmark = pytest.mark.anyio


async def test_expired_things_leave_the_memory_with_any_later_write() -> None:
    now = 0.0
    store = MemoryStore(lambda: now)
    for n in range(100):
        await store.put(f"s{n}", "n", b"", ttl_s=10, token="1")
        await store.add(f"s{n}", "l", "1", b"", ttl_s=20)
    assert store.size() == 300

    now = 10.0
    await store.put("other", "n", b"")
    assert store.size() == 201
    now = 20.0
    await store.put("other", "n", b"")
    assert store.size() == 101
    now = FENCE_KEPT_S
    await store.put("other", "n", b"")
    assert store.size() == 1


async def test_what_was_renewed_or_shortened_leaves_at_its_last_expiry() -> None:
    now = 0.0
    store = MemoryStore(lambda: now)
    for ttl_s in (10, 30, 20, None, 25):
        await store.put("s", "n", b"", ttl_s=ttl_s)

    now = 24.0
    await store.put("other", "n", b"")
    assert store.size() == 2
    now = 25.0
    await store.put("other", "n", b"")
    assert store.size() == 1


async def test_a_record_that_no_longer_expires_stays() -> None:
    now = 0.0
    store = MemoryStore(lambda: now)
    await store.put("s", "n", b"", ttl_s=10)
    await store.put("s", "n", b"")

    now = 1e9
    await store.put("other", "n", b"")
    assert store.size() == 2


async def test_threads_with_loops_of_their_own_share_the_records() -> None:
    store = MemoryStore()

    async def count_up() -> None:
        for n in range(200):
            await store.count("s", "c")
            await store.add("s", "l", str(n), b"")

    threads = [threading.Thread(target=lambda: asyncio.run(count_up())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)

    assert await store.count("s", "c", by=0) == 800
    assert len(await store.entries("s", "l")) == 200
