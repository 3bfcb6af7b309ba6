"""A worker goes away in the middle of an answer: another one takes the message, and the stream says so."""

from __future__ import annotations

import asyncio

import pytest

from magent2.bus.memory import MemoryBus
from magent2.client.api import GatewayClient
from magent2.runner.interface import Turn
from magent2.store.memory import MemoryStore
from magent2.testing import ScriptedRunner, running

pytestmark = pytest.mark.anyio


async def test_another_worker_answers_what_the_first_one_began() -> None:
    bus, store = MemoryBus(), MemoryStore()
    cut_off = asyncio.Event()

    async def never_ends(turn: Turn) -> str:
        turn.sink.token("The answer is", turn=0)
        await turn.sink.flush()
        cut_off.set()
        await asyncio.Event().wait()
        raise NotImplementedError

    async def answers(turn: Turn) -> str:
        turn.sink.token("The answer is 42", turn=0)
        return "The answer is 42"

    async with asyncio.timeout(10):
        async with running(ScriptedRunner(never_ends), bus=bus, store=store) as service:
            async with GatewayClient(service.base_url) as client:
                sent = await client.send(
                    conversation_id="c1", recipient="agent:DevAgent", sender="user:ada", content="what is it?"
                )
            await cut_off.wait()

        second = running(ScriptedRunner(answers), bus=bus, store=store)
        async with second as service, GatewayClient(service.base_url) as client:
            events = [event.data async for event in client.follow("c1", until=sent.message_id)]

    assert [event["event"] for event in events] == [
        "user_message",
        "run_started",
        "token",
        "run_started",  # with a higher attempt: forget the tokens before
        "token",
        "output",
    ]
    before, after = (event for event in events if event["event"] == "run_started")
    assert (before["attempt"], after["attempt"], after["resumed_turn"]) == (1, 2, 0)
    assert before["run_id"] == after["run_id"]
    assert events[-1]["text"] == "The answer is 42"
