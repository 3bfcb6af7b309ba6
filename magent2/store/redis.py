"""The store on a Redis or Valkey server, shared by all processes.

All keys of a scope carry the hash tag of the scope, so that they live in one slot of a cluster:

    magent2:s:{<scope>}:fence           the highest token written under
    magent2:s:{<scope>}:versions        the version given last
    magent2:s:{<scope>}:r:<name>        a record: hash of `v`, the version, and `d`
    magent2:s:{<scope>}:l:<ledger>      its entries: list
    magent2:s:{<scope>}:i:<ledger>      the position of each id in that list: hash
    magent2:s:{<scope>}:z:<index>       sorted set
    magent2:s:{<scope>}:c:<name>        counter
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from magent2.redis_link import Arg, RedisLink, load_script
from magent2.store.interface import Record

FENCE_KEPT_S = 30 * 86400.0
"""Fence and version counter of a scope go this long after its last write: nobody holds a lease that old."""

_KEPT_MS = int(FENCE_KEPT_S * 1000)


def _key(scope: str, kind: str, name: str | None = None) -> str:
    """A key in the slot of its scope. A `}` would end the hash tag early, and an empty tag is none."""
    tag = scope.replace("%", "%25").replace("}", "%7D") or "%"
    return f"magent2:s:{{{tag}}}:{kind}" + ("" if name is None else f":{name}")


def _ms(ttl_s: float | None) -> Arg:
    return "" if ttl_s is None else round(ttl_s * 1000)


def _any(expect: int | None) -> Arg:
    return "" if expect is None else expect


def _token(token: str | None) -> tuple[str, ...]:
    """The last arguments of a script; left out, not empty, where there is no token."""
    return () if token is None else (token,)


class RedisStore:
    """Records on one server. Nothing is repeated here: after `Unavailable` a write may have happened."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    # records
    async def get(self, scope: str, name: str) -> Record | None:
        version, data = await self._link.command("HMGET", _key(scope, "r", name), "v", "d")
        return None if version is None else Record(data, int(version))

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
        keys = [_key(scope, "r", name), _key(scope, "versions"), _key(scope, "fence")]
        args = [data, _any(expect), _ms(ttl_s), _KEPT_MS, *_token(token)]
        return int(await self._script("put", keys, args))

    async def delete(self, scope: str, name: str, *, expect: int | None = None, token: str | None = None) -> bool:
        keys = [_key(scope, "r", name), _key(scope, "fence")]
        return bool(await self._script("delete", keys, [_any(expect), _KEPT_MS, *_token(token)]))

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
        keys = [_key(scope, "l", ledger), _key(scope, "i", ledger), _key(scope, "fence")]
        return bool(await self._script("add", keys, [id, data, _ms(ttl_s), _KEPT_MS, *_token(token)]))

    async def find(self, scope: str, ledger: str, id: str) -> bytes | None:
        data: bytes | None = await self._script("find", [_key(scope, "l", ledger), _key(scope, "i", ledger)], [id])
        return data

    async def entries(self, scope: str, ledger: str, *, start: int = 0) -> Sequence[bytes]:
        return list(await self._link.command("LRANGE", _key(scope, "l", ledger), start, -1))

    async def clear(self, scope: str, ledger: str, *, token: str | None = None) -> None:
        keys = [_key(scope, "l", ledger), _key(scope, "i", ledger), _key(scope, "fence")]
        await self._script("clear", keys, [_KEPT_MS, *_token(token)])

    # sorted indexes
    async def rank(self, scope: str, index: str, scores: Mapping[str, float]) -> None:
        pairs: list[Arg] = []
        for member, score in scores.items():
            pairs += (float(score), member)
        if pairs:
            await self._link.command("ZADD", _key(scope, "z", index), *pairs)

    async def ranked(
        self, scope: str, index: str, *, limit: int, at_least: float | None = None
    ) -> Sequence[tuple[str, float]]:
        floor = "-inf" if at_least is None else float(at_least)
        found = await self._link.command(
            "ZREVRANGEBYSCORE", _key(scope, "z", index), "+inf", floor, "WITHSCORES", "LIMIT", 0, limit
        )
        return [(member.decode(), float(score)) for member, score in zip(found[::2], found[1::2], strict=True)]

    async def unrank(self, scope: str, index: str, *members: str, below: float | None = None) -> int:
        key, gone = _key(scope, "z", index), 0
        if members:
            gone += int(await self._link.command("ZREM", key, *members))
        if below is not None:
            gone += int(await self._link.command("ZREMRANGEBYSCORE", key, "-inf", f"({float(below)!r}"))
        return gone

    # counters
    async def count(self, scope: str, name: str, by: int = 1) -> int:
        return int(await self._link.command("INCRBY", _key(scope, "c", name), by))

    async def ping(self) -> None:
        await self._link.command("PING")

    async def _script(self, name: str, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        return await self._link.script(load_script("magent2.store", name), keys, args)
