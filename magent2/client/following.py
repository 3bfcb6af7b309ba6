"""One `GatewayClient.follow`: a conversation read over as many connections as it takes."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote

from magent2.client.answers import BUSY, TRY_AGAIN, Payload, Refused, StreamedEvent, StreamFailed, first_bytes, refusal
from magent2.client.seen import Seen
from magent2.client.sse import Frame, Parser

if TYPE_CHECKING:
    import httpx

TERMINAL = frozenset({"output", "error", "cancelled"})
FIRST_CONNECT_S = 3.0  # a wrong port should be told soon; only a stream that once stood is worth a long wait
MAX_RETRY_S = 10.0
AT_ONCE_S = 5.0  # a stream that ends sooner than this, and empty, was not closed for its age

log = logging.getLogger(__name__)


class Gateway(Protocol):
    """What following needs of `GatewayClient`."""

    send_timeout_s: float
    resume_for_s: float

    @property
    def http(self) -> httpx.AsyncClient: ...

    @property
    def place(self) -> str: ...

    def unreachable(self, error: Exception) -> str: ...

    def backoff(self, failures: int, at_least_s: float = 0.0) -> float: ...


class Following:
    """One `follow`: what was seen, and whether to stop, to resume or to give up."""

    def __init__(
        self, client: Gateway, conversation_id: str, after: str | None, until: str | None, max_events: int | None
    ) -> None:
        self.client = client
        self.path = f"/stream/{quote(conversation_id, safe='')}"
        self.after = after
        self.until = until
        self.left = max_events
        self.seen = Seen(after)
        self.over = self.left is not None and self.left <= 0
        self.last_terminal = False
        self.connected = False
        self.failures = 0
        self.empty_ends = 0
        self.retry_s = 0.0
        self.healthy_at = time.monotonic()

    async def events(self) -> AsyncGenerator[StreamedEvent, None]:
        import httpx

        while not self.over:
            try:
                async with aclosing(self._connection()) as connection:
                    async for event in connection:
                        yield event
            except httpx.RequestError as error:
                await self._pause(StreamFailed(None, "unreachable", self.client.unreachable(error)))
            except Refused as refused:
                failed = StreamFailed(refused.status, refused.code, str(refused))
                if refused.status not in TRY_AGAIN:
                    raise failed from None
                await self._pause(failed, refused.retry_after_s)
            else:
                if not self.over:
                    await self._pause(StreamFailed(200, "ended", "the gateway keeps ending the stream"))

    async def _connection(self) -> AsyncGenerator[StreamedEvent, None]:
        """What one connection brings that was not seen before."""
        headers = {"Accept": "text/event-stream", "Accept-Encoding": "identity", "Cache-Control": "no-store"}
        if self.seen.cursor is not None and self.seen.cursor != self.after:
            headers["Last-Event-ID"] = self.seen.cursor
        asked = {"after": self.after, "until": self.until, "max_events": self.left}
        query = {name: value for name, value in asked.items() if value is not None}
        async with self.client.http.stream("GET", self.path, params=query, headers=headers) as response:
            await self._check(response)
            self.connected = True
            opened_at = time.monotonic()
            count = 0
            async with aclosing(self._read(response, opened_at)) as events:
                async for event in events:
                    count += 1
                    yield event
            self._ended(empty=not count, lived_s=time.monotonic() - opened_at)

    async def _check(self, response: httpx.Response) -> None:
        if response.status_code != 200:
            raise refusal(response, await first_bytes(response))
        if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
            raise StreamFailed(200, "not_a_gateway", f"{self.client.place} does not answer like a magent2 gateway")

    async def _read(self, response: httpx.Response, opened_at: float) -> AsyncGenerator[StreamedEvent, None]:
        parser = Parser()
        async for chunk in response.aiter_bytes():
            self.healthy_at = time.monotonic()
            if self.healthy_at - opened_at > AT_ONCE_S:
                self.failures = 0
            for frame in parser.feed(chunk):
                self.failures = 0
                event = _event(frame)
                if not self._is_new(event, frame.data):
                    continue
                self._count(event.data)
                yield event
                if self.over:
                    return
            if parser.retry_ms is not None:
                self.retry_s = min(parser.retry_ms / 1000, MAX_RETRY_S)

    def _is_new(self, event: StreamedEvent, raw: str) -> bool:
        if event.data.get("event") == "gap":
            return self.seen.admit_gap(event.data.get("missing_before"))
        return self.seen.admit(event.cursor, raw)

    def _count(self, data: Payload) -> None:
        """Set `over` when this event is the last one asked for."""
        if self.left is not None:
            self.left -= 1
        self.last_terminal = data.get("event") in TERMINAL
        answered = self.last_terminal and self.until is not None and data.get("message_id") == self.until
        self.over = answered or self.left == 0

    def _ended(self, *, empty: bool, lived_s: float) -> None:
        """Judge a clean end: because of `until`, or because the gateway restarts?

        With `until=done` the message is the gateway's choice: an end right after a terminal event is the one asked
        for. An event that lies behind the cursor already ends a stream empty and at once: twice in a row is no chance.
        """
        if self.until is None or self.over:
            return
        self.empty_ends = self.empty_ends + 1 if empty and lived_s < AT_ONCE_S else 0
        self.over = self.empty_ends == 2 or (self.until == "done" and self.last_terminal and not empty)

    async def _pause(self, failed: StreamFailed, retry_after_s: float = 0.0) -> None:
        """Wait before the next connection, or raise `failed` when it has been broken for too long."""
        self.failures += 1
        delay_s = self.client.backoff(self.failures, max(self.retry_s, retry_after_s))
        patience_s = self.client.resume_for_s if self.connected else FIRST_CONNECT_S
        if not self.connected and failed.status in BUSY:
            patience_s = self.client.send_timeout_s
        if time.monotonic() + delay_s > self.healthy_at + patience_s:
            raise failed
        log.info("stream broken (%s), resuming after %s in %.1f s", failed, self.seen.cursor, delay_s)
        await asyncio.sleep(delay_s)


def _event(frame: Frame) -> StreamedEvent:
    try:
        data = json.loads(frame.data)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise StreamFailed(200, "not_an_event", "the stream carries something that is not an event")
    return StreamedEvent(frame.id, data)
