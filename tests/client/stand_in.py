"""A gateway's two routes on a real socket, with everything that goes wrong between it and a client as a script."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

from tests.support.wait import wait_until

Payload = dict[str, Any]
TERMINAL = ("output", "error", "cancelled")


@dataclass
class Answer:
    """What `POST /send` does instead of answering 200. `cut` accepts and drops the connection."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: bool = False


@dataclass
class Connection:
    """What happens to one connection of the stream. All counts are of events sent on it."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    first: bytes = b"retry: 10\n\n"
    cut_after: int | None = None
    cut_inside: int | None = None
    end_after: int | None = None
    chunk: int | None = None
    repeat: bool = False
    """Ignores the cursor asked for and begins at the beginning."""


class _CutError(Exception):
    """The script wants the connection dropped here."""


class _Stream(StreamingResponse):
    """A streaming response that may end without its end: the server then drops the connection."""

    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        except _CutError:
            return


def _later(cursor: str, floor: str) -> bool:
    return [int(part) for part in cursor.split("-")] > [int(part) for part in floor.split("-")]


class StandIn:
    """The script, the log of each conversation, and every request so far."""

    def __init__(self) -> None:
        self.base_url = ""
        self.answers: deque[Answer] = deque()
        self.connections: deque[Connection] = deque()
        self.sends: list[Payload] = []
        self.streams: list[Payload] = []
        self.tokens: list[str | None] = []
        self.react: Callable[[Payload], list[Payload]] = echo
        """What a new message brings into the log, after its `user_message`."""

        self.closing = False
        self._logs: dict[str, list[tuple[str, str]]] = {}
        self._cursors: dict[str, str] = {}
        self._grown = asyncio.Condition()
        self.app = Starlette(
            routes=[Route("/send", self._send, methods=["POST"]), Route("/stream/{conversation_id}", self._stream)]
        )

    def log(self, conversation_id: str) -> list[tuple[str, str]]:
        return self._logs.setdefault(conversation_id, [])

    async def append(self, conversation_id: str, *events: Payload) -> None:
        """Events at the end of a log, for all who follow."""
        entries = self.log(conversation_id)
        for event in events:
            event = {"conversation_id": conversation_id, **event}
            data = json.dumps(event, ensure_ascii=False)
            if any("\ud800" <= character <= "\udfff" for character in data):
                data = json.dumps(event)  # the only way on the wire for half a surrogate pair
            entries.append((f"{len(entries) + 1}-0", data))
        async with self._grown:
            self._grown.notify_all()

    async def close(self) -> None:
        self.closing = True
        async with self._grown:
            self._grown.notify_all()

    async def _send(self, request: Request) -> Response:
        body = await request.json()
        self.sends.append(body)
        self.tokens.append(request.headers.get("authorization"))
        answer = self.answers.popleft() if self.answers else Answer()
        if answer.status != 200 or answer.body:
            return Response(answer.body, answer.status, answer.headers, media_type="application/json")
        duplicate = body["id"] in self._cursors
        if not duplicate:
            await self._accept(body)
        if answer.cut:
            return _Stream(_cut(), headers={"content-length": "10"})
        accepted = {"status": "ok", "message_id": body["id"], "conversation_id": body["conversation_id"]}
        return JSONResponse({**accepted, "topic": "queue", "cursor": self._cursors[body["id"]], "duplicate": duplicate})

    async def _accept(self, body: Payload) -> None:
        conversation_id = body["conversation_id"]
        self._cursors[body["id"]] = f"{len(self.log(conversation_id))}-0"
        message = {"event": "user_message", "message_id": body["id"], "text": body["content"]}
        message |= {"sender": body["sender"], "recipient": body["recipient"], "metadata": body["metadata"]}
        entered = [message] if body["type"] == "message" else []
        await self.append(conversation_id, *entered, *self.react(body))

    async def _stream(self, request: Request) -> Response:
        connection = self.connections.popleft() if self.connections else Connection()
        cursor = request.headers.get("last-event-id")
        self.streams.append({"last_event_id": cursor, **request.query_params})
        if connection.status != 200:
            error = {"code": "refused", "message": "not now", "request_id": "r1"}
            return JSONResponse({"error": error}, connection.status, connection.headers)
        frames = self._frames(request, connection, cursor or request.query_params.get("after") or "0-0")
        return _Stream(frames, headers=connection.headers)

    async def _frames(self, request: Request, connection: Connection, cursor: str) -> AsyncIterator[bytes]:
        yield connection.first
        sent = 0
        if _ends(connection, sent):
            return
        async for at, data in self._entries(request, "0-0" if connection.repeat else cursor):
            frame = f"id: {at}\ndata: {data}\n\n".encode()
            if sent == connection.cut_inside:
                yield frame[: len(frame) // 2]
                raise _CutError
            size = connection.chunk or len(frame)
            for start in range(0, len(frame), size):
                yield frame[start : start + size]
            sent += 1
            event = json.loads(data)
            answered = event["event"] in TERMINAL and event.get("message_id") == request.query_params.get("until")
            if answered or _ends(connection, sent) or sent == int(request.query_params.get("max_events", 0)):
                return

    async def _entries(self, request: Request, cursor: str) -> AsyncIterator[tuple[str, str]]:
        entries = self.log(request.path_params["conversation_id"])
        until = request.query_params.get("until")
        behind = [json.loads(data) for at, data in entries if not _later(at, cursor)]
        if any(event["event"] in TERMINAL and event.get("message_id") == until for event in behind):
            return
        position = len(behind)
        while not self.closing:
            if position < len(entries):
                position += 1
                yield entries[position - 1]
                continue
            async with self._grown:
                if not self.closing and position == len(entries):
                    await self._grown.wait()


def _ends(connection: Connection, sent: int) -> bool:
    if sent == connection.cut_after:
        raise _CutError
    return sent == connection.end_after


async def _cut() -> AsyncIterator[bytes]:
    yield b""
    raise _CutError


def answer(body: Payload, *events: Payload) -> list[Payload]:
    """A run's events, with what each of them has."""
    run = {"run_id": "run-" + body["id"], "message_id": body["id"], "agent": body["recipient"].partition(":")[2]}
    return [{**run, **event} for event in events]


def tokens(text: str, turn: int = 0) -> list[Payload]:
    """The text as token events of one word each."""
    words = text.split(" ")
    pieces = [word + " " for word in words[:-1]] + words[-1:]
    return [{"event": "token", "text": piece, "index": i, "turn": turn} for i, piece in enumerate(pieces)]


def output(text: str) -> Payload:
    return {"event": "output", "text": text, "usage": None}


def started(attempt: int = 1, resumed_turn: int = 0) -> Payload:
    return {"event": "run_started", "attempt": attempt, "resumed_turn": resumed_turn, "model": "echo"}


def echo(body: Payload) -> list[Payload]:
    """The message back, word by word."""
    if body["type"] == "control":
        return []
    return answer(body, started(), *tokens(body["content"]), output(body["content"]))


def _unfinished(record: logging.LogRecord) -> bool:
    """Keep the server from complaining about connections that are dropped on purpose."""
    return "without completing response" not in record.getMessage()


async def _stop(server: uvicorn.Server, listener: socket.socket) -> None:
    """What `Server.shutdown` does, without its fixed 0.1 s."""
    for accepting in server.servers:
        accepting.close()
    listener.close()
    for connection in list(server.server_state.connections):
        connection.shutdown()
    await wait_until(lambda: not server.server_state.connections, description="connections closed")


@asynccontextmanager
async def running_stand_in() -> AsyncIterator[StandIn]:
    """A stand-in in this event loop, listening on a port bound before it starts."""
    stand_in = StandIn()
    config = uvicorn.Config(stand_in.app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1, ws="none")
    logging.getLogger("uvicorn.error").addFilter(_unfinished)
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    listener = socket.create_server(("127.0.0.1", 0))
    stand_in.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    await server.startup(sockets=[listener])
    try:
        yield stand_in
    finally:
        await stand_in.close()
        await _stop(server, listener)
