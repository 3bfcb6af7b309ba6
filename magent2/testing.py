"""For users' tests: the whole service in one process, over real HTTP, with a runner that does as the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from magent2.bus.interface import Bus
from magent2.bus.memory import MemoryBus
from magent2.conversations import Conversations
from magent2.gateway.app import create_app
from magent2.gateway.server import Server, bind
from magent2.gateway.streams import Streams
from magent2.runner.echo import EchoRunner
from magent2.runner.interface import Parked, Result, Runner, Turn
from magent2.settings import GatewayConfig, WorkerConfig
from magent2.store.history import user_item
from magent2.store.interface import Store
from magent2.store.memory import MemoryStore
from magent2.worker.worker import Worker

Script = Callable[[Turn], Awaitable[str]]


class ScriptedRunner:
    """A runner whose answers a test writes: `async def script(turn): turn.sink.token(…, 0); return "the answer"`."""

    kind = "scripted"
    model = "scripted"

    def __init__(self, script: Script) -> None:
        self._script = script
        self.turns: list[Turn] = []
        """Every turn it was asked to answer, in order."""

    async def run(self, turn: Turn) -> Result | Parked:
        self.turns.append(turn)
        text = await self._script(turn)
        asked = user_item(turn.envelope.content or "")
        return Result([asked, {"role": "assistant", "content": text}], text)

    async def aclose(self) -> None:
        """Nothing was opened."""


@dataclass(frozen=True, slots=True)
class Service:
    """A running gateway and, where a runner was given, its worker."""

    base_url: str
    conversations: Conversations
    streams: Streams
    worker: Worker | None


@asynccontextmanager
async def running(
    runner: Runner | None = None,
    *,
    agent: str = "DevAgent",
    bus: Bus | None = None,
    store: Store | None = None,
    gateway: GatewayConfig | None = None,
    worker: WorkerConfig | None = None,
    with_worker: bool = True,
) -> AsyncIterator[Service]:
    """Gateway and worker for the length of the block, on a free port; by default the echo runner, all in memory."""
    conversations = Conversations(bus or MemoryBus())
    config = replace(gateway or GatewayConfig(), port=0)
    listener = bind(config, allow_anonymous=False)

    @asynccontextmanager
    async def opened() -> AsyncIterator[Conversations]:
        yield conversations

    app = create_app(config, opened)
    server = Server(app)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    working: asyncio.Task[None] | None = None
    made = None
    if with_worker:
        made = Worker(
            conversations, store or MemoryStore(), runner or EchoRunner(), worker or WorkerConfig(agent, drain_s=0)
        )
        working = asyncio.create_task(made.run())
    try:
        while not server.started and not serving.done():  # noqa: ASYNC110  uvicorn has no event for it
            await asyncio.sleep(0.002)
        yield Service(f"http://127.0.0.1:{listener.getsockname()[1]}", conversations, app.state.streams, made)
    finally:
        if made is not None and working is not None:
            made.stop()
            await working
        app.state.streams.close()
        server.should_exit = True
        await serving
