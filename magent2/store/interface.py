"""What a store promises: records with compare-and-set, ledgers, sorted indexes and counters. Values are opaque bytes.

Everything is addressed by `(scope, name)`. A scope is what stands and falls together: a keeper that shards puts it on
one shard, and it is the unit of fencing: a scope remembers the highest token written under, and refuses a smaller one.
Held by `tests/contracts/test_store.py`, which runs over every keeper. All methods raise `Unavailable` when the server
cannot be reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

ABSENT = 0
"""As `expect` of `put`: the record must not exist."""


@dataclass(frozen=True, slots=True)
class Record:
    """A value and its version. A version is never used twice for one record, not even after a delete."""

    data: bytes
    version: int


class Store(Protocol):
    """The records of one deployment. `token` is the fencing token of a job; a stale one raises `LeaseLost`."""

    # records
    async def get(self, scope: str, name: str) -> Record | None:
        """The record, unless it is absent or expired."""

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
        """Write the record and return its new version; without `ttl_s` it does not expire.

        `expect` is the version that must be there (`ABSENT` for none), else `Conflict`; None writes over anything.
        """

    async def delete(self, scope: str, name: str, *, expect: int | None = None, token: str | None = None) -> bool:
        """Remove the record; whether it was there. `expect` as in `put`."""

    # ledgers: append-only lists whose entries have an id, each id once
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
        """Append unless the id is there already; whether it was appended. `ttl_s` renews the whole ledger's expiry."""

    async def find(self, scope: str, ledger: str, id: str) -> bytes | None:
        """The entry with this id."""

    async def entries(self, scope: str, ledger: str, *, start: int = 0) -> Sequence[bytes]:
        """All entries from position `start` on, in the order they were added."""

    async def clear(self, scope: str, ledger: str, *, token: str | None = None) -> None:
        """Forget the ledger, ids included."""

    # sorted indexes
    async def rank(self, scope: str, index: str, scores: Mapping[str, float]) -> None:
        """Set the score of each member, adding the new ones."""

    async def ranked(
        self, scope: str, index: str, *, limit: int, at_least: float | None = None
    ) -> Sequence[tuple[str, float]]:
        """The `limit` members with the highest scores, highest first; equal scores by member, descending."""

    async def unrank(self, scope: str, index: str, *members: str, below: float | None = None) -> int:
        """Remove these members, and all with a score under `below`; how many went."""

    # counters
    async def count(self, scope: str, name: str, by: int = 1) -> int:
        """Add to a counter that starts at 0; its new value."""

    async def ping(self) -> None:
        """Return when the store answers."""
