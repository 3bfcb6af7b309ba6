"""The store in one SQLite file, beside the in-memory bus: what must outlive the process on a single machine.

Several processes may open the same file; each write is one `BEGIN IMMEDIATE` transaction. SQLite blocks, so all of it
happens on one thread of the store's own and the event loop never waits. A caller that is cancelled leaves nothing half
done: its statement either has not begun or is finished by the thread.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from magent2.errors import BadSettings, Conflict, LeaseLost, Unavailable
from magent2.store.interface import ABSENT, Record

T = TypeVar("T")

FENCE_KEPT_S = 30 * 86400.0
"""A fence is forgotten this long after the last write under a token: nobody holds a lease that old."""

BUSY_TIMEOUT_S = 2.0
"""A file that another process keeps locked for longer is unavailable; doors answer 503 within two seconds."""

_SWEEP_S = 60.0
_APPLICATION_ID = 0x6D616732  # "mag2"
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE records (
    scope TEXT NOT NULL, name TEXT NOT NULL, data BLOB NOT NULL, version INTEGER NOT NULL, expires REAL,
    PRIMARY KEY (scope, name)
);
CREATE INDEX records_by_expiry ON records (expires) WHERE expires IS NOT NULL;
-- one row for all records, so that a version is not used again after a delete
CREATE TABLE versions (last INTEGER NOT NULL);
INSERT INTO versions VALUES (0);
CREATE TABLE fences (scope TEXT PRIMARY KEY, token TEXT NOT NULL, expires REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX fences_by_expiry ON fences (expires);
CREATE TABLE ledgers (
    key INTEGER PRIMARY KEY, scope TEXT NOT NULL, name TEXT NOT NULL, expires REAL,
    UNIQUE (scope, name)
);
CREATE INDEX ledgers_by_expiry ON ledgers (expires) WHERE expires IS NOT NULL;
CREATE TABLE entries (
    ledger INTEGER NOT NULL REFERENCES ledgers ON DELETE CASCADE,
    position INTEGER NOT NULL, id TEXT NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (ledger, position), UNIQUE (ledger, id)
);
CREATE TABLE scores (
    scope TEXT NOT NULL, name TEXT NOT NULL, member TEXT NOT NULL, score REAL NOT NULL,
    PRIMARY KEY (scope, name, member)
) WITHOUT ROWID;
CREATE INDEX scores_by_score ON scores (scope, name, score, member);
CREATE TABLE counters (
    scope TEXT NOT NULL, name TEXT NOT NULL, value INTEGER NOT NULL,
    PRIMARY KEY (scope, name)
) WITHOUT ROWID;
"""

# not the file's fault: somebody else holds it, or the disk does not take the write
_OUTAGES = frozenset(
    {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR,
     sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PROTOCOL}
)  # fmt: skip


class SqliteStore:
    """Records in the file at `path`, open for the length of the `async with` block; the folder is made on demand."""

    def __init__(
        self,
        path: str | Path,
        *,
        clock: Callable[[], float] = time.time,
        busy_timeout_s: float = BUSY_TIMEOUT_S,
    ) -> None:
        self.path = Path(path).expanduser()
        self._clock = clock
        self._busy_timeout_s = busy_timeout_s
        self._executor: ThreadPoolExecutor | None = None
        self._file: _File | None = None

    async def __aenter__(self) -> Self:
        """Open the file. Raises `BadSettings` if it is not, and cannot become, a store."""
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="magent2-sqlite")
        opening = self._executor.submit(_File, self.path, self._clock, self._busy_timeout_s)
        try:
            self._file = await asyncio.wrap_future(opening)
        except BaseException:
            # cancelled while the thread was opening it: nobody else would close the file
            self._executor.submit(_close_if_opened, opening)
            self._executor.shutdown(wait=False)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        executor, file = self._opened()
        self._executor = self._file = None
        closing = executor.submit(file.close)
        executor.shutdown(wait=False)
        # shielded: what was begun is finished, and the file closed, for a cancelled caller too
        await asyncio.shield(asyncio.wrap_future(closing))

    # records
    async def get(self, scope: str, name: str) -> Record | None:
        return await self._do(lambda file: file.get(scope, name))

    async def put(
        self,
        scope: str,
        name: str,
        data: bytes,
        *,
        expect: int | None = None,
        ttl_s: float | None = None,
        token: str | None = None,
    ) -> int:
        return await self._do(lambda file: file.put(scope, name, data, expect, ttl_s, token))

    async def delete(self, scope: str, name: str, *, expect: int | None = None, token: str | None = None) -> bool:
        return await self._do(lambda file: file.delete(scope, name, expect, token))

    # ledgers
    async def add(
        self,
        scope: str,
        ledger: str,
        id: str,
        data: bytes,
        *,
        token: str | None = None,
        ttl_s: float | None = None,
    ) -> bool:
        return await self._do(lambda file: file.add(scope, ledger, id, data, token, ttl_s))

    async def find(self, scope: str, ledger: str, id: str) -> bytes | None:
        return await self._do(lambda file: file.find(scope, ledger, id))

    async def entries(self, scope: str, ledger: str, *, start: int = 0) -> Sequence[bytes]:
        return await self._do(lambda file: file.entries(scope, ledger, start))

    async def clear(self, scope: str, ledger: str, *, token: str | None = None) -> None:
        await self._do(lambda file: file.clear(scope, ledger, token))

    # sorted indexes
    async def rank(self, scope: str, index: str, scores: Mapping[str, float]) -> None:
        rows = [(scope, index, member, float(score)) for member, score in scores.items()]
        await self._do(lambda file: file.rank(rows))

    async def ranked(
        self, scope: str, index: str, *, limit: int, at_least: float | None = None
    ) -> Sequence[tuple[str, float]]:
        return await self._do(lambda file: file.ranked(scope, index, limit, at_least))

    async def unrank(self, scope: str, index: str, *members: str, below: float | None = None) -> int:
        return await self._do(lambda file: file.unrank(scope, index, members, below))

    # counters
    async def count(self, scope: str, name: str, by: int = 1) -> int:
        return await self._do(lambda file: file.count(scope, name, by))

    async def ping(self) -> None:
        await self._do(lambda file: file.ping())

    async def _do(self, work: Callable[[_File], T]) -> T:
        executor, file = self._opened()
        try:
            return await asyncio.wrap_future(executor.submit(work, file))
        except sqlite3.OperationalError as error:
            if _code(error) in _OUTAGES or _code(error) == sqlite3.SQLITE_CANTOPEN:
                raise Unavailable(f"sqlite: {error}") from error
            raise

    def _opened(self) -> tuple[ThreadPoolExecutor, _File]:
        if self._executor is None or self._file is None:
            raise RuntimeError("a SqliteStore is used inside its `async with` block")
        return self._executor, self._file


def _close_if_opened(opening: Future[_File]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _code(error: sqlite3.Error) -> int:
    """The primary result code: the extended one says more in its higher bits."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


class _File:
    """The open file: every method runs on the store's thread."""

    def __init__(self, path: Path, clock: Callable[[], float], busy_timeout_s: float) -> None:
        self._clock = clock
        self._sweep_at = 0.0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = _connect(path, busy_timeout_s)
        except sqlite3.DatabaseError as error:
            if _code(error) in _OUTAGES:
                raise Unavailable(f"sqlite: {path}: {error}") from error
            raise BadSettings(f"cannot open {str(path)!r} as a store: {error}") from error
        except OSError as error:
            raise BadSettings(f"cannot open {str(path)!r} as a store: {error}") from error

    def close(self) -> None:
        self._db.close()

    def get(self, scope: str, name: str) -> Record | None:
        rows = self._rows(
            "SELECT data, version FROM records WHERE scope = ? AND name = ? AND (expires IS NULL OR expires > ?)",
            scope, name, self._clock(),
        )  # fmt: skip
        return Record(*rows[0]) if rows else None

    def put(
        self, scope: str, name: str, data: bytes, expect: int | None, ttl_s: float | None, token: str | None
    ) -> int:
        with self._write(scope, token) as now:
            self._check_version(scope, name, expect)
            version = int(self._rows("UPDATE versions SET last = last + 1 RETURNING last")[0][0])
            self._rows(
                "REPLACE INTO records (scope, name, data, version, expires) VALUES (?, ?, ?, ?, ?)",
                scope, name, data, version, None if ttl_s is None else now + ttl_s,
            )  # fmt: skip
            return version

    def delete(self, scope: str, name: str, expect: int | None, token: str | None) -> bool:
        with self._write(scope, token):
            there = self._check_version(scope, name, expect)
            self._rows("DELETE FROM records WHERE scope = ? AND name = ?", scope, name)
            return there != ABSENT

    def add(self, scope: str, ledger: str, id: str, data: bytes, token: str | None, ttl_s: float | None) -> bool:
        with self._write(scope, token) as now:
            key = self._ledger(scope, ledger, now)
            if ttl_s is not None:
                self._rows("UPDATE ledgers SET expires = ? WHERE key = ?", now + ttl_s, key)
            added = self._rows(
                "INSERT INTO entries (ledger, position, id, data)"
                " SELECT ?1, coalesce(max(position) + 1, 0), ?2, ?3 FROM entries WHERE ledger = ?1"
                " ON CONFLICT (ledger, id) DO NOTHING RETURNING position",
                key, id, data,
            )  # fmt: skip
            return bool(added)

    def find(self, scope: str, ledger: str, id: str) -> bytes | None:
        rows = self._entries("AND entries.id = ?", scope, ledger, id)
        return rows[0] if rows else None

    def entries(self, scope: str, ledger: str, start: int) -> list[bytes]:
        return self._entries("AND position >= ? ORDER BY position", scope, ledger, start)

    def clear(self, scope: str, ledger: str, token: str | None) -> None:
        with self._write(scope, token):
            self._rows("DELETE FROM ledgers WHERE scope = ? AND name = ?", scope, ledger)

    def rank(self, rows: Sequence[tuple[str, str, str, float]]) -> None:
        with self._transaction():
            self._db.executemany("REPLACE INTO scores (scope, name, member, score) VALUES (?, ?, ?, ?)", rows)

    def ranked(self, scope: str, index: str, limit: int, at_least: float | None) -> list[tuple[str, float]]:
        return self._rows(
            "SELECT member, score FROM scores WHERE scope = ?1 AND name = ?2 AND (?3 IS NULL OR score >= ?3)"
            " ORDER BY score DESC, member DESC LIMIT ?4",
            scope, index, at_least, limit,
        )  # fmt: skip

    def unrank(self, scope: str, index: str, members: Sequence[str], below: float | None) -> int:
        rows = [(scope, index, member) for member in members]
        with self._transaction():
            gone = self._db.executemany("DELETE FROM scores WHERE scope = ? AND name = ? AND member = ?", rows).rowcount
            lower = self._db.execute(
                "DELETE FROM scores WHERE scope = ? AND name = ? AND score < ?", (scope, index, below)
            ).rowcount
            return max(gone, 0) + lower

    def count(self, scope: str, name: str, by: int) -> int:
        with self._transaction():
            rows = self._rows(
                "INSERT INTO counters (scope, name, value) VALUES (?, ?, ?)"
                " ON CONFLICT (scope, name) DO UPDATE SET value = value + excluded.value RETURNING value",
                scope, name, by,
            )  # fmt: skip
            return int(rows[0][0])

    def ping(self) -> None:
        self._rows("SELECT last FROM versions")

    def _rows(self, sql: str, *args: object) -> list[Any]:
        # all of them at once: a statement left half read keeps the transaction from its end
        return self._db.execute(sql, args).fetchall()

    def _entries(self, condition: str, scope: str, ledger: str, argument: object) -> list[bytes]:
        rows = self._rows(
            "SELECT data FROM ledgers JOIN entries ON entries.ledger = ledgers.key"  # noqa: S608
            f" WHERE scope = ? AND name = ? AND (expires IS NULL OR expires > ?) {condition}",
            scope, ledger, self._clock(), argument,
        )  # fmt: skip
        return [data for (data,) in rows]

    def _ledger(self, scope: str, name: str, now: float) -> int:
        """The key of the ledger, made anew if it is absent or expired."""
        self._rows("DELETE FROM ledgers WHERE scope = ? AND name = ? AND expires <= ?", scope, name, now)
        self._rows("INSERT OR IGNORE INTO ledgers (scope, name) VALUES (?, ?)", scope, name)
        return int(self._rows("SELECT key FROM ledgers WHERE scope = ? AND name = ?", scope, name)[0][0])

    def _check_version(self, scope: str, name: str, expect: int | None) -> int:
        record = self.get(scope, name)
        there = ABSENT if record is None else record.version
        if expect is not None and expect != there:
            raise Conflict
        return there

    @contextmanager
    def _write(self, scope: str, token: str | None) -> Iterator[float]:
        """A transaction that is refused under a stale token; yields the time."""
        with self._transaction() as now:
            if token is not None:
                rows = self._rows("SELECT token FROM fences WHERE scope = ? AND expires > ?", scope, now)
                if rows and token < rows[0][0]:
                    raise LeaseLost
                self._rows(
                    "REPLACE INTO fences (scope, token, expires) VALUES (?, ?, ?)", scope, token, now + FENCE_KEPT_S
                )
            yield now

    @contextmanager
    def _transaction(self) -> Iterator[float]:
        with _transaction(self._db):
            now = self._clock()
            if now >= self._sweep_at:
                self._sweep(now)
                self._sweep_at = now + _SWEEP_S
            yield now

    def _sweep(self, now: float) -> None:
        for table in ("records", "ledgers", "fences"):
            self._rows(f"DELETE FROM {table} WHERE expires <= ?", now)  # noqa: S608


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    # IMMEDIATE: a transaction that reads first and writes later is refused, not queued, when another process wrote
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # a full disk has rolled back already
            db.execute("ROLLBACK")
        raise


def _connect(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    """A connection to a file that has our tables."""
    db = sqlite3.connect(path, timeout=busy_timeout_s, isolation_level=None)
    try:
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA synchronous = NORMAL")
        _use_wal(db, busy_timeout_s)
        _make_tables(db)
    except BaseException:
        db.close()
        raise
    return db


def _use_wal(db: sqlite3.Connection, busy_timeout_s: float) -> None:
    """Switch the file to WAL. SQLite does not wait for the lock this takes: processes that start together have to."""
    deadline = time.monotonic() + busy_timeout_s
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL").fetchall()
            return
        except sqlite3.OperationalError as error:
            if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _make_tables(db: sqlite3.Connection) -> None:
    with _transaction(db):
        [(application,)] = db.execute("PRAGMA application_id").fetchall()
        [(version,)] = db.execute("PRAGMA user_version").fetchall()
        if (application, version) == (_APPLICATION_ID, _SCHEMA_VERSION):
            return
        if application == _APPLICATION_ID:
            raise sqlite3.DatabaseError(f"its schema is {version}, this release knows {_SCHEMA_VERSION}")
        if application or version or db.execute("SELECT 1 FROM sqlite_master").fetchall():
            raise sqlite3.DatabaseError("it is a database of another program")
        for statement in filter(str.strip, _SCHEMA.split(";\n")):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
