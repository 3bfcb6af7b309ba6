"""A model server of our own: small, scripted, and on a real socket.

It speaks both wires the agents SDK knows (`POST /v1/responses` and `POST /v1/chat/completions`), streams in small
pieces, and fails in every way a real one does. What it answers is decided by a *script*, a plain function:

    async with running_stub(lambda request: Reply("hello")) as stub:
        ...point a client at stub.base_url, then look at stub.requests...

Without a script it obeys commands in the last user message, so that other processes can be tested as well
(`python -m tests.support.stub_model --port 9000`):

    count 3                      t0 t1 t2
    slow 20 50                   20 tokens, 50 ms before each
    call add {"a": 1}            one tool call, then `done: <its output>`
    calls a {..} ; b {..}        several calls in one turn, then `done: <output> | <output>`
    chain a {..} ; b {..}        one call a turn, in order
    recall                       all earlier user messages, joined by `|`
    think TEXT                   reasoning first, then `thought: TEXT`
    fail 429 [RETRY_AFTER]       that HTTP status
    flaky 2 500                  that status twice for one and the same request, then `recovered`
    cut 3 | incomplete | failed  the connection drops after 3 pieces | out of tokens | the provider gives up
    refuse TEXT | hang           a refusal | no answer at all
    anything else                echo: <the message>
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import re
import socket
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

Json = dict[str, Any]
Wire = Literal["responses", "chat"]
CREATED = 1_700_000_000
POLL_S = 0.01


# ---------------------------------------------------------------- what a script says


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:12]}"


@dataclass(frozen=True)
class ToolCall:
    """One tool call of the model. `arguments` is the raw text, so that it may be broken JSON."""

    name: str
    arguments: str = "{}"
    call_id: str = field(default_factory=_call_id)


@dataclass(frozen=True)
class Reply:
    """One answer of the model, and how it goes wrong. A *piece* is one delta of reasoning, text or arguments."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    refusal: str = ""
    usage: tuple[int, int] | None = None
    """Tokens in and out; words in and pieces out when not given."""

    chunk_chars: int | None = None
    """Length of a piece; a word when not given."""

    chunk_delay_s: float = 0.0
    """A pause before each piece."""

    gate: asyncio.Event | None = None
    """Waited for once `gate_after` pieces are out; the connection stays open."""

    gate_after: int = 0
    cut_after: int | None = None
    """Drop the connection once that many pieces are out."""

    status: int = 200
    """Any other status is sent at once, with `error` as its message."""

    error: str = "scripted failure"
    headers: tuple[tuple[str, str], ...] = ()
    failed: bool = False
    """End with the provider's own failure event (`response.failed`, or an error chunk) instead of an answer."""

    incomplete: bool = False
    """End as if the model had run out of tokens."""

    bad_json: bool = False
    """Put a line that is no JSON in front of the end."""

    hang: bool = False
    """Accept the request and never answer."""


@dataclass(frozen=True)
class Entry:
    """One step of the conversation, the same for both wires."""

    kind: Literal["message", "call", "output"]
    role: str = ""
    text: str = ""
    call: ToolCall | None = None


@dataclass(frozen=True)
class StubRequest:
    """A request as a script sees it: the same view of both wires."""

    wire: Wire
    body: Json
    seen: int = 0
    """How often exactly this body was asked before: a client's own retries, for the most part."""

    @property
    def model(self) -> str:
        return str(self.body.get("model", ""))

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        read = _responses_entries if self.wire == "responses" else _chat_entries
        return tuple(read(self.body))

    @property
    def messages(self) -> list[tuple[str, str]]:
        return [(entry.role, entry.text) for entry in self.entries if entry.kind == "message"]

    @property
    def user_texts(self) -> list[str]:
        return [text for role, text in self.messages if role == "user"]

    @property
    def last_user(self) -> str:
        return self.user_texts[-1] if self.user_texts else ""

    @property
    def tool_outputs(self) -> dict[str, str]:
        return {entry.call.call_id: entry.text for entry in self.entries if entry.kind == "output" and entry.call}

    @property
    def since_user(self) -> tuple[Entry, ...]:
        """What has happened since the last user message."""
        last = max((i for i, entry in enumerate(self.entries) if entry.role == "user"), default=-1)
        return self.entries[last + 1 :]

    @property
    def outputs_since_user(self) -> list[str]:
        return [entry.text for entry in self.since_user if entry.kind == "output"]

    @property
    def turn(self) -> int:
        """Turns the model has had since the last user message: runs of its items between tool outputs."""
        from_model = [entry.kind == "call" or entry.role == "assistant" for entry in self.since_user]
        return sum(mine and not before for before, mine in itertools.pairwise([False, *from_model]))

    @property
    def tools(self) -> list[str]:
        return [(tool.get("function") or tool).get("name", tool["type"]) for tool in self.body.get("tools") or []]


Script = Callable[[StubRequest], Reply]


def in_order(*replies: Reply) -> Script:
    """A script that gives these replies one after another, whoever asks."""
    left = iter(replies)
    return lambda _request: next(left, Reply(status=500, error="the script has no reply left"))


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return "" if content is None else str(content)


def _responses_entries(body: Json) -> Iterator[Entry]:
    if body.get("instructions"):
        yield Entry("message", "system", body["instructions"])
    given = body.get("input") or []
    for item in [{"role": "user", "content": given}] if isinstance(given, str) else given:
        match item.get("type", "message"):
            case "message":
                yield Entry("message", item["role"], _text_of(item["content"]))
            case "function_call":
                yield Entry("call", call=ToolCall(item["name"], item["arguments"], item["call_id"]))
            case "function_call_output":
                yield Entry("output", text=_text_of(item["output"]), call=ToolCall("", "", item["call_id"]))


def _chat_entries(body: Json) -> Iterator[Entry]:
    for message in body.get("messages") or []:
        text = _text_of(message.get("content"))
        if message["role"] == "tool":
            yield Entry("output", text=text, call=ToolCall("", "", message["tool_call_id"]))
            continue
        if text or not message.get("tool_calls"):
            yield Entry("message", message["role"], text)
        for call in message.get("tool_calls") or []:
            function = call["function"]
            yield Entry("call", call=ToolCall(function["name"], function["arguments"], call["id"]))


# ---------------------------------------------------------------- the script without a script

_COMMAND = re.compile(r"^\s*(\w+)\b\s*(.*)$", re.DOTALL)


def obey(request: StubRequest) -> Reply:
    """Answer as the last user message commands (the list is at the top of this file), else echo it."""
    found = _COMMAND.match(request.last_user)
    command = _COMMANDS.get(found[1]) if found else None
    reply = command(request, found[2]) if found and command else None
    return reply or Reply(f"echo: {request.last_user}")


def _numbers(text: str, least: int) -> list[int] | None:
    words = text.split()
    return [int(word) for word in words] if len(words) >= least and all(w.isdigit() for w in words) else None


def _tokens(count: int) -> str:
    return " ".join(f"t{i}" for i in range(count))


def _count(_request: StubRequest, text: str) -> Reply | None:
    numbers = _numbers(text, 1)
    return Reply(_tokens(numbers[0])) if numbers else None


def _slow(_request: StubRequest, text: str) -> Reply | None:
    numbers = _numbers(text, 2)
    return Reply(_tokens(numbers[0]), chunk_delay_s=numbers[1] / 1000) if numbers else None


def _parse_calls(text: str) -> tuple[ToolCall, ...]:
    parts = [part.strip().partition(" ") for part in re.split(r"\s;\s", text) if part.strip()]
    return tuple(ToolCall(name, arguments.strip() or "{}") for name, _, arguments in parts)


def _done(request: StubRequest) -> Reply:
    return Reply(f"done: {' | '.join(request.outputs_since_user)}")


def _call(request: StubRequest, text: str) -> Reply | None:
    name, _, arguments = text.partition(" ")
    return _done(request) if request.turn else Reply(calls=(ToolCall(name, arguments.strip() or "{}"),))


def _calls(request: StubRequest, text: str) -> Reply | None:
    return _done(request) if request.turn else Reply(calls=_parse_calls(text))


def _chain(request: StubRequest, text: str) -> Reply | None:
    next_call = _parse_calls(text)[len(request.outputs_since_user) :][:1]
    return Reply(calls=next_call) if next_call else _done(request)


def _recall(request: StubRequest, _text: str) -> Reply | None:
    return Reply("|".join(request.user_texts[:-1]))


def _think(_request: StubRequest, text: str) -> Reply | None:
    return Reply(f"thought: {text}", reasoning=text)


def _fail(_request: StubRequest, text: str) -> Reply | None:
    numbers = _numbers(text, 1)
    if not numbers:
        return None
    return Reply(status=numbers[0], headers=tuple(("retry-after", str(after)) for after in numbers[1:2]))


def _flaky(request: StubRequest, text: str) -> Reply | None:
    numbers = _numbers(text, 2)
    if not numbers:
        return None
    return Reply(status=numbers[1]) if request.seen < numbers[0] else Reply("recovered")


def _cut(_request: StubRequest, text: str) -> Reply | None:
    numbers = _numbers(text, 1)
    return Reply(_tokens(numbers[0] + 1), cut_after=numbers[0]) if numbers else None


def _refuse(_request: StubRequest, text: str) -> Reply | None:
    return Reply(refusal=text or "I will not.")


_COMMANDS: dict[str, Callable[[StubRequest, str], Reply | None]] = {
    "count": _count,
    "slow": _slow,
    "call": _call,
    "calls": _calls,
    "chain": _chain,
    "recall": _recall,
    "think": _think,
    "fail": _fail,
    "flaky": _flaky,
    "cut": _cut,
    "refuse": _refuse,
    "incomplete": lambda _request, _text: Reply("this is not the", incomplete=True),
    "failed": lambda _request, _text: Reply("it was", failed=True),
    "hang": lambda _request, _text: Reply(hang=True),
}


# ---------------------------------------------------------------- the two wires


@dataclass(frozen=True)
class Frame:
    """One server-sent event; a `piece` is one that carries a delta."""

    data: str
    piece: bool = False


BAD_FRAME = Frame("data: {not json\n\n")


def _pieces(text: str, chunk_chars: int | None) -> list[str]:
    if chunk_chars is None:
        return re.findall(r"\s*\S+|\s+", text)
    return [text[i : i + chunk_chars] for i in range(0, len(text), chunk_chars)]


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex[:12]}"


class _Answer:
    """What both wires need: the request, the reply, and the usage."""

    def __init__(self, request: StubRequest, reply: Reply) -> None:
        self.request, self.reply = request, reply

    def pieces(self, text: str) -> list[str]:
        return _pieces(text, self.reply.chunk_chars)

    @property
    def tokens(self) -> tuple[int, int]:
        said = [self.reply.reasoning, self.reply.text, self.reply.refusal, *(c.arguments for c in self.reply.calls)]
        heard = sum(len(entry.text.split()) for entry in self.request.entries)
        return self.reply.usage or (heard, sum(len(self.pieces(text)) for text in said))

    def frames(self) -> Iterator[Frame]:
        raise NotImplementedError

    def whole(self) -> Json:
        """The answer to a request that did not ask for a stream."""
        raise NotImplementedError


class ResponsesAnswer(_Answer):
    """The Responses wire: named events, one output item after another."""

    def __init__(self, request: StubRequest, reply: Reply) -> None:
        super().__init__(request, reply)
        self.id = _new_id("resp")
        self.output: list[Json] = []
        self.sequence = itertools.count()

    def whole(self) -> Json:
        for _ in self._items():
            pass
        return self._response("incomplete" if self.reply.incomplete else "completed")

    def frames(self) -> Iterator[Frame]:
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        yield from self._items()
        if self.reply.bad_json:
            yield BAD_FRAME
        status = "failed" if self.reply.failed else "incomplete" if self.reply.incomplete else "completed"
        yield self._event(f"response.{status}", response=self._response(status))

    def _items(self) -> Iterator[Frame]:
        if self.reply.reasoning:
            yield from self._reasoning(self.reply.reasoning)
        if self.reply.text or self.reply.refusal or not self.reply.calls:
            yield from self._message()
        for call in self.reply.calls:
            yield from self._call(call)

    def _event(self, kind: str, *, piece: bool = False, **fields: Any) -> Frame:
        body = {"type": kind, "sequence_number": next(self.sequence), **fields}
        return Frame(f"event: {kind}\ndata: {json.dumps(body)}\n\n", piece)

    def _response(self, status: str) -> Json:
        return {
            "id": self.id,
            "object": "response",
            "created_at": CREATED,
            "status": status,
            "model": self.request.model,
            "output": list(self.output),
            "error": {"code": "server_error", "message": self.reply.error} if status == "failed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "top_p": 1.0,
            "tool_choice": "auto",
            "tools": [],
            "usage": None if status in ("in_progress", "failed") else self._usage(),
        }

    def _usage(self) -> Json:
        tokens_in, tokens_out = self.tokens
        return {
            "input_tokens": tokens_in,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": tokens_out,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": tokens_in + tokens_out,
        }

    def _added(self, item: Json) -> Frame:
        return self._event("response.output_item.added", output_index=len(self.output), item=item)

    def _done(self, item: Json) -> Frame:
        index = len(self.output)
        self.output.append(item)
        return self._event("response.output_item.done", output_index=index, item=item)

    def _reasoning(self, text: str) -> Iterator[Frame]:
        item: Json = {"id": _new_id("rs"), "type": "reasoning", "summary": []}
        at = {"item_id": item["id"], "output_index": len(self.output), "summary_index": 0}
        kind = "response.reasoning_summary"
        yield self._added(item)
        yield self._event(f"{kind}_part.added", **at, part={"type": "summary_text", "text": ""})
        for piece in self.pieces(text):
            yield self._event(f"{kind}_text.delta", piece=True, **at, delta=piece)
        part = {"type": "summary_text", "text": text}
        yield self._event(f"{kind}_text.done", **at, text=text)
        yield self._event(f"{kind}_part.done", **at, part=part)
        yield self._done({**item, "summary": [part]})

    def _message(self) -> Iterator[Frame]:
        item: Json = {"id": _new_id("msg"), "type": "message", "role": "assistant"}
        at = {"item_id": item["id"], "output_index": len(self.output), "content_index": 0}
        text, kind, part, extra = self._content()
        name = "text" if kind == "output_text" else "refusal"
        whole: Json = {name: text}
        yield self._added({**item, "status": "in_progress", "content": []})
        yield self._event("response.content_part.added", **at, part={**part, name: ""})
        for piece in self.pieces(text):
            yield self._event(f"response.{kind}.delta", piece=True, **at, **extra, delta=piece)
        yield self._event(f"response.{kind}.done", **at, **extra, **whole)
        yield self._event("response.content_part.done", **at, part=part)
        status = "incomplete" if self.reply.incomplete else "completed"
        yield self._done({**item, "status": status, "content": [part]})

    def _content(self) -> tuple[str, str, Json, Json]:
        """The text, its kind, the content part, and what its events carry besides."""
        if self.reply.refusal:
            return self.reply.refusal, "refusal", {"type": "refusal", "refusal": self.reply.refusal}, {}
        part = {"type": "output_text", "text": self.reply.text, "annotations": [], "logprobs": []}
        return self.reply.text, "output_text", part, {"logprobs": []}

    def _call(self, call: ToolCall) -> Iterator[Frame]:
        item: Json = {"id": _new_id("fc"), "type": "function_call", "call_id": call.call_id, "name": call.name}
        at = {"item_id": item["id"], "output_index": len(self.output)}
        kind = "response.function_call_arguments"
        yield self._added({**item, "arguments": "", "status": "in_progress"})
        for piece in self.pieces(call.arguments):
            yield self._event(f"{kind}.delta", piece=True, **at, delta=piece)
        yield self._event(f"{kind}.done", **at, name=call.name, arguments=call.arguments)
        yield self._done({**item, "arguments": call.arguments, "status": "completed"})


class ChatAnswer(_Answer):
    """The Chat Completions wire: nameless chunks with a growing delta, and `[DONE]`."""

    def __init__(self, request: StubRequest, reply: Reply) -> None:
        super().__init__(request, reply)
        self.id = _new_id("chatcmpl")

    @property
    def _finish(self) -> str:
        return "length" if self.reply.incomplete else "tool_calls" if self.reply.calls else "stop"

    def frames(self) -> Iterator[Frame]:
        yield self._chunk({"role": "assistant", "content": ""})
        for name in ("reasoning", "text", "refusal"):
            key = {"reasoning": "reasoning_content", "text": "content"}.get(name, name)
            for piece in self.pieces(getattr(self.reply, name)):
                yield self._chunk({key: piece}, piece=True)
        for index, call in enumerate(self.reply.calls):
            yield from self._call(index, call)
        if self.reply.bad_json:
            yield BAD_FRAME
        if self.reply.failed:
            yield self._frame({"error": {"message": self.reply.error, "type": "server_error", "code": "server_error"}})
            return
        yield self._chunk({}, finish=self._finish)
        if (self.request.body.get("stream_options") or {}).get("include_usage"):
            yield self._frame({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()})
        yield Frame("data: [DONE]\n\n")

    def whole(self) -> Json:
        calls = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.reply.calls
        ]
        message: Json = {"role": "assistant", "content": self.reply.text or None}
        message |= {"refusal": self.reply.refusal} if self.reply.refusal else {}
        message |= {"reasoning_content": self.reply.reasoning} if self.reply.reasoning else {}
        message |= {"tool_calls": calls} if calls else {}
        choice = {"index": 0, "message": message, "finish_reason": self._finish}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage()}

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": CREATED, "model": self.request.model}

    def _frame(self, body: Json, *, piece: bool = False) -> Frame:
        return Frame(f"data: {json.dumps(body)}\n\n", piece)

    def _chunk(self, delta: Json, *, finish: str | None = None, piece: bool = False) -> Frame:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return self._frame({**self._head("chat.completion.chunk"), "choices": [choice]}, piece=piece)

    def _call(self, index: int, call: ToolCall) -> Iterator[Frame]:
        function = {"name": call.name, "arguments": ""}
        first = {"index": index, "id": call.call_id, "type": "function", "function": function}
        yield self._chunk({"tool_calls": [first]})
        for piece in self.pieces(call.arguments):
            yield self._chunk({"tool_calls": [{"index": index, "function": {"arguments": piece}}]}, piece=True)

    def _usage(self) -> Json:
        tokens_in, tokens_out = self.tokens
        return {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}


# ---------------------------------------------------------------- the server


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


def _unfinished(record: logging.LogRecord) -> bool:
    """Keep the server from complaining about connections that are dropped on purpose."""
    return "without completing response" not in record.getMessage()


class StubModel:
    """The server's state: its script, every request so far, and how many streams the client hung up on."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or obey
        self.requests: list[Json] = []
        """`{"wire": "responses" | "chat", "headers": {...}, "body": {...}}`, in order of arrival."""

        self.hung_up = 0
        self.closing = False
        self.base_url = ""
        self.app = Starlette(
            routes=[
                Route("/v1/responses", self._responses, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/models", self._models),
            ]
        )

    @property
    def bodies(self) -> list[Json]:
        return [request["body"] for request in self.requests]

    async def wait_for_requests(self, count: int, within_s: float = 5.0) -> None:
        """Return once that many requests have arrived."""
        async with asyncio.timeout(within_s):
            while len(self.requests) < count:
                await asyncio.sleep(POLL_S / 2)

    async def _models(self, _request: Request) -> Response:
        model = {"id": "stub", "object": "model", "created": CREATED, "owned_by": "tests"}
        return JSONResponse({"object": "list", "data": [model]})

    async def _responses(self, request: Request) -> Response:
        asked = await self._record("responses", request)
        return await self._answer(request, ResponsesAnswer(asked, self.script(asked)))

    async def _chat(self, request: Request) -> Response:
        asked = await self._record("chat", request)
        return await self._answer(request, ChatAnswer(asked, self.script(asked)))

    async def _record(self, wire: Wire, request: Request) -> StubRequest:
        body = await request.json()
        seen = sum(earlier == body for earlier in self.bodies)
        self.requests.append({"wire": wire, "headers": dict(request.headers), "body": body})
        return StubRequest(wire, body, seen)

    async def _answer(self, request: Request, answer: ResponsesAnswer | ChatAnswer) -> Response:
        reply = answer.reply
        if reply.hang:
            await self._until(lambda: False, request)
        if reply.status != 200 or reply.hang:
            error = {"message": reply.error, "type": "stub_error", "param": None, "code": None}
            return JSONResponse({"error": error}, reply.status, dict(reply.headers))
        if not answer.request.body.get("stream"):
            return JSONResponse(answer.whole())
        return _Stream(self._play(answer.frames(), reply), headers=dict(reply.headers))

    async def _play(self, frames: Iterable[Frame], reply: Reply) -> AsyncIterator[str]:
        """Send the frames, at the reply's pace and only as far as it wants."""
        sent = 0
        try:
            for frame in frames:
                if sent == reply.cut_after or self.closing:
                    raise _CutError
                if reply.gate and sent >= reply.gate_after:
                    await self._until(reply.gate.is_set)
                if frame.piece:
                    await asyncio.sleep(reply.chunk_delay_s)
                    sent += 1
                yield frame.data
        except asyncio.CancelledError:
            self.hung_up += 1
            raise

    async def _until(self, ready: Callable[[], bool], request: Request | None = None) -> None:
        while not (ready() or self.closing or (request and await request.is_disconnected())):
            await asyncio.sleep(POLL_S)


def _server(stub: StubModel) -> uvicorn.Server:
    config = uvicorn.Config(stub.app, log_level="warning", lifespan="off", timeout_graceful_shutdown=2, ws="none")
    logging.getLogger("uvicorn.error").addFilter(_unfinished)
    return uvicorn.Server(config)


def _listen(stub: StubModel, port: int) -> socket.socket:
    """Bind first and start later: nobody else gets the port in between, and early clients wait in the backlog."""
    listener = socket.create_server(("127.0.0.1", port))
    stub.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    return listener


@asynccontextmanager
async def running_stub(script: Script | None = None, port: int = 0) -> AsyncIterator[StubModel]:
    """Run a stub model in this event loop; `stub.base_url` is where it listens. No signal handlers are touched."""
    stub = StubModel(script)
    server = _server(stub)
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    listener = _listen(stub, port)
    await server.startup(sockets=[listener])
    try:
        yield stub
    finally:
        stub.closing = True
        await server.shutdown(sockets=[listener])


def main() -> None:
    """Run a stub model as a process of its own; its address is the first line it prints."""
    parser = argparse.ArgumentParser(description="A scripted model server for tests.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    stub = StubModel()
    listener = _listen(stub, parser.parse_args().port)
    sys.stdout.write(f"{stub.base_url}\n")
    sys.stdout.flush()
    _server(stub).run(sockets=[listener])


if __name__ == "__main__":
    main()
