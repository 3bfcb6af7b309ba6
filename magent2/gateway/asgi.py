"""`uvicorn magent2.gateway.asgi:app`: the gateway as the environment describes it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette

from magent2 import log
from magent2.conversations import Conversations
from magent2.errors import BadSettings
from magent2.gateway.app import create_app
from magent2.settings import Settings, load_settings
from magent2.wiring import make_backends


def app_of(settings: Settings) -> Starlette:
    """The gateway of these settings; the bus is opened when it starts."""

    @asynccontextmanager
    async def open_conversations() -> AsyncIterator[Conversations]:
        async with make_backends(settings) as (bus, _):
            yield Conversations(bus)

    return create_app(settings.gateway(), open_conversations)


def _app() -> Starlette:
    try:
        settings = load_settings()
    except BadSettings as error:
        sys.stderr.write(f"magent2: {error}\n")
        raise SystemExit(2) from None
    log.set_up(settings.log())
    return app_of(settings)


def __getattr__(name: str) -> Starlette:
    # made when a server asks for it, so that importing this module reads no environment
    if name == "app":
        globals()["app"] = _app()
        return globals()["app"]  # type: ignore[no-any-return]
    raise AttributeError(name)
