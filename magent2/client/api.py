"""The HTTP contract from the caller's side: send a message, follow a conversation over broken connections.

Nothing else of magent2 is imported here but its errors, and httpx only when a client is opened.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit
from uuid import uuid4

from magent2.client.answers import (
    TRY_AGAIN,
    Payload,
    Refused,
    RequestFailed,
    SendFailed,
    Sent,
    StreamedEvent,
    StreamFailed,
    refusal,
)
from magent2.client.following import TERMINAL, Following

if TYPE_CHECKING:
    import httpx

__all__ = ["TERMINAL", "GatewayClient", "RequestFailed", "SendFailed", "Sent", "StreamFailed", "StreamedEvent"]

SEND_ATTEMPTS = 5
BACKOFF_S = 0.1
MAX_DELAY_S = 10.0


class GatewayClient:
    """A gateway at `base_url`. Open it with `async with`; it may be shared by tasks of one event loop.

    `send_timeout_s` bounds one `send` with all its retries. A stream silent for `idle_timeout_s` is taken for broken
    (the gateway pings every 20 s); `resume_for_s` is how long `follow` tries to get a broken one back.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None = None,
        connect_timeout_s: float = 5.0,
        send_timeout_s: float = 30.0,
        idle_timeout_s: float = 60.0,
        resume_for_s: float = 300.0,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.base_url = base_url
        self.connect_timeout_s = connect_timeout_s
        self.send_timeout_s = send_timeout_s
        self.idle_timeout_s = idle_timeout_s
        self.resume_for_s = resume_for_s
        self._jitter = jitter
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._opened: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Self:
        import httpx

        parts = urlsplit(self.base_url)
        loopback = parts.hostname in ("localhost", "127.0.0.1", "::1")
        self._opened = httpx.AsyncClient(
            base_url=self.base_url,
            headers=self._headers,
            timeout=httpx.Timeout(self.idle_timeout_s, connect=self.connect_timeout_s),
            limits=httpx.Limits(max_connections=None),
            verify=parts.scheme != "http",  # loading the certificates takes 100 ms, and redirects are not followed
            trust_env=not loopback,  # HTTP_PROXY without NO_PROXY would take localhost along
        )
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.http.aclose()

    @property
    def http(self) -> httpx.AsyncClient:
        if self._opened is None:
            raise RuntimeError("open the client with `async with`")
        return self._opened

    def backoff(self, failures: int, at_least_s: float = 0.0) -> float:
        """Seconds to wait after that many failures in a row, jittered upwards so that `at_least_s` is kept."""
        wait_s = max(at_least_s, min(BACKOFF_S * 2.0 ** min(failures - 1, 10), MAX_DELAY_S))
        return wait_s * (1 + self._jitter() / 2)

    async def send(
        self,
        *,
        conversation_id: str,
        recipient: str,
        sender: str,
        content: str | None,
        type: str = "message",
        metadata: Payload | None = None,
        id: str | None = None,
    ) -> Sent:
        """Return once the gateway has durably accepted the message.

        The id is chosen here, so a send whose answer was lost is repeated without running anything twice.
        Raises: SendFailed.
        """
        envelope = {
            "id": id or str(uuid4()),
            "conversation_id": conversation_id,
            "sender": sender,
            "recipient": recipient,
            "type": type,
            "content": content,
            "metadata": metadata or {},
        }
        body = json.dumps(envelope, ensure_ascii=False, separators=(",", ":")).encode()
        try:
            async with asyncio.timeout(self.send_timeout_s):
                return await self._send(body)
        except TimeoutError:
            within = f"no answer from {self.place} within {self.send_timeout_s:g} s"
            raise SendFailed(None, "timeout", f"{within}; whether it was accepted is unknown") from None

    async def _send(self, body: bytes) -> Sent:
        """Post until it is accepted: a few times over broken connections, up to the deadline while it is busy."""
        import httpx

        deadline = time.monotonic() + self.send_timeout_s
        broken = busy = 0
        while True:
            try:
                return await self._post(body)
            except httpx.RequestError as error:
                broken += 1
                if broken == SEND_ATTEMPTS:
                    raise SendFailed(None, "unreachable", self.unreachable(error)) from error
                delay_s = self.backoff(broken)
            except Refused as refused:
                busy += 1
                delay_s = self.backoff(busy, refused.retry_after_s)
                if refused.status not in TRY_AGAIN or time.monotonic() + delay_s > deadline:
                    raise SendFailed(refused.status, refused.code, str(refused)) from None
            await asyncio.sleep(delay_s)

    async def _post(self, body: bytes) -> Sent:
        response = await self.http.post("/send", content=body, headers={"Content-Type": "application/json"})
        if response.status_code != 200:
            raise refusal(response, response.content)
        try:
            answer = response.json()
            fields = (answer["message_id"], answer["conversation_id"], answer["cursor"])
            return Sent(*fields, duplicate=answer["duplicate"], topic=answer["topic"])
        except (ValueError, KeyError, TypeError):
            raise SendFailed(200, "not_a_gateway", f"{self.place} does not answer like a magent2 gateway") from None

    async def follow(
        self,
        conversation_id: str,
        *,
        after: str | None = None,
        until: str | None = None,
        max_events: int | None = None,
    ) -> AsyncGenerator[StreamedEvent, None]:
        """Yield every event after the cursor once and in order, resuming over broken connections.

        Ends after the terminal event for the message `until`, after `max_events`, or when the gateway ended the
        stream because of them; else never. Leave early through `contextlib.aclosing`.
        Raises: StreamFailed.
        """
        async with aclosing(Following(self, conversation_id, after, until, max_events).events()) as events:
            async for event in events:
                yield event

    @property
    def place(self) -> str:
        """Where the gateway is, without credentials."""
        parts = urlsplit(self.base_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    def unreachable(self, error: Exception) -> str:
        """What to tell about a connection that broke or never stood."""
        return f"cannot reach {self.place}: {str(error) or type(error).__name__}"
