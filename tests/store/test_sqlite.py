"""What only the SQLite store does: its file, its thread, other processes at the same file."""

from __future__ import annotations

import asyncio
import os
import resource
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from magent2.errors import BadSettings, LeaseLost, Unavailable
from magent2.store.sqlite import FENCE_KEPT_S, SqliteStore

pytestmark = pytest.mark.anyio

COUNT_UP = """
import asyncio, sys
from magent2.store.sqlite import SqliteStore

async def main():
    async with SqliteStore(sys.argv[1]) as store:
        for n in range(100):
            await store.count("s", "c")
            await store.add("s", "l", str(n), b"%d" % n)

asyncio.run(main())
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def run_sql(path: Path, sql: str) -> list[tuple[object, ...]]:
    """What another program says to the file."""
    with closing(sqlite3.connect(path)) as db, db:
        return db.execute(sql).fetchall()


@contextmanager
def files_up_to(max_bytes: int) -> Iterator[None]:
    """No file of this process can grow beyond that within the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_the_folder_is_made_on_demand(tmp_path: Path) -> None:
    async with SqliteStore(tmp_path / "a" / "b" / "store.db") as store:
        await store.put("s", "n", b"1")

    assert (tmp_path / "a" / "b" / "store.db").exists()


async def test_a_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    async with SqliteStore("~/store.db") as store:
        await store.ping()

    assert (tmp_path / "store.db").exists()


@pytest.mark.promise("store.survives")
async def test_a_reopened_file_keeps_records_and_fence(path: Path) -> None:
    async with SqliteStore(path) as store:
        await store.put("s", "n", b"1", token="2")

    async with SqliteStore(path) as store:
        record = await store.get("s", "n")
        assert record is not None
        assert record.data == b"1"
        with pytest.raises(LeaseLost):
            await store.put("s", "n", b"2", token="1")


async def test_one_store_may_be_opened_again(path: Path) -> None:
    store = SqliteStore(path)
    for expected in (1, 2):
        async with store:
            assert await store.count("s", "c") == expected


async def test_a_store_in_memory_is_possible() -> None:
    async with SqliteStore(":memory:") as store:
        assert await store.count("s", "c") == 1


async def test_a_file_that_is_no_database_is_refused_by_name(path: Path) -> None:
    path.write_bytes(b"this is a letter to my aunt, not a database" * 100)

    with pytest.raises(BadSettings, match=r"store\.db.*not a database"):
        await SqliteStore(path).__aenter__()
    assert path.read_bytes().startswith(b"this is a letter")


async def test_a_folder_in_place_of_the_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match=str(tmp_path)):
        await SqliteStore(tmp_path).__aenter__()


async def test_a_folder_that_cannot_be_made_is_refused_by_name(path: Path) -> None:
    path.write_bytes(b"")

    with pytest.raises(BadSettings, match=r"store\.db"):
        await SqliteStore(path / "below" / "a-file.db").__aenter__()


@pytest.mark.promise("store.file")
async def test_the_database_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    run_sql(path, "CREATE TABLE agent_sessions (id TEXT)")

    with pytest.raises(BadSettings, match=r"store\.db.*another program"):
        await SqliteStore(path).__aenter__()
    assert run_sql(path, "SELECT name FROM sqlite_master") == [("agent_sessions",)]


async def test_a_file_of_another_release_is_refused_by_version(path: Path) -> None:
    async with SqliteStore(path):
        pass
    run_sql(path, "PRAGMA user_version = 99")

    with pytest.raises(BadSettings, match="99"):
        await SqliteStore(path).__aenter__()


async def test_an_unreadable_file_is_refused_by_name(path: Path) -> None:
    path.touch(mode=0)

    with ordinary_user(), pytest.raises(BadSettings, match=r"store\.db"):
        await SqliteStore(path).__aenter__()


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Root may read every file: for the length of the block the process is somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


async def test_a_file_locked_by_another_process_is_unavailable_and_then_works_again(path: Path) -> None:
    async with SqliteStore(path, busy_timeout_s=0.05) as store:
        await store.put("s", "n", b"1")
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(Unavailable):
                await store.put("s", "n", b"2")
            record = await store.get("s", "n")
            assert record is not None
            assert record.data == b"1"
            other.execute("ROLLBACK")
        await store.put("s", "n", b"3")


async def test_a_disk_that_takes_no_more_is_unavailable_and_nothing_changed(path: Path) -> None:
    async with SqliteStore(path) as store:
        await store.put("s", "n", b"1", token="1")
        with files_up_to(1_000_000), pytest.raises(Unavailable):
            await store.put("s", "n", bytes(2_000_000), token="2")

        record = await store.get("s", "n")
        assert record is not None
        assert record.data == b"1"
        await store.put("s", "n", b"2", token="1")


async def test_a_store_outside_its_block_says_so(path: Path) -> None:
    store = SqliteStore(path)
    with pytest.raises(RuntimeError, match="async with"):
        await store.ping()
    async with store:
        await store.ping()
    with pytest.raises(RuntimeError, match="async with"):
        await store.ping()


async def test_expired_rows_leave_the_file(path: Path) -> None:
    now = 0.0
    async with SqliteStore(path, clock=lambda: now) as store:
        for n in range(20):
            await store.put(f"s{n}", "n", b"", ttl_s=10, token="1")
            await store.add(f"s{n}", "l", "1", b"", ttl_s=10)
        now = FENCE_KEPT_S
        await store.count("s", "c")

    for table in ("records", "ledgers", "entries", "fences"):
        assert run_sql(path, f"SELECT count(*) FROM {table}") == [(0,)]


async def test_a_cleared_ledger_leaves_no_rows(path: Path) -> None:
    async with SqliteStore(path) as store:
        await store.add("s", "l", "1", b"")
        await store.clear("s", "l")

    assert run_sql(path, "SELECT count(*) FROM entries") == [(0,)]


async def test_the_event_loop_does_not_wait_for_the_file(path: Path) -> None:
    async with SqliteStore(path) as store:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            writing = asyncio.create_task(store.count("s", "c"))
            for _ in range(100):
                await asyncio.sleep(0)
            assert not writing.done()
            other.execute("ROLLBACK")
        assert await writing == 1


async def test_a_cancelled_caller_leaves_whole_writes_behind(path: Path) -> None:
    async with SqliteStore(path) as store:
        for round in range(30):
            writes = [asyncio.create_task(store.add("s", "l", f"{round}.{n}", b"")) for n in range(5)]
            await asyncio.sleep(0.0002 * (round % 5))
            for write in writes:
                write.cancel()
            await asyncio.gather(*writes, return_exceptions=True)
        await store.add("s", "l", "last", b"last")

        entries = await store.entries("s", "l")
        assert entries[-1] == b"last"
    assert run_sql(path, "PRAGMA integrity_check") == [("ok",)]
    assert run_sql(path, "SELECT max(position) + 1 FROM entries") == [(len(entries),)]


async def test_a_caller_cancelled_while_opening_leaves_no_thread(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        opening = asyncio.create_task(SqliteStore(path).__aenter__())
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        other.execute("ROLLBACK")

    for thread in threading.enumerate():
        if thread.name.startswith("magent2-sqlite"):
            await asyncio.to_thread(thread.join, 5)
            assert not thread.is_alive()


async def test_processes_that_start_together_share_one_file(path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", COUNT_UP, str(path)]) for _ in range(3)]
    codes = [await asyncio.to_thread(process.wait, 30) for process in processes]

    assert codes == [0, 0, 0]
    async with SqliteStore(path) as store:
        assert await store.count("s", "c", by=0) == 300
        assert await store.entries("s", "l") == [b"%d" % n for n in range(100)]
