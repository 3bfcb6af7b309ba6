"""The store of one process: the same promise as the others, kept in tables under one lock.

It ships, and is not a fake: users' tests run on it. It may be used from several threads, each with its own event loop;
nothing survives the process. Time is `clock`, seconds, and only matters for expiry.
"""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar

from magent2.errors import Conflict, LeaseLost
from magent2.store.interface import ABSENT, Record

Name = tuple[str, str]
K = TypeVar("K")
V = TypeVar("V")

FENCE_KEPT_S = 30 * 86400.0
"""A fence is forgotten this long after the last write under a token: nobody holds a lease that old."""


class _Expiring(Generic[K, V]):
    """A dict whose entries may expire, and then really go: `sweep` costs what has expired, not what is there."""

    def __init__(self) -> None:
        self._entries: dict[K, tuple[V, float]] = {}
        self._due: list[tuple[float, K]] = []
        # at most one live heap entry per key, however often its expiry is renewed; others are dropped when they come up
        self._scheduled: dict[K, float] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K, now: float) -> V | None:
        value, expires = self._entries.get(key, (None, math.inf))
        return None if expires <= now else value

    def put(self, key: K, value: V, expires: float = math.inf) -> None:
        self._entries[key] = (value, expires)
        if expires < self._scheduled.get(key, math.inf):
            self._schedule(key, expires)

    def renew(self, key: K, expires: float) -> None:
        self.put(key, self._entries[key][0], expires)

    def pop(self, key: K) -> None:
        self._entries.pop(key, None)

    def sweep(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            at, key = heapq.heappop(self._due)
            if self._scheduled.get(key) != at:
                continue
            del self._scheduled[key]
            _, expires = self._entries.get(key, (None, math.inf))
            if expires <= now:
                del self._entries[key]
            elif expires < math.inf:
                self._schedule(key, expires)

    def _schedule(self, key: K, expires: float) -> None:
        self._scheduled[key] = expires
        heapq.heappush(self._due, (expires, key))


@dataclass(slots=True)
class _Ledger:
    entries: list[bytes] = field(default_factory=list)
    positions: dict[str, int] = field(default_factory=dict)


class MemoryStore:
    """Records of one process."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # not an asyncio lock: several loops, and nothing here waits
        self._versions = count(ABSENT + 1)
        self._records: _Expiring[Name, Record] = _Expiring()
        self._ledgers: _Expiring[Name, _Ledger] = _Expiring()
        self._fences: _Expiring[str, str] = _Expiring()
        self._indexes: dict[Name, dict[str, float]] = {}
        self._counters: dict[Name, int] = {}

    def size(self) -> int:
        """How many records, ledgers and fences are held, expired ones that are not yet swept included."""
        return len(self._records) + len(self._ledgers) + len(self._fences)

    # records
    async def get(self, scope: str, name: str) -> Record | None:
        with self._lock:
            return self._records.get((scope, name), self._clock())

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
        with self._write(scope, token) as now:
            self._check_version((scope, name), expect, now)
            record = Record(bytes(data), next(self._versions))
            self._records.put((scope, name), record, math.inf if ttl_s is None else now + ttl_s)
            return record.version

    async def delete(self, scope: str, name: str, *, expect: int | None = None, token: str | None = None) -> bool:
        with self._write(scope, token) as now:
            there = self._check_version((scope, name), expect, now)
            self._records.pop((scope, name))
            return there != ABSENT

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
        with self._write(scope, token) as now:
            kept = self._ledgers.get((scope, ledger), now)
            if kept is None:
                kept = _Ledger()
                self._ledgers.put((scope, ledger), kept)
            if ttl_s is not None:
                self._ledgers.renew((scope, ledger), now + ttl_s)
            if id in kept.positions:
                return False
            kept.positions[id] = len(kept.entries)
            kept.entries.append(bytes(data))
            return True

    async def find(self, scope: str, ledger: str, id: str) -> bytes | None:
        with self._lock:
            kept = self._ledgers.get((scope, ledger), self._clock())
            return kept.entries[kept.positions[id]] if kept is not None and id in kept.positions else None

    async def entries(self, scope: str, ledger: str, *, start: int = 0) -> Sequence[bytes]:
        with self._lock:
            kept = self._ledgers.get((scope, ledger), self._clock())
            return kept.entries[start:] if kept is not None else []

    async def clear(self, scope: str, ledger: str, *, token: str | None = None) -> None:
        with self._write(scope, token):
            self._ledgers.pop((scope, ledger))

    # sorted indexes
    async def rank(self, scope: str, index: str, scores: Mapping[str, float]) -> None:
        with self._lock:
            if scores:
                self._indexes.setdefault((scope, index), {}).update(scores)

    async def ranked(
        self, scope: str, index: str, *, limit: int, at_least: float | None = None
    ) -> Sequence[tuple[str, float]]:
        with self._lock:
            scores = self._indexes.get((scope, index), {})
            members = [(score, member) for member, score in scores.items() if at_least is None or score >= at_least]
        return [(member, float(score)) for score, member in heapq.nlargest(limit, members)]

    async def unrank(self, scope: str, index: str, *members: str, below: float | None = None) -> int:
        with self._lock:
            scores = self._indexes.get((scope, index), {})
            going = set(members) & scores.keys()
            if below is not None:
                going |= {member for member, score in scores.items() if score < below}
            for member in going:
                del scores[member]
            if not scores:
                self._indexes.pop((scope, index), None)
            return len(going)

    # counters
    async def count(self, scope: str, name: str, by: int = 1) -> int:
        with self._lock:
            self._counters[scope, name] = value = self._counters.get((scope, name), 0) + by
            return value

    async def ping(self) -> None:
        """Return at once."""

    @contextmanager
    def _write(self, scope: str, token: str | None) -> Iterator[float]:
        """Hold the lock over one write and yield the time; the fence rises only when the block succeeds."""
        with self._lock:
            now = self._clock()
            for table in (self._records, self._ledgers, self._fences):
                table.sweep(now)
            highest = self._fences.get(scope, now)
            if token is not None and highest is not None and token < highest:
                raise LeaseLost
            yield now
            if token is not None:
                self._fences.put(scope, token, now + FENCE_KEPT_S)

    def _check_version(self, name: Name, expect: int | None, now: float) -> int:
        record = self._records.get(name, now)
        there = ABSENT if record is None else record.version
        if expect is not None and expect != there:
            raise Conflict
        return there
