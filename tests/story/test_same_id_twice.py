"""Sending twice: the sender chooses a message's id, so a send whose answer was lost is simply repeated."""

from __future__ import annotations

import asyncio

import pytest

from magent2.client.api import GatewayClient, SendFailed, Sent
from magent2.runner.interface import Turn
from magent2.testing import ScriptedRunner, running

pytestmark = pytest.mark.anyio


async def thank(turn: Turn) -> str:
    return "thank you"


async def send(client: GatewayClient, content: str, id: str) -> Sent:
    return await client.send(
        conversation_id="c1", recipient="agent:DevAgent", sender="user:ada", content=content, id=id
    )


@pytest.mark.promise("M7")
async def test_the_same_message_twice_is_run_once() -> None:
    runner = ScriptedRunner(thank)
    async with running(runner) as service, GatewayClient(service.base_url) as client:
        first = await send(client, "pay 10", id="order-1")
        again = await send(client, "pay 10", id="order-1")
        await send(client, "that is all", id="order-2")
        async with asyncio.timeout(5):
            events = [event.data async for event in client.follow("c1", until="order-2")]

    assert (first.duplicate, again.duplicate) == (False, True)
    assert again.cursor == first.cursor
    assert [turn.envelope.content for turn in runner.turns] == ["pay 10", "that is all"]
    assert [event["message_id"] for event in events if event["event"] == "output"] == ["order-1", "order-2"]


@pytest.mark.promise("M7")
async def test_another_message_with_a_known_id_is_refused() -> None:
    async with running(ScriptedRunner(thank)) as service, GatewayClient(service.base_url) as client:
        await send(client, "pay 10", id="order-1")
        with pytest.raises(SendFailed) as refused:
            await send(client, "pay 1000", id="order-1")

    assert (refused.value.status, refused.value.code) == (409, "id_conflict")
