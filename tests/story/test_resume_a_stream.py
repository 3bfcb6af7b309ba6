"""Resuming: every event has a cursor, and whoever comes back with the last one misses nothing and sees none twice."""

from __future__ import annotations

import asyncio

import pytest

from magent2.client.api import GatewayClient
from magent2.runner.interface import Turn
from magent2.testing import ScriptedRunner, running

pytestmark = pytest.mark.anyio


async def count_to_five(turn: Turn) -> str:
    for number in range(1, 6):
        turn.sink.token(f"{number} ", turn=0)
        await turn.sink.flush()
    return "1 2 3 4 5 "


async def test_a_reader_that_comes_back_goes_on_where_it_was() -> None:
    async with running(ScriptedRunner(count_to_five)) as service, GatewayClient(service.base_url) as client:
        sent = await client.send(conversation_id="c1", recipient="agent:DevAgent", sender="user:ada", content="count")
        async with asyncio.timeout(5):
            first = [event async for event in client.follow("c1", max_events=3)]
            rest = [event async for event in client.follow("c1", after=first[-1].cursor, until=sent.message_id)]
            whole = [event async for event in client.follow("c1", until=sent.message_id)]

    assert [*first, *rest] == whole
    assert "".join(event.data["text"] for event in whole if event.data["event"] == "token") == "1 2 3 4 5 "


async def test_a_late_reader_sees_all_of_it_or_only_what_follows_a_message() -> None:
    async with running(ScriptedRunner(count_to_five)) as service, GatewayClient(service.base_url) as client:
        async with asyncio.timeout(5):
            for question in ("one", "two"):
                sent = await client.send(
                    conversation_id="c1", recipient="agent:DevAgent", sender="user:ada", content=question
                )
                answer = [event async for event in client.follow("c1", after=sent.cursor, until=sent.message_id)]
            whole = [event async for event in client.follow("c1", until=sent.message_id)]

    assert answer[0].data["text"] == "two"
    assert whole[0].data["text"] == "one"
    assert whole[-len(answer) :] == answer
