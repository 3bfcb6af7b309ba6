"""Waiting for a state instead of sleeping for luck."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable


async def wait_until(
    predicate: Callable[[], bool | Awaitable[bool]], *, timeout_s: float = 10.0, description: str = ""
) -> None:
    """Return when the predicate holds, looking every few milliseconds; fail with the description after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = predicate()
        if await seen if isinstance(seen, Awaitable) else seen:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {description or predicate}")
        await asyncio.sleep(0.005)
