"""Gateway and worker in one process on the in-memory bus: `magent2 local`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from typing import NoReturn

from starlette.applications import Starlette

from magent2 import log, preflight
from magent2.conversations import Conversations
from magent2.gateway.app import create_app
from magent2.gateway.server import Server, bind
from magent2.settings import Settings
from magent2.store.interface import Store
from magent2.wiring import make_backends
from magent2.worker.service import work

CTRL_C_DRAIN_S = 0.3
"""Nothing in memory outlives the process: Ctrl-C does not wait for runs."""


async def serve(settings: Settings, agent: str | None) -> NoReturn:
    """Serve until told to stop, and end the process. Raises `Magent2Error` for what keeps it from starting."""
    config = settings.gateway()
    listener = bind(config, allow_anonymous=settings.magent2_allow_anonymous)
    runner = settings.runner(agent)
    await preflight.check_runner(settings, runner)
    preflight.warn(settings)
    url = f"http://{'localhost' if config.host == '127.0.0.1' else config.host}:{listener.getsockname()[1]}"
    who = runner.agent or (runner.model if runner.kind == "openai" else "echo: set OPENAI_API_KEY for a model")
    sys.stderr.write(f"magent2 local: {url}  agent {settings.agent_name} ({who})\n")

    async with make_backends(settings) as (bus, store):
        conversations = Conversations(bus)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        server = Server(_app(settings, conversations), lambda told: loop.call_soon_threadsafe(stop.set))
        working = asyncio.create_task(_work(settings, agent, conversations, store, stop, server))
        await server.serve(sockets=[listener])
        stop.set()
        await working
    log.leave(server.exit_code)


def _app(settings: Settings, conversations: Conversations) -> Starlette:
    @contextlib.asynccontextmanager
    async def open_conversations() -> AsyncIterator[Conversations]:
        yield conversations

    return create_app(settings.gateway(), open_conversations)


async def _work(
    settings: Settings, agent: str | None, conversations: Conversations, store: Store, stop: asyncio.Event,
    server: Server,
) -> None:  # fmt: skip
    """The worker's part; when it cannot start or breaks, the gateway ends too."""
    try:
        await work(settings, agent, conversations, store, stop, drain_s=lambda: _drain_s(settings, server))
    finally:
        server.should_exit = True


def _drain_s(settings: Settings, server: Server) -> float:
    return CTRL_C_DRAIN_S if server.told == signal.SIGINT else settings.worker_drain_seconds
