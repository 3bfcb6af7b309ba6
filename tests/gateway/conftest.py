"""One server for all tests of a module, and a conversation of its own for each test: a server costs 0.2 s to end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import httpx
import pytest

from magent2.testing import Service, running
from tests.gateway.names import now


@pytest.fixture(autouse=True)
def fresh_names() -> None:
    """A conversation and an agent nobody used before."""
    now.conversation = f"c-{uuid4().hex}"
    now.agent = f"a-{uuid4().hex}"


@pytest.fixture(scope="module")
async def service() -> AsyncIterator[Service]:
    """A gateway with the echo runner for `DevAgent`."""
    async with running() as service:
        yield service


@pytest.fixture(scope="module")
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """A client of it."""
    async with httpx.AsyncClient(base_url=service.base_url, timeout=10) as client:
        yield client
