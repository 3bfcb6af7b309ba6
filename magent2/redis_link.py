"""One process's links to one Redis or Valkey server: the batching writer, scripts, and clients of their own.

Used by `bus/redis` and `store/redis`. No write is ever repeated here: redis-py 8 repeats commands up to ten times by
default, which turns one lost answer into several entries, so all retries are off and a broken connection surfaces as
`Unavailable`. Whether to repeat is for the caller, who knows what a repeat means.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import redis
import redis.asyncio
from redis.asyncio.connection import AbstractConnection
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from magent2.errors import (
    Conflict,
    DedupConflict,
    KeyBusy,
    LeaseLost,
    Magent2Error,
    QueueFull,
    Unavailable,
)

Arg = str | bytes | int | float

COMMAND_TIMEOUT_S = 2.0
"""A server that does not answer a command within this is unavailable; doors answer 503 within two seconds."""
CONNECT_TIMEOUT_S = 1.5

_MAX_BATCH = 256

# what our scripts say with `redis.error_reply`
_SAID: dict[str, type[Magent2Error]] = {
    "LEASELOST": LeaseLost,
    "DEDUPCONFLICT": DedupConflict,
    "KEYBUSY": KeyBusy,
    "QUEUEFULL": QueueFull,
    "CONFLICT": Conflict,
}


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script of the package and its SHA-1, by which the server knows it."""

    name: str
    source: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        # S324: the server names scripts by SHA-1
        object.__setattr__(self, "sha", hashlib.sha1(self.source.encode()).hexdigest())  # noqa: S324


@cache
def load_script(package: str, name: str) -> Script:
    """The script `scripts/<name>.lua` of a package."""
    return Script(name, (files(package) / "scripts" / f"{name}.lua").read_text(encoding="utf-8"))


def as_ours(error: RedisError) -> Exception:
    """The error in our words: what a script said, `Unavailable` for an outage, else the error itself."""
    if isinstance(error, RedisConnectionError | RedisTimeoutError):
        return Unavailable(f"redis: {type(error).__name__}")
    text = str(error)
    word = text.split(" ", 1)[0].removeprefix("-")
    if said := _SAID.get(word):
        return said()
    # refused, not executed: read-only replica, memory or disk full, loading, no quorum, rights taken away
    refused = isinstance(error, ResponseError) and word in _REFUSALS
    if refused or any(refusal in text for refusal in _REFUSED_IN_SCRIPT):
        return Unavailable(f"redis: {word}")
    return error


_REFUSALS = frozenset(
    {"READONLY", "OOM", "MISCONF", "LOADING", "MASTERDOWN", "NOREPLICAS", "CLUSTERDOWN", "TRYAGAIN", "NOAUTH", "NOPERM",
     "WRONGPASS", "BUSY"}
)  # fmt: skip
_REFUSED_IN_SCRIPT = (
    "-OOM",
    "-READONLY",
    "-MISCONF",
    "command not allowed when used memory",
    "can't write against a read",
    "Protocol error: unauthenticated",  # a large command before AUTH
)


@dataclass(slots=True)
class _Call:
    args: tuple[Arg, ...]
    script: Script | None
    future: asyncio.Future[Any]


class RedisLink:
    """Commands and scripts of one event loop, sent in batches: what accumulated while the last batch was in flight.

    Batching needs no timer, and lowers the latency under load: 32 writers reach four times the rate of awaited single
    commands. The order of calls is the order of execution.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = redis.asyncio.Redis.from_url(
            url, protocol=2, retry=Retry(NoBackoff(), 0),
            socket_timeout=COMMAND_TIMEOUT_S, socket_connect_timeout=CONNECT_TIMEOUT_S,
        )  # fmt: skip
        self._waiting: list[_Call] = []
        self._flushing: asyncio.Task[None] | None = None

    async def command(self, *args: Arg) -> Any:
        """Run one command. Raises `Unavailable`, or what the server says."""
        return await self._submit(_Call(args, None, asyncio.get_running_loop().create_future()))

    async def script(self, script: Script, keys: Sequence[str], args: Sequence[Arg]) -> Any:
        """Run a script. Raises `Unavailable`, or what the script says with `redis.error_reply`."""
        call_args = ("EVALSHA", script.sha, len(keys), *keys, *args)
        return await self._submit(_Call(call_args, script, asyncio.get_running_loop().create_future()))

    async def server_config(self, *names: str) -> dict[str, str | None]:
        """Settings of the server; None for each where it does not tell, as managed servers do.

        Raises `Unavailable` for whatever else keeps us out: no server, wrong password, no such database.
        """
        try:
            await self.command("PING")
        except RedisError as error:
            raise Unavailable(f"redis: {error}") from None
        told: dict[str, str | None] = {}
        for name in names:
            try:
                reply = await self.command("CONFIG", "GET", name)
            except (RedisError, Unavailable):
                told[name] = None
                continue
            value = reply.get(name.encode(), reply.get(name)) if isinstance(reply, dict) else reply[1]
            told[name] = value.decode() if isinstance(value, bytes) else value
        return told

    def blocking_client(self, block_s: float) -> redis.asyncio.Redis:
        """A client of its own for reads that block up to `block_s`; the caller closes it."""
        return redis.asyncio.Redis.from_url(
            self.url, protocol=2, retry=Retry(NoBackoff(), 0), single_connection_client=True,
            socket_timeout=block_s + COMMAND_TIMEOUT_S, socket_connect_timeout=CONNECT_TIMEOUT_S,
        )  # fmt: skip

    async def connection(self) -> AbstractConnection:
        """A bare connection, open, for pub/sub; the caller disconnects it. Raises `Unavailable`."""
        connection: AbstractConnection = self._client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
        except (RedisError, OSError) as error:
            raise Unavailable(f"redis: {type(error).__name__}") from error
        return connection

    def thread_client(self) -> redis.Redis:
        """A synchronous client for a thread; the caller closes it."""
        return redis.Redis.from_url(
            self.url, protocol=2, retry=Retry(NoBackoff(), 0),
            socket_timeout=COMMAND_TIMEOUT_S, socket_connect_timeout=CONNECT_TIMEOUT_S,
        )  # fmt: skip

    async def aclose(self) -> None:
        """Finish what was submitted and close the connection."""
        if self._flushing is not None:
            await asyncio.wait({self._flushing})  # awaiting the task itself would pass a cancellation on to it
        await self._client.aclose()

    async def _submit(self, call: _Call) -> Any:
        # here, not in the pipeline: text that is no UTF-8 must fail its own call, not the whole batch
        command, *args = call.args
        call.args = (command, *(arg.encode() if isinstance(arg, str) else arg for arg in args))
        self._waiting.append(call)
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush())
        return await call.future

    async def _flush(self) -> None:
        batch: list[_Call] = []
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:_MAX_BATCH], self._waiting[_MAX_BATCH:]
                await self._send(batch)
        except BaseException as error:  # a fault of ours or the end of the loop: nobody may wait for ever
            left, self._waiting = [*batch, *self._waiting], []
            for call in left:
                if not call.future.done():
                    call.future.set_exception(Unavailable(f"redis: {type(error).__name__}"))
            raise
        finally:
            self._flushing = None

    async def _send(self, batch: list[_Call]) -> None:
        replies = await self._execute([call.args for call in batch])
        missing = [call for call, reply in zip(batch, replies, strict=True) if isinstance(reply, NoScriptError)]
        if missing:
            # the server restarted or was flushed: not executed, so sending again repeats nothing
            sources = {call.script.source for call in missing if call.script is not None}
            await self._execute([("SCRIPT", "LOAD", source) for source in sources])
            again = iter(await self._execute([call.args for call in missing]))
            replies = [next(again) if isinstance(reply, NoScriptError) else reply for reply in replies]
        for call, reply in zip(batch, replies, strict=True):
            if call.future.done():  # its caller was cancelled
                continue
            if isinstance(reply, RedisError):
                call.future.set_exception(as_ours(reply))
            else:
                call.future.set_result(reply)

    async def _execute(self, commands: Sequence[tuple[Arg, ...]]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for args in commands:
            pipeline.execute_command(*args)
        try:
            return list(await pipeline.execute(raise_on_error=False))
        except RedisError as error:
            return [error] * len(commands)
        except (OSError, AttributeError) as error:
            # refused while resolving or connecting; or written to a connection that is closing, where redis-py 8.1 and
            # the event loop trip over what is None by then
            return [RedisConnectionError(type(error).__name__)] * len(commands)
