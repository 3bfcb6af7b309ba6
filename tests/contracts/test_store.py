"""What every store must do: the promise of `magent2/store/interface.py`, over all its keepers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from magent2.errors import Conflict, LeaseLost
from magent2.redis_link import RedisLink
from magent2.store.interface import ABSENT, Store
from magent2.store.memory import MemoryStore
from magent2.store.redis import RedisStore
from magent2.store.sqlite import SqliteStore
from tests.conftest import REDIS_NAMES, server_named
from tests.support.servers import RedisServer
from tests.support.wait import wait_until

pytestmark = pytest.mark.anyio

REDIS = [pytest.param(name, marks=pytest.mark.redis) for name in REDIS_NAMES]
OUTLIVING = ["sqlite", *REDIS]
KEEPERS = ["memory", *OUTLIVING]

SOON_S = 0.05
LONG_S = 3600.0
OLD, NEW = "0000000001", "0000000002"
BINARY = b"\x00\xff\xfe nul \x00 and no text \x80\r\n"


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Keeper:
    """A kind of store: `opened` is an instance on the same records each time it is called."""

    opened: Callable[[], AbstractAsyncContextManager[Store]]
    clock: Clock | None


@asynccontextmanager
async def redis_store(url: str) -> AsyncIterator[Store]:
    link = RedisLink(url)
    yield RedisStore(link)
    await link.aclose()


@asynccontextmanager
async def the_same(store: Store) -> AsyncIterator[Store]:
    yield store


@pytest.fixture(params=KEEPERS)
def keeper(request: pytest.FixtureRequest, servers: dict[str, RedisServer], tmp_path: Path) -> Keeper:
    """Each kind of store, empty or with scopes of other tests in it."""
    clock = Clock()
    if request.param == "memory":
        store = MemoryStore(clock)
        return Keeper(lambda: the_same(store), clock)
    if request.param == "sqlite":
        return Keeper(lambda: SqliteStore(tmp_path / "store.db", clock=clock), clock)
    url = server_named(servers, request.param).url
    return Keeper(lambda: redis_store(url), None)


@pytest.fixture
async def store(keeper: Keeper) -> AsyncIterator[Store]:
    async with keeper.opened() as store:
        yield store


@pytest.fixture
def scope() -> str:
    """A scope of this test's own."""
    return f"scope-{uuid4()}"


async def expire(keeper: Keeper, store: Store) -> None:
    """Return when everything that had `SOON_S` left has expired; a witness tells where time cannot be set."""
    witness = f"witness-{uuid4()}"
    await store.put(witness, "w", b"", ttl_s=SOON_S)
    if keeper.clock is not None:
        keeper.clock.now += 2 * SOON_S

    async def gone() -> bool:
        return await store.get(witness, "w") is None

    await wait_until(gone, description="the witness expires")


# ---------------------------------------------------------------- records


async def test_an_absent_record_is_none(store: Store, scope: str) -> None:
    assert await store.get(scope, "n") is None


@pytest.mark.parametrize("data", [b"hello", b"", BINARY, bytes(range(256)) * 1000])
async def test_a_record_is_read_as_it_was_written(store: Store, scope: str, data: bytes) -> None:
    version = await store.put(scope, "n", data)

    record = await store.get(scope, "n")
    assert record is not None
    assert (record.data, record.version) == (data, version)


async def test_records_are_apart_by_scope_and_name(store: Store, scope: str) -> None:
    await store.put(scope, "a", b"1")
    await store.put(scope, "b", b"2")
    await store.put(scope + "2", "a", b"3")

    assert [await value(store, scope, name) for name in "ab"] == [b"1", b"2"]
    assert await value(store, scope + "2", "a") == b"3"


@pytest.mark.parametrize("odd", ["", "a b", "a}:r:b", "{", "}", "%7D", "ü/*?\n", "a:b", "nul\0"])
async def test_scopes_and_names_may_be_any_text(store: Store, scope: str, odd: str) -> None:
    await store.put(scope + odd, "n", b"odd scope")
    await store.put(scope, odd, b"odd name")
    await store.add(scope + odd, odd, odd, b"entry")
    await store.rank(scope + odd, odd, {odd: 1})

    assert await value(store, scope + odd, "n") == b"odd scope"
    assert await value(store, scope, odd) == b"odd name"
    assert await store.find(scope + odd, odd, odd) == b"entry"
    assert await store.ranked(scope + odd, odd, limit=1) == [(odd, 1.0)]


async def test_no_two_scopes_and_names_meet(store: Store, scope: str) -> None:
    await store.put(scope, "x}:r:y", b"1")
    await store.put(scope + "}:r:x", "y", b"2")
    await store.put(scope + "%7D:r:x", "y", b"3")

    assert await value(store, scope, "x}:r:y") == b"1"
    assert await value(store, scope + "}:r:x", "y") == b"2"


async def test_the_kinds_do_not_share_names(store: Store, scope: str) -> None:
    await store.put(scope, "n", b"record")
    await store.add(scope, "n", "1", b"entry")
    await store.rank(scope, "n", {"m": 1})
    await store.count(scope, "n")

    assert await value(store, scope, "n") == b"record"
    assert await store.entries(scope, "n") == [b"entry"]
    assert await store.ranked(scope, "n", limit=1) == [("m", 1.0)]
    assert await store.count(scope, "n") == 2


async def test_versions_of_a_record_grow(store: Store, scope: str) -> None:
    versions = [await store.put(scope, "n", b"%d" % n) for n in range(5)]

    assert versions == sorted(set(versions))
    assert ABSENT not in versions


async def test_without_expect_a_put_writes_over_anything(store: Store, scope: str) -> None:
    await store.put(scope, "n", b"1")
    await store.put(scope, "n", b"2")

    assert await value(store, scope, "n") == b"2"


async def test_a_put_with_the_version_that_is_there_writes(store: Store, scope: str) -> None:
    first = await store.put(scope, "n", b"1", expect=ABSENT)
    await store.put(scope, "n", b"2", expect=first)

    assert await value(store, scope, "n") == b"2"


@pytest.mark.promise("store.cas")
async def test_a_put_with_another_version_conflicts_and_changes_nothing(store: Store, scope: str) -> None:
    first = await store.put(scope, "n", b"1")
    second = await store.put(scope, "n", b"2")

    for wrong in (first, second + 1, ABSENT):
        with pytest.raises(Conflict):
            await store.put(scope, "n", b"3", expect=wrong, ttl_s=LONG_S)

    record = await store.get(scope, "n")
    assert record is not None
    assert (record.data, record.version) == (b"2", second)


async def test_a_put_that_expects_a_version_of_an_absent_record_conflicts(store: Store, scope: str) -> None:
    with pytest.raises(Conflict):
        await store.put(scope, "n", b"1", expect=1)

    assert await store.get(scope, "n") is None


async def test_a_delete_says_whether_the_record_was_there(store: Store, scope: str) -> None:
    await store.put(scope, "n", b"1")

    assert await store.delete(scope, "n") is True
    assert await store.delete(scope, "n") is False
    assert await store.get(scope, "n") is None


async def test_a_delete_removes_only_the_expected_version(store: Store, scope: str) -> None:
    first = await store.put(scope, "n", b"1")
    second = await store.put(scope, "n", b"2")

    for wrong in (first, ABSENT):
        with pytest.raises(Conflict):
            await store.delete(scope, "n", expect=wrong)
    assert await value(store, scope, "n") == b"2"
    assert await store.delete(scope, "n", expect=second) is True


async def test_a_delete_may_expect_absence(store: Store, scope: str) -> None:
    assert await store.delete(scope, "n", expect=ABSENT) is False


@pytest.mark.promise("store.version")
async def test_a_version_is_not_used_again_after_a_delete(store: Store, scope: str) -> None:
    first = await store.put(scope, "n", b"1")
    await store.delete(scope, "n")
    second = await store.put(scope, "n", b"1", expect=ABSENT)

    assert second > first
    with pytest.raises(Conflict):
        await store.put(scope, "n", b"2", expect=first)


@pytest.mark.promise("store.version")
async def test_a_version_is_not_used_again_after_expiry(keeper: Keeper, store: Store, scope: str) -> None:
    first = await store.put(scope, "n", b"1", ttl_s=SOON_S)
    await expire(keeper, store)

    assert await store.put(scope, "n", b"1") > first


@pytest.mark.promise("store.cas")
async def test_of_fifty_equal_puts_one_wins(store: Store, scope: str) -> None:
    first = await store.put(scope, "n", b"start")

    puts = [store.put(scope, "n", b"%d" % n, expect=first) for n in range(50)]
    results = await asyncio.gather(*puts, return_exceptions=True)

    winners = [n for n, result in enumerate(results) if isinstance(result, int)]
    assert len(winners) == 1
    assert sum(isinstance(result, Conflict) for result in results) == 49
    assert await value(store, scope, "n") == b"%d" % winners[0]


# ---------------------------------------------------------------- expiry


@pytest.mark.promise("store.expiry")
async def test_an_expired_record_is_absent(keeper: Keeper, store: Store, scope: str) -> None:
    await store.put(scope, "n", b"1", ttl_s=SOON_S)
    await store.put(scope, "kept", b"2", ttl_s=LONG_S)
    await expire(keeper, store)

    assert await store.get(scope, "n") is None
    assert await store.delete(scope, "n") is False
    await store.put(scope, "n", b"2", expect=ABSENT)
    assert await value(store, scope, "kept") == b"2"


async def test_a_put_without_ttl_removes_the_expiry(keeper: Keeper, store: Store, scope: str) -> None:
    await store.put(scope, "n", b"1", ttl_s=SOON_S)
    await store.put(scope, "n", b"2")
    await expire(keeper, store)

    assert await value(store, scope, "n") == b"2"


async def test_a_put_with_ttl_sets_it_anew(keeper: Keeper, store: Store, scope: str) -> None:
    await store.put(scope, "longer", b"1", ttl_s=SOON_S)
    await store.put(scope, "longer", b"2", ttl_s=LONG_S)
    await store.put(scope, "shorter", b"1", ttl_s=LONG_S)
    await store.put(scope, "shorter", b"2", ttl_s=SOON_S)
    await expire(keeper, store)

    assert await value(store, scope, "longer") == b"2"
    assert await store.get(scope, "shorter") is None


# ---------------------------------------------------------------- ledgers


async def test_an_absent_ledger_is_empty(store: Store, scope: str) -> None:
    assert await store.entries(scope, "l") == []
    assert await store.find(scope, "l", "1") is None


@pytest.mark.promise("store.order")
async def test_entries_come_in_the_order_they_were_added(store: Store, scope: str) -> None:
    for n in (3, 1, 2, 10, 0):
        assert await store.add(scope, "l", str(n), b"%d" % n) is True

    assert await store.entries(scope, "l") == [b"3", b"1", b"2", b"10", b"0"]


async def test_entries_may_start_anywhere(store: Store, scope: str) -> None:
    for n in range(4):
        await store.add(scope, "l", str(n), b"%d" % n)

    assert await store.entries(scope, "l", start=0) == [b"0", b"1", b"2", b"3"]
    assert await store.entries(scope, "l", start=3) == [b"3"]
    assert await store.entries(scope, "l", start=4) == []
    assert await store.entries(scope, "l", start=99) == []


@pytest.mark.promise("store.once")
async def test_an_id_is_added_once_and_keeps_its_first_data(store: Store, scope: str) -> None:
    assert await store.add(scope, "l", "1", b"first") is True
    assert await store.add(scope, "l", "1", b"second") is False

    assert await store.entries(scope, "l") == [b"first"]
    assert await store.find(scope, "l", "1") == b"first"


async def test_equal_data_under_two_ids_is_two_entries(store: Store, scope: str) -> None:
    await store.add(scope, "l", "1", b"same")
    await store.add(scope, "l", "2", b"same")

    assert await store.entries(scope, "l") == [b"same", b"same"]


async def test_an_entry_is_found_by_its_id(store: Store, scope: str) -> None:
    for n in range(3):
        await store.add(scope, "l", f"id{n}", b"%d" % n)

    assert [await store.find(scope, "l", f"id{n}") for n in range(4)] == [b"0", b"1", b"2", None]


@pytest.mark.parametrize("data", [b"", BINARY])
async def test_an_entry_is_read_as_it_was_added(store: Store, scope: str, data: bytes) -> None:
    await store.add(scope, "l", "1", data)

    assert await store.entries(scope, "l") == [data]
    assert await store.find(scope, "l", "1") == data


async def test_ledgers_are_apart_by_scope_and_name(store: Store, scope: str) -> None:
    for at, name in ((scope, "a"), (scope, "b"), (scope + "2", "a")):
        assert await store.add(at, name, "1", f"{at} {name}".encode()) is True

    assert await store.entries(scope, "b") == [f"{scope} b".encode()]
    assert await store.find(scope + "2", "a", "1") == f"{scope}2 a".encode()


async def test_a_cleared_ledger_forgets_its_ids(store: Store, scope: str) -> None:
    await store.add(scope, "l", "1", b"1")
    await store.add(scope, "l", "2", b"2")
    await store.add(scope, "other", "1", b"1")
    await store.clear(scope, "l")

    assert await store.entries(scope, "l") == []
    assert await store.find(scope, "l", "1") is None
    assert await store.add(scope, "l", "2", b"anew") is True
    assert await store.entries(scope, "l") == [b"anew"]
    assert await store.find(scope, "l", "2") == b"anew"
    assert await store.entries(scope, "other") == [b"1"]


async def test_clearing_an_absent_ledger_is_nothing(store: Store, scope: str) -> None:
    await store.clear(scope, "l")

    assert await store.entries(scope, "l") == []


@pytest.mark.promise("store.expiry")
async def test_an_expired_ledger_forgets_its_ids(keeper: Keeper, store: Store, scope: str) -> None:
    await store.add(scope, "l", "1", b"1", ttl_s=SOON_S)
    await expire(keeper, store)

    assert await store.entries(scope, "l") == []
    assert await store.find(scope, "l", "1") is None
    assert await store.add(scope, "l", "1", b"anew") is True
    assert await store.entries(scope, "l") == [b"anew"]


async def test_a_ledger_made_after_an_expired_one_does_not_expire(keeper: Keeper, store: Store, scope: str) -> None:
    await store.add(scope, "l", "1", b"1", ttl_s=SOON_S)
    await expire(keeper, store)
    await store.add(scope, "l", "2", b"2")
    await expire(keeper, store)

    assert await store.entries(scope, "l") == [b"2"]


async def test_an_add_with_ttl_renews_the_whole_ledger(keeper: Keeper, store: Store, scope: str) -> None:
    await store.add(scope, "l", "1", b"1", ttl_s=4 * SOON_S)
    await store.add(scope, "l", "2", b"2", ttl_s=LONG_S)
    await store.add(scope, "again", "1", b"1", ttl_s=4 * SOON_S)
    await store.add(scope, "again", "1", b"1", ttl_s=LONG_S)
    for _ in range(5):
        await expire(keeper, store)

    assert await store.entries(scope, "l") == [b"1", b"2"]
    assert await store.find(scope, "l", "1") == b"1"
    assert await store.entries(scope, "again") == [b"1"]


async def test_an_add_without_ttl_leaves_the_expiry(keeper: Keeper, store: Store, scope: str) -> None:
    await store.add(scope, "l", "1", b"1", ttl_s=LONG_S)
    await store.add(scope, "l", "1", b"1", ttl_s=SOON_S)
    await store.add(scope, "l", "1", b"1")
    await expire(keeper, store)

    assert await store.entries(scope, "l") == []


@pytest.mark.promise("store.once")
async def test_of_fifty_adds_of_one_id_one_is_appended(store: Store, scope: str) -> None:
    added = await asyncio.gather(*[store.add(scope, "l", "1", b"%d" % n) for n in range(50)])

    assert sorted(added) == [False] * 49 + [True]
    assert await store.entries(scope, "l") == [b"%d" % added.index(True)]


# ---------------------------------------------------------------- the fence


async def fenced_writes(store: Store, scope: str, token: str | None) -> list[object]:
    """What each kind of write says under the token: its result, or the error's class."""
    writes = (
        store.put(scope, "new", b"new", token=token),
        store.put(scope, "n", b"changed", token=token),
        store.delete(scope, "n", token=token),
        store.add(scope, "l", "2", b"2", token=token),
        store.clear(scope, "l", token=token),
    )
    results = [(await asyncio.gather(write, return_exceptions=True))[0] for write in writes]
    return [type(result) if isinstance(result, BaseException) else result for result in results]


@pytest.mark.promise("store.fence")
async def test_a_stale_token_is_refused_and_nothing_changed(keeper: Keeper, store: Store, scope: str) -> None:
    version = await store.put(scope, "n", b"1", token=NEW)
    await store.add(scope, "l", "1", b"1", token=NEW)

    assert await fenced_writes(store, scope, OLD) == [LeaseLost] * 5
    with pytest.raises(LeaseLost):
        await store.add(scope, "l", "1", b"1", token=OLD, ttl_s=SOON_S)
    with pytest.raises(LeaseLost):
        await store.put(scope, "n", b"1", expect=version, token=OLD, ttl_s=SOON_S)

    await expire(keeper, store)
    record = await store.get(scope, "n")
    assert record is not None
    assert (record.data, record.version) == (b"1", version)
    assert await store.get(scope, "new") is None
    assert await store.entries(scope, "l") == [b"1"]
    assert await store.find(scope, "l", "2") is None


async def test_a_stale_token_is_refused_before_its_version_is_looked_at(store: Store, scope: str) -> None:
    await store.put(scope, "n", b"1", token=NEW)

    with pytest.raises(LeaseLost):
        await store.put(scope, "n", b"2", expect=ABSENT, token=OLD)
    with pytest.raises(LeaseLost):
        await store.delete(scope, "n", expect=ABSENT, token=OLD)


@pytest.mark.parametrize("token", [NEW, "0000000003", "0000000010", "9999999999", None])
async def test_an_equal_or_greater_or_no_token_is_accepted(store: Store, scope: str, token: str | None) -> None:
    await store.put(scope, "n", b"1", token=NEW)

    assert LeaseLost not in await fenced_writes(store, scope, token)


async def test_tokens_compare_as_strings(store: Store, scope: str) -> None:
    await store.put(scope, "n", b"1", token="0000000009")
    await store.put(scope, "n", b"2", token="0000000010")

    with pytest.raises(LeaseLost):
        await store.put(scope, "n", b"3", token="0000000009")


@pytest.mark.parametrize("kind", ["put", "delete", "add", "add again", "clear"])
@pytest.mark.promise("store.fence")
async def test_every_kind_of_write_raises_the_fence(store: Store, scope: str, kind: str) -> None:
    await store.add(scope, "l", "there", b"")
    writes: dict[str, Callable[[], Awaitable[object]]] = {
        "put": lambda: store.put(scope, "n", b"", token=NEW),
        "delete": lambda: store.delete(scope, "absent", token=NEW),
        "add": lambda: store.add(scope, "l", "1", b"", token=NEW),
        "add again": lambda: store.add(scope, "l", "there", b"", token=NEW),
        "clear": lambda: store.clear(scope, "l", token=NEW),
    }
    await writes[kind]()

    assert await fenced_writes(store, scope, OLD) == [LeaseLost] * 5


async def test_a_write_that_conflicts_does_not_raise_the_fence(store: Store, scope: str) -> None:
    await store.put(scope, "n", b"1", token=OLD)
    with pytest.raises(Conflict):
        await store.put(scope, "n", b"2", expect=ABSENT, token=NEW)
    with pytest.raises(Conflict):
        await store.delete(scope, "n", expect=ABSENT, token=NEW)

    await store.put(scope, "n", b"2", token=OLD)
    assert await value(store, scope, "n") == b"2"


async def test_a_write_without_token_does_not_lower_the_fence(store: Store, scope: str) -> None:
    await store.put(scope, "n", b"1", token=NEW)
    await store.put(scope, "n", b"2")
    await store.delete(scope, "n")

    with pytest.raises(LeaseLost):
        await store.put(scope, "n", b"3", token=OLD)


async def test_the_fence_of_a_scope_does_not_bind_another(store: Store, scope: str) -> None:
    await store.put(scope, "n", b"1", token=NEW)

    assert LeaseLost not in await fenced_writes(store, scope + "2", OLD)


# ---------------------------------------------------------------- sorted indexes


async def test_the_highest_scores_come_first(store: Store, scope: str) -> None:
    await store.rank(scope, "i", {"a": 1, "b": 3.5, "c": -2})
    await store.rank(scope, "i", {"d": 2})

    assert await store.ranked(scope, "i", limit=10) == [("b", 3.5), ("d", 2.0), ("a", 1.0), ("c", -2.0)]


async def test_equal_scores_come_by_member_descending(store: Store, scope: str) -> None:
    await store.rank(scope, "i", {"b": 1, "a": 1, "ü": 1, "C": 1, "": 1, "ab": 1, "z": 0, "\U0001f600": 1, "\uffff": 1})

    members = [member for member, _ in await store.ranked(scope, "i", limit=10)]
    assert members == ["\U0001f600", "\uffff", "ü", "b", "ab", "a", "C", "", "z"]


async def test_ranking_a_member_again_moves_it(store: Store, scope: str) -> None:
    await store.rank(scope, "i", {"a": 1, "b": 2})
    await store.rank(scope, "i", {"a": 3})

    assert await store.ranked(scope, "i", limit=10) == [("a", 3.0), ("b", 2.0)]


async def test_ranking_nobody_is_nothing(store: Store, scope: str) -> None:
    await store.rank(scope, "i", {})

    assert await store.ranked(scope, "i", limit=10) == []


async def test_a_ranking_is_limited(store: Store, scope: str) -> None:
    await store.rank(scope, "i", {str(n): n for n in range(5)})

    assert await store.ranked(scope, "i", limit=2) == [("4", 4.0), ("3", 3.0)]
    assert await store.ranked(scope, "i", limit=0) == []


async def test_a_ranking_may_have_a_floor(store: Store, scope: str) -> None:
    await store.rank(scope, "i", {"a": 1, "b": 2, "c": 3})

    assert await store.ranked(scope, "i", limit=10, at_least=2) == [("c", 3.0), ("b", 2.0)]
    assert await store.ranked(scope, "i", limit=1, at_least=2) == [("c", 3.0)]
    assert await store.ranked(scope, "i", limit=10, at_least=3.5) == []


async def test_scores_keep_all_their_digits(store: Store, scope: str) -> None:
    scores = {"a": 1_760_000_000.123457, "b": 0.1 + 0.2, "c": 1e-9, "d": 2.0**53}
    await store.rank(scope, "i", scores)

    assert dict(await store.ranked(scope, "i", limit=10)) == scores
    exact = await store.ranked(scope, "i", limit=10, at_least=scores["a"])
    assert [member for member, _ in exact] == ["d", "a"]


async def test_members_leave_by_name(store: Store, scope: str) -> None:
    await store.rank(scope, "i", {"a": 1, "b": 2, "c": 3})

    assert await store.unrank(scope, "i", "a", "c", "stranger") == 2
    assert await store.ranked(scope, "i", limit=10) == [("b", 2.0)]


async def test_members_below_a_score_leave(store: Store, scope: str) -> None:
    await store.rank(scope, "i", {"a": 1.5, "b": 2.5, "c": 2.6})

    assert await store.unrank(scope, "i", below=2.5) == 1
    assert await store.ranked(scope, "i", limit=10) == [("c", 2.6), ("b", 2.5)]


async def test_a_member_that_leaves_for_two_reasons_counts_once(store: Store, scope: str) -> None:
    await store.rank(scope, "i", {"a": 1, "b": 2, "c": 3, "d": 4})

    assert await store.unrank(scope, "i", "a", "d", below=3) == 3
    assert await store.ranked(scope, "i", limit=10) == [("c", 3.0)]


async def test_unranking_nothing_removes_nothing(store: Store, scope: str) -> None:
    await store.rank(scope, "i", {"a": 1})

    assert await store.unrank(scope, "i") == 0
    assert await store.unrank(scope, "absent", "a", below=9) == 0
    assert await store.ranked(scope, "i", limit=10) == [("a", 1.0)]


async def test_indexes_are_apart_by_scope_and_name(store: Store, scope: str) -> None:
    await store.rank(scope, "i", {"a": 1})
    await store.rank(scope, "j", {"a": 2})
    await store.rank(scope + "2", "i", {"a": 3})
    await store.unrank(scope, "i", "a")

    assert await store.ranked(scope, "j", limit=1) == [("a", 2.0)]
    assert await store.ranked(scope + "2", "i", limit=1) == [("a", 3.0)]


# ---------------------------------------------------------------- counters


async def test_a_counter_starts_at_zero(store: Store, scope: str) -> None:
    assert [await store.count(scope, "c") for _ in range(3)] == [1, 2, 3]
    assert await store.count(scope, "c", by=10) == 13
    assert await store.count(scope, "c", by=-20) == -7
    assert await store.count(scope, "c", by=0) == -7
    assert await store.count(scope, "untouched", by=0) == 0
    assert await store.count(scope + "2", "c") == 1


@pytest.mark.promise("store.count")
async def test_no_count_is_lost_to_another(store: Store, scope: str) -> None:
    counts = await asyncio.gather(*[store.count(scope, "c") for _ in range(50)])

    assert sorted(counts) == list(range(1, 51))


async def test_the_store_answers_a_ping(store: Store) -> None:
    async with asyncio.timeout(5):
        await store.ping()


# ---------------------------------------------------------------- two instances


@pytest.mark.parametrize("keeper", OUTLIVING, indirect=True)
@pytest.mark.promise("store.shared")
async def test_another_instance_sees_what_the_first_wrote(keeper: Keeper, store: Store, scope: str) -> None:
    version = await store.put(scope, "n", BINARY, token=NEW)
    await store.add(scope, "l", "1", b"1")
    await store.rank(scope, "i", {"a": 1})
    await store.count(scope, "c")

    async with keeper.opened() as other:
        record = await other.get(scope, "n")
        assert record is not None
        assert (record.data, record.version) == (BINARY, version)
        assert await other.add(scope, "l", "1", b"2") is False
        assert await other.entries(scope, "l") == [b"1"]
        assert await other.ranked(scope, "i", limit=1) == [("a", 1.0)]
        assert await other.count(scope, "c") == 2
        with pytest.raises(LeaseLost):
            await other.put(scope, "n", b"", token=OLD)


@pytest.mark.parametrize("keeper", OUTLIVING, indirect=True)
async def test_a_later_instance_keeps_fence_and_versions(keeper: Keeper, scope: str) -> None:
    async with keeper.opened() as first:
        version = await first.put(scope, "n", b"1", token=NEW)
        await first.delete(scope, "n")

    async with keeper.opened() as second:
        assert await second.put(scope, "n", b"2") > version
        with pytest.raises(LeaseLost):
            await second.put(scope, "n", b"3", token=OLD)


async def test_writers_of_two_instances_exclude_each_other(keeper: Keeper, store: Store, scope: str) -> None:
    async with keeper.opened() as other:
        adds = [one.add(scope, "l", str(n), b"%d" % n) for n in range(25) for one in (store, other)]
        puts = [one.put(scope, "n", b"", expect=ABSENT) for _ in range(25) for one in (store, other)]
        added = await asyncio.gather(*adds)
        written = await asyncio.gather(*puts, return_exceptions=True)

    assert sum(added) == 25
    assert sum(isinstance(result, int) for result in written) == 1
    assert sorted(await store.entries(scope, "l")) == sorted(b"%d" % n for n in range(25))


async def value(store: Store, scope: str, name: str) -> bytes | None:
    """The data of a record that may be absent."""
    record = await store.get(scope, name)
    return None if record is None else record.data
