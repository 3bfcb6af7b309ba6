"""The only place that picks: which bus, which store, which runner."""

from __future__ import annotations

import fcntl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from magent2.bus.interface import Bus
from magent2.bus.memory import MemoryBus
from magent2.conversations import Conversations
from magent2.errors import BadSettings
from magent2.runner.config import RunnerConfig
from magent2.runner.echo import EchoRunner
from magent2.runner.interface import Runner
from magent2.settings import Settings
from magent2.store.interface import Store
from magent2.tools.registry import ToolDeps, build


@asynccontextmanager
async def make_backends(settings: Settings) -> AsyncIterator[tuple[Bus, Store]]:
    """The bus and the store the settings ask for, closed at the end of the block."""
    if urlsplit(settings.bus_url).scheme == "memory":
        from magent2.store.sqlite import SqliteStore

        with _only_user_of(settings.agent_session_path):
            async with SqliteStore(settings.agent_session_path) as store:
                yield MemoryBus(settings.bus()), store
        return

    # imported late: the in-memory service starts without paying for redis-py
    from magent2.bus.redis import RedisBus
    from magent2.redis_link import RedisLink
    from magent2.store.redis import RedisStore

    link = RedisLink(settings.bus_url)
    bus = RedisBus(link, settings.bus())
    try:
        yield bus, RedisStore(link)
    finally:
        await bus.aclose()
        await link.aclose()


@contextmanager
def _only_user_of(path: Path) -> Iterator[None]:
    """Keep other processes from the file: two in-memory buses know nothing of each other's leases.

    Raises `BadSettings`. The lock goes with the process, however that ends.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(path.name + ".lock").open("w", encoding="utf-8")
    except OSError as error:
        raise BadSettings(f"AGENT_SESSION_PATH: cannot write {str(path)!r}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadSettings(f"{str(path)!r} is in use by another magent2 local: set AGENT_SESSION_PATH") from None
        yield


def make_runner(config: RunnerConfig, conversations: Conversations, store: Store) -> Runner:
    """The runner the configuration asks for. Raises `BadAgent` when the user's agent cannot be loaded.

    An agent of the user's own brings its tools; it gets ours only where `AGENT_TOOLS` names them.
    """
    if config.kind == "echo":
        return EchoRunner()
    from magent2.runner.openai import OpenAIRunner  # imports the SDK: seconds

    explicit = config.explicit_tools or config.agent is not None
    return OpenAIRunner(config, build(ToolDeps(conversations, store), allowed=config.tools, explicit=explicit))
