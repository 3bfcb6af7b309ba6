"""Two gateways and three workers on one Valkey: many conversations at once, and readers that are cut off."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest

from magent2.client.api import GatewayClient, StreamedEvent
from magent2.client.sse import Frame, Parser
from tests.conftest import BINARIES, REDIS_NAMES
from tests.support.processes import of_kind, starting, tell
from tests.support.servers import running_server

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

CONVERSATIONS, MESSAGES = 50, 20
CUTS = 100


@dataclass
class Fleet:
    """The clients of the two gateways."""

    first: GatewayClient
    second: GatewayClient


@pytest.fixture(scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    with running_server(BINARIES[REDIS_NAMES[0]]) as server, starting(folder, REDIS_URL=server.url) as processes:
        gateways = [processes.gateway() for _ in range(2)]
        workers = [processes.worker() for _ in range(3)]
        for worker in workers:
            await worker.ready()
        urls = [(await gateway.ready()).base_url for gateway in gateways]
        async with GatewayClient(urls[0]) as first, GatewayClient(urls[1]) as second:
            yield Fleet(first, second)
        for process in (*workers, *gateways):
            assert await process.stopped() == 0
            assert "Traceback" not in process.said


async def log_of(client: GatewayClient, conversation_id: str, until: str) -> list[StreamedEvent]:
    """The whole log up to the terminal event of that message."""
    return [event async for event in client.follow(conversation_id, until=until)]


@pytest.mark.promise("M2")
async def test_a_thousand_messages_over_two_gateways_are_each_answered_once_and_in_order(fleet: Fleet) -> None:
    async def converse(number: int) -> None:
        conversation_id = f"many-{number}"
        sent = []
        for message in range(MESSAGES):
            gateway = fleet.first if (number + message) % 2 else fleet.second
            # the client tries again where the gateway says 429
            sent.append((await tell(gateway, conversation_id, f"message {message} of {number}")).message_id)
        first = await log_of(fleet.first, conversation_id, sent[-1])
        second = await log_of(fleet.second, conversation_id, sent[-1])

        assert first == second
        events = [event.data for event in first]
        assert [event["message_id"] for event in of_kind(events, "user_message")] == sent
        ends = of_kind(events, "output", "error", "cancelled")
        assert [end["message_id"] for end in ends] == sent
        assert [end["text"] for end in ends] == [f"message {message} of {number}" for message in range(MESSAGES)]
        cursors = [event.cursor for event in first]
        assert len(set(cursors)) == len(cursors)

    async with asyncio.timeout(40), asyncio.TaskGroup() as group:
        for number in range(CONVERSATIONS):
            group.create_task(converse(number))


async def read(
    http: httpx.AsyncClient, conversation_id: str, last: str | None, *, max_events: int | None, cut_after: int
) -> list[Frame]:
    """The first events after a cursor: as many as the gateway was told, or until this side hangs up."""
    headers = {"Last-Event-ID": last} if last else {}
    params = {"max_events": max_events} if max_events else {}
    frames: list[Frame] = []
    async with http.stream("GET", f"/stream/{conversation_id}", headers=headers, params=params) as response:
        parser = Parser()
        async for chunk in response.aiter_bytes():
            frames += parser.feed(chunk)
            if len(frames) >= cut_after:
                break
    return frames[:cut_after]  # what arrived behind the cut is lost with its connection


async def test_a_stream_cut_a_hundred_times_is_resumed_without_a_hole_or_a_double(fleet: Fleet) -> None:
    chance = random.Random(2)
    sent: list[str] = []

    async def talk() -> None:
        """Go on talking while the reader reads: it meets the replay as well as the live end."""
        for number in range(60):
            gateway = fleet.first if number % 2 else fleet.second
            sent.append((await tell(gateway, "cut", f"message {number}")).message_id)

    frames: list[Frame] = []
    async with (
        asyncio.timeout(40),
        httpx.AsyncClient(base_url=fleet.first.base_url, trust_env=False) as first,
        httpx.AsyncClient(base_url=fleet.second.base_url, trust_env=False) as second,
        asyncio.TaskGroup() as group,
    ):
        talking = group.create_task(talk())
        for _ in range(CUTS):
            count = chance.randint(1, 2)
            told = chance.random() < 0.5
            got = await read(
                chance.choice((first, second)),
                "cut",
                frames[-1].id if frames else None,
                max_events=count if told else None,
                cut_after=1_000 if told else count,
            )
            assert len(got) == count
            frames += got
        await talking
        rest = [event async for event in fleet.first.follow("cut", after=frames[-1].id, until=sent[-1])]
        whole = await log_of(fleet.second, "cut", sent[-1])

    assert [*(frame.id for frame in frames), *(event.cursor for event in rest)] == [event.cursor for event in whole]
    ends = of_kind([event.data for event in whole], "output")
    assert [end["message_id"] for end in ends] == sent
