"""The gateway: one table of routes, and what they share for the application's lifetime."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Route

from magent2.conversations import Conversations
from magent2.gateway import endpoints, problems
from magent2.gateway.access import Access
from magent2.gateway.streams import Streams, closed_by_signal
from magent2.settings import GatewayConfig

OpenConversations = Callable[[], AbstractAsyncContextManager[Conversations]]

ROUTES: Sequence[BaseRoute] = (
    Route("/send", endpoints.send, methods=["POST"]),
    Route("/stream/{conversation_id}", endpoints.stream, methods=["GET"]),
    Route("/health", endpoints.health, methods=["GET"]),
    Route("/ready", endpoints.ready, methods=["GET"]),
)


def create_app(
    config: GatewayConfig, open_conversations: OpenConversations, *, routes: Sequence[BaseRoute] = ()
) -> Starlette:
    """The ASGI application. `open_conversations` is entered once, at start; `routes` are those of extensions."""
    streams = Streams(config.max_streams, config.max_unsent_bytes)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        async with open_conversations() as conversations:
            with closed_by_signal(streams):
                yield {"conversations": conversations}

    app = Starlette(
        routes=[*ROUTES, *routes],
        # 404 and 405 are HTTPExceptions, everything else comes as itself
        exception_handlers={Exception: problems.answer, **dict.fromkeys(problems.HANDLED, problems.answer)},
        middleware=[Middleware(Access, config)],
        lifespan=lifespan,
    )
    app.state.streams = streams
    app.state.config = config
    return app
