"""One message: it is sent to an agent, the agent answers, and everybody who follows the conversation sees it happen."""

from __future__ import annotations

import asyncio

import pytest

from magent2.client.api import GatewayClient
from magent2.runner.interface import Turn
from magent2.testing import ScriptedRunner, running

pytestmark = pytest.mark.anyio


async def test_a_message_is_answered_and_its_answer_streamed() -> None:
    async def greet(turn: Turn) -> str:
        for token in ("Hello", ", ", "Ada"):
            turn.sink.token(token, turn=0)
            await turn.sink.flush()  # else tokens that are said at once may leave as one event
        return "Hello, Ada"

    async with running(ScriptedRunner(greet)) as service, GatewayClient(service.base_url) as client:
        sent = await client.send(
            conversation_id="c1", recipient="agent:DevAgent", sender="user:ada", content="It is me, Ada"
        )
        async with asyncio.timeout(5):
            events = [event.data async for event in client.follow("c1", until=sent.message_id)]

    message, started, *tokens, output = events
    assert (message["event"], message["sender"], message["text"]) == ("user_message", "user:ada", "It is me, Ada")
    assert (started["event"], started["attempt"], started["agent"]) == ("run_started", 1, "DevAgent")
    assert [(token["event"], token["index"], token["text"]) for token in tokens] == [
        ("token", 0, "Hello"),
        ("token", 1, ", "),
        ("token", 2, "Ada"),
    ]
    assert (output["event"], output["text"], output["message_id"]) == ("output", "Hello, Ada", sent.message_id)


async def test_without_a_model_the_message_comes_back() -> None:
    async with running() as service, GatewayClient(service.base_url) as client:
        sent = await client.send(
            conversation_id="c1", recipient="agent:DevAgent", sender="user:ada", content="one two three"
        )
        async with asyncio.timeout(5):
            events = [event.data async for event in client.follow("c1", until=sent.message_id)]

    assert events[-1]["event"] == "output"
    assert events[-1]["text"] == "one two three"
