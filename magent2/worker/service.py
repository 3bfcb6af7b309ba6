"""A worker as a process of its own: starts, works, and ends on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable

from magent2 import log, preflight
from magent2.conversations import Conversations
from magent2.errors import BadAgent, BadSettings, Magent2Error, Unavailable
from magent2.runner.config import RunnerConfig
from magent2.runner.interface import Runner
from magent2.settings import Settings, load_settings
from magent2.store.interface import Store
from magent2.wiring import make_backends, make_runner
from magent2.worker.worker import Worker

logger = logging.getLogger(__name__)

USAGE, DOWN = 2, 5


def exit_code(error: Magent2Error) -> int:
    """The exit code of a command that ended in this error."""
    match error:
        case Unavailable():
            return DOWN
        case BadSettings() | BadAgent():
            return USAGE
    return 1


def main(agent: str | None = None) -> None:
    """Run a worker until SIGTERM or Ctrl-C; exits by itself."""
    try:
        settings = load_settings()
        log.set_up(settings.log())
        asyncio.run(_serve(settings, agent))
    except Magent2Error as error:
        sys.stderr.write(f"magent2: {error}\n")
        sys.exit(exit_code(error))


async def _serve(settings: Settings, agent: str | None) -> None:
    with _Told() as told:
        config = settings.runner(agent)
        durability = await preflight.check_bus(settings)
        await preflight.check_runner(settings, config)
        preflight.warn(settings)
        logger.info("bus: %s", durability)
        async with make_backends(settings) as (bus, store):
            conversations = Conversations(bus)
            async with _opened(config, conversations, store) as runner:
                told.worker = Worker(conversations, store, runner, settings.worker())
                _say_start(settings, runner)
                await told.worker.run()
    log.leave(told.code)


def _say_start(settings: Settings, runner: Runner) -> None:
    logger.info("worker ready: agent=%s runner=%s model=%s", settings.agent_name, runner.kind, runner.model)


@contextlib.asynccontextmanager
async def _opened(config: RunnerConfig, conversations: Conversations, store: Store) -> AsyncIterator[Runner]:
    """The runner; a thread imports the SDK, so that the loop goes on meanwhile. Raises `BadAgent`."""
    runner = await asyncio.to_thread(make_runner, config, conversations, store)
    try:
        yield runner
    finally:
        await runner.aclose()


async def work(settings: Settings, agent: str | None, conversations: Conversations, store: Store, stop: asyncio.Event,
               *, drain_s: Callable[[], float]) -> None:  # fmt: skip
    """Run a worker inside another service until `stop`, then for up to `drain_s` at that time."""
    config = settings.runner(agent)
    async with _opened(config, conversations, store) as runner:
        worker = Worker(conversations, store, runner, settings.worker())
        _say_start(settings, runner)
        working = asyncio.create_task(worker.run())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        worker.stop(drain_s=drain_s())
        await working


class _Told:
    """Listens for SIGTERM and SIGINT: the first stops the worker, once there is one; any other ends the process."""

    def __init__(self) -> None:
        self.worker: Worker | None = None
        self.code = 0
        self._stopping = False

    def __enter__(self) -> _Told:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._hear, number)
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)

    def _hear(self, number: signal.Signals) -> None:
        self.code = 130 if number == signal.SIGINT else 0
        if self.worker is None or self._stopping:
            log.leave(self.code)
        self._stopping = True
        self.worker.stop()
