"""The routes' functions: parse, call a verb, answer."""

from __future__ import annotations

import asyncio
import re
from dataclasses import asdict

import anyio
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from magent2.conversations import Conversations
from magent2.errors import Unavailable
from magent2.gateway.problems import Problem
from magent2.gateway.streams import Streams
from magent2.models.envelope import NAME, MessageEnvelope
from magent2.settings import GatewayConfig

READY_S = 1.5
RECEIVE_S = 15.0
SEND_TIMEOUT_S = 30.0
_ID = re.compile(rf"{NAME}\Z")
_CURSOR_LENGTH = 64


async def send(request: Request) -> Response:
    """`POST /send`."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Problem(415, "unsupported_media_type", "send application/json")
    envelope = MessageEnvelope.model_validate_json(await _body(request))
    accepted = await _conversations(request).send(envelope)
    return JSONResponse({"status": "ok", **asdict(accepted)})


async def stream(request: Request) -> Response:
    """`GET /stream/{conversation_id}`."""
    conversation_id = request.path_params["conversation_id"]
    if not _ID.match(conversation_id):
        raise Problem(422, "invalid", "conversation_id: letters, digits, dot, underscore and dash, at most 128")
    streams: Streams = request.app.state.streams
    config: GatewayConfig = request.app.state.config
    streams.check_room()
    max_events = _max_events(request)
    batches = await _conversations(request).open(conversation_id, _cursor(request), until=_until(request))
    return EventSourceResponse(
        streams.write(batches, max_events),
        ping=config.ping_s,
        ping_message_factory=lambda: ServerSentEvent(comment="ping"),
        sep="\n",
        send_timeout=SEND_TIMEOUT_S,
        shutdown_event=anyio.Event(),
        shutdown_grace_period=2,
    )


async def health(request: Request) -> Response:
    """`GET /health`: this process serves; touches nothing else."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """`GET /ready`: what is needed to serve is there, or a 503 that names what is not."""
    try:
        async with asyncio.timeout(READY_S):
            await _conversations(request).ready()
    except (Unavailable, TimeoutError):
        raise Problem(503, "not_ready", "bus: cannot be reached", Retry_After="1") from None
    return JSONResponse({"status": "ok", "checks": {"bus": "ok"}})


async def _body(request: Request) -> bytes:
    """The whole body, never more than the limit in memory, within the deadline."""
    config: GatewayConfig = request.app.state.config
    too_large = Problem(413, "too_large", f"the body may have {config.max_body_bytes} bytes")
    if int(request.headers.get("content-length", 0)) > config.max_body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(RECEIVE_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > config.max_body_bytes:
                    raise too_large
    except TimeoutError:
        raise Problem(408, "too_slow", f"the body did not arrive within {RECEIVE_S:g} s", Connection="close") from None
    return bytes(body)


def _conversations(request: Request) -> Conversations:
    conversations: Conversations = request.state.conversations
    return conversations


def _cursor(request: Request) -> str:
    """Where to start: the header wins over the query."""
    query = request.query_params
    cursor = request.headers.get("last-event-id") or query.get("last_id") or query.get("after") or ""
    if len(cursor) > _CURSOR_LENGTH:
        raise Problem(400, "bad_cursor", "not a cursor: take one from the `id:` of an event")
    return cursor


def _max_events(request: Request) -> int | None:
    text = request.query_params.get("max_events")
    if text is None:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise Problem(422, "invalid", "max_events: a whole number from 1")
    return int(text)


def _until(request: Request) -> str | None:
    until = request.query_params.get("until")
    if until is not None and not _ID.match(until):
        raise Problem(422, "invalid", "until: the id of a message, or done")
    return until
