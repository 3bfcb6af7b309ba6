"""What a gateway answers, and how it fails, as the client's callers see it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from magent2.errors import Magent2Error

if TYPE_CHECKING:
    import httpx

Payload = dict[str, Any]

BUSY = frozenset({429, 503})
TRY_AGAIN = BUSY | {502, 504}  # the last two are a proxy's, while the gateway behind it restarts
MAX_ERROR_BYTES = 65_536


class RequestFailed(Magent2Error):
    """The gateway cannot be reached, or refused. `status` is None when there was no answer."""

    def __init__(self, status: int | None, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class SendFailed(RequestFailed):
    """The message was not accepted, or whether it was is unknown: sending again with its id is safe."""


class StreamFailed(RequestFailed):
    """The stream cannot be opened, or not be resumed."""


class Refused(Exception):
    """An answer that is not the one asked for."""

    def __init__(self, status: int, code: str, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Sent:
    """What was accepted. `cursor` is the place in the log just before the message."""

    message_id: str
    conversation_id: str
    cursor: str
    duplicate: bool
    topic: str


@dataclass(frozen=True, slots=True)
class StreamedEvent:
    """One event of a conversation. `cursor` is None for a `gap`, which is not in the log."""

    cursor: str | None
    data: Payload


async def first_bytes(response: httpx.Response) -> bytes:
    """The first bytes of an answer that may have no end."""
    head = b""
    async for chunk in response.aiter_bytes():
        head += chunk
        if len(head) > MAX_ERROR_BYTES:
            break
    return head


def refusal(response: httpx.Response, body: bytes) -> Refused:
    status = response.status_code
    try:
        error = json.loads(body)["error"]
        code, message = str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        code, message = f"http_{status}", f"the gateway answered {status} {response.reason_phrase}".rstrip()
    return Refused(status, code, message, _retry_after_s(response.headers.get("Retry-After", "")))


def _retry_after_s(value: str) -> float:
    """Seconds of a Retry-After header; a date is a proxy's, and the usual backoff serves it too."""
    return float(value) if value.isascii() and value.isdigit() else 0.0
