"""Memory: an agent is given the conversation so far with every message, and answers its messages one after another."""

from __future__ import annotations

import asyncio

import pytest

from magent2.client.api import GatewayClient
from magent2.runner.interface import Turn
from magent2.testing import ScriptedRunner, running

pytestmark = pytest.mark.anyio


async def remember(turn: Turn) -> str:
    said = [item["content"] for item in turn.history if item["role"] == "user"]
    return f"before this you said {said}"


async def ask(client: GatewayClient, conversation_id: str, content: str) -> str:
    sent = await client.send(
        conversation_id=conversation_id, recipient="agent:DevAgent", sender="user:ada", content=content
    )
    async with asyncio.timeout(5):
        events = [event.data async for event in client.follow(conversation_id, until=sent.message_id)]
    return str(events[-1]["text"])


@pytest.mark.promise("run.history")
async def test_the_second_message_sees_the_first_and_its_answer() -> None:
    runner = ScriptedRunner(remember)
    async with running(runner) as service, GatewayClient(service.base_url) as client:
        await ask(client, "c1", "my name is Ada")
        answer = await ask(client, "c1", "what is my name?")

    assert answer == "before this you said ['my name is Ada']"
    assert runner.turns[1].history == [
        {"role": "user", "content": "my name is Ada"},
        {"role": "assistant", "content": "before this you said []"},
    ]


@pytest.mark.promise("run.history")
async def test_another_conversation_knows_nothing_of_it() -> None:
    async with running(ScriptedRunner(remember)) as service, GatewayClient(service.base_url) as client:
        await ask(client, "c1", "my name is Ada")
        answer = await ask(client, "c2", "what is my name?")

    assert answer == "before this you said []"
