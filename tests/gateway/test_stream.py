"""`GET /stream/{conversation_id}`: the log as Server-Sent Events, from any place, to any end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from magent2.bus.interface import BusConfig
from magent2.bus.memory import MemoryBus
from magent2.client.api import GatewayClient
from magent2.models.envelope import MessageEnvelope
from magent2.settings import GatewayConfig
from magent2.testing import Service, running
from tests.gateway.names import now
from tests.support.wait import wait_until

pytestmark = pytest.mark.anyio


async def ask(service: Service, text: str = "hello there", **more: Any) -> str:
    """Send a message and wait for its answer; the message's id."""
    envelope = MessageEnvelope(
        conversation_id=now.conversation, sender="user:local", recipient="agent:DevAgent", content=text, **more
    )
    await service.conversations.send(envelope)
    async for _ in service.conversations.follow(now.conversation, until=envelope.id):
        pass
    return envelope.id


def parse(text: str) -> list[tuple[str | None, dict[str, Any]]]:
    """`(id, data)` of each event; comments and `retry:` left out."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":") and ": " in line)
        if "data" in fields:
            events.append((fields.get("id"), json.loads(fields["data"])))
    return events


async def events(http: httpx.AsyncClient, url: str, **headers: str) -> list[tuple[str | None, dict[str, Any]]]:
    """All events of a stream that ends by itself."""
    async with asyncio.timeout(10):
        answer = await http.get(url, headers={name.replace("_", "-"): value for name, value in headers.items()})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "no-store" in answer.headers["cache-control"]
    return parse(answer.text)


@asynccontextmanager
async def opened(http: httpx.AsyncClient, url: str) -> AsyncIterator[AsyncIterator[str]]:
    """The chunks of a stream that stays open."""
    async with http.stream("GET", url) as answer:
        assert answer.status_code == 200
        yield answer.aiter_text()


async def test_a_stream_starts_with_retry_and_carries_only_ids_and_data(
    http: httpx.AsyncClient, service: Service
) -> None:
    await ask(service)
    text = (await http.get(f"/stream/{now.conversation}?until=done")).text

    assert text.startswith("retry: 1000\n\n")
    for block in text.removesuffix("\n\n").split("\n\n")[1:]:
        assert [line.partition(":")[0] for line in block.split("\n")] == ["id", "data"]


async def test_the_whole_run_is_on_the_stream_in_order(http: httpx.AsyncClient, service: Service) -> None:
    message_id = await ask(service, "one two three")
    seen = [data for _, data in await events(http, f"/stream/{now.conversation}?until=done")]
    names = [data["event"] for data in seen]
    tokens = [data for data in seen if data["event"] == "token"]

    assert names[:2] == ["user_message", "run_started"]
    assert (names[-1], set(names[2:-1])) == ("output", {"token"})
    assert [token["index"] for token in tokens] == list(range(len(tokens)))
    assert "".join(token["text"] for token in tokens) == seen[-1]["text"] == "one two three"
    assert {data["message_id"] for data in seen} == {message_id}


@pytest.mark.promise("H1")
async def test_a_stream_resumes_after_any_of_its_events(http: httpx.AsyncClient, service: Service) -> None:
    await ask(service, "one two three four five six")
    whole = await events(http, f"/stream/{now.conversation}?until=done")

    for place, (cursor, _) in enumerate(whole[:-1]):
        rest = whole[place + 1 :]
        assert await events(http, f"/stream/{now.conversation}?until=done", last_event_id=str(cursor)) == rest
        assert await events(http, f"/stream/{now.conversation}?until=done&last_id={cursor}") == rest
        assert await events(http, f"/stream/{now.conversation}?max_events={len(rest)}&after={cursor}") == rest
    assert await events(http, f"/stream/{now.conversation}?until=done&after={whole[-1][0]}") == []


async def test_last_event_id_wins_over_the_query(http: httpx.AsyncClient, service: Service) -> None:
    await ask(service)
    whole = await events(http, f"/stream/{now.conversation}?until=done")

    resumed = await events(http, f"/stream/{now.conversation}?until=done&after=0-0", last_event_id=str(whole[1][0]))
    assert resumed == whole[2:]


async def test_max_events_ends_the_stream(http: httpx.AsyncClient, service: Service) -> None:
    await ask(service, "one two three")

    assert len(await events(http, f"/stream/{now.conversation}?max_events=2")) == 2


async def test_until_ends_after_the_answer_to_that_message(http: httpx.AsyncClient, service: Service) -> None:
    first = await ask(service, "first")
    second = await ask(service, "second")
    to_first = await events(http, f"/stream/{now.conversation}?until={first}")
    to_second = await events(http, f"/stream/{now.conversation}?until={second}")

    assert to_first[-1][1]["text"] == "first"
    assert to_second[: len(to_first)] == to_first
    assert to_second[-1][1]["text"] == "second"
    assert await events(http, f"/stream/{now.conversation}?until={first}&after={to_second[-2][0]}") == []
    assert await events(http, f"/stream/{now.conversation}?until=done") == to_second


async def test_until_done_of_a_conversation_without_messages_ends_at_once(http: httpx.AsyncClient) -> None:
    assert await events(http, "/stream/unknown?until=done") == []


async def test_a_stream_that_is_open_gets_what_comes(http: httpx.AsyncClient, service: Service) -> None:
    async with opened(http, f"/stream/{now.conversation}") as chunks:
        text = await anext(chunks)
        assert text == "retry: 1000\n\n"
        await ask(service, "live")
        async with asyncio.timeout(10):
            while '"event":"output"' not in text:
                text += await anext(chunks)

    assert parse(text)[-1][1]["text"] == "live"


async def test_a_silent_stream_is_pinged_with_comments() -> None:
    async with (
        running(gateway=GatewayConfig(ping_s=0.05), with_worker=False) as service,
        httpx.AsyncClient(base_url=service.base_url) as http,
        opened(http, f"/stream/{now.conversation}") as chunks,
    ):
        text = ""
        async with asyncio.timeout(10):
            while text.count(": ping") < 2:
                text += await anext(chunks)

    assert parse(text) == []
    assert "id:" not in text


@pytest.mark.promise("H3")
@pytest.mark.parametrize("garbage", ["abc", "-1", "1-2-3", "9" * 30 + "-0", "x" * 10_000, "1-%00"])
async def test_a_cursor_that_is_none_is_a_400(http: httpx.AsyncClient, garbage: str) -> None:
    assert (await http.get(f"/stream/{now.conversation}?after={garbage}")).status_code == 400


@pytest.mark.promise("H2")
@pytest.mark.promise("H3")
@pytest.mark.parametrize("cursor", ["1-1", "99999999999999-0"])
async def test_a_cursor_that_is_not_kept_gets_a_gap_without_an_id_first(
    http: httpx.AsyncClient, service: Service, cursor: str
) -> None:
    await ask(service)
    whole = await events(http, f"/stream/{now.conversation}?max_events=3")
    seen = await events(http, f"/stream/{now.conversation}?max_events=4&after={cursor}")

    assert (seen[0][0], seen[0][1]["event"], seen[0][1]["missing_before"]) == (None, "gap", whole[0][0])
    assert seen[1:] == whole


async def test_a_trimmed_log_says_so_to_who_resumes_and_not_to_who_starts() -> None:
    async with (
        running(bus=MemoryBus(BusConfig(stream_maxlen=20))) as service,
        httpx.AsyncClient(base_url=service.base_url) as http,
    ):
        await ask(service)
        [(first, _)] = await events(http, f"/stream/{now.conversation}?max_events=1")
        for n in range(10):
            await ask(service, f"message {n}")
        resumed = await events(http, f"/stream/{now.conversation}?max_events=2", last_event_id=str(first))
        fresh = await events(http, f"/stream/{now.conversation}?max_events=1&after=0-0")

    assert resumed[0][1]["event"] == "gap"
    assert resumed[1] == fresh[0]
    assert resumed[0][1]["missing_before"] == fresh[0][0]


async def test_nothing_kept_gives_a_gap_before_nothing(http: httpx.AsyncClient) -> None:
    [(cursor, gap)] = await events(http, "/stream/unknown?max_events=1&after=1-1")

    assert (cursor, gap["event"], gap["missing_before"]) == (None, "gap", None)


@pytest.mark.parametrize("path", ["%00", "a%20b", "%0d%0a", "x" * 300, "*", "a:b", "%f0%9f%98%80"])
async def test_a_conversation_id_that_is_none_is_a_422(http: httpx.AsyncClient, path: str) -> None:
    assert (await http.get(f"/stream/{path}")).status_code == 422


@pytest.mark.parametrize("query", ["max_events=0", "max_events=-1", "max_events=x", "max_events=", "until=a%20b"])
async def test_a_bad_parameter_is_a_422(http: httpx.AsyncClient, query: str) -> None:
    assert (await http.get(f"/stream/{now.conversation}?{query}")).status_code == 422


@pytest.mark.promise("http.limits")
async def test_streams_are_bounded() -> None:
    async with (
        running(gateway=GatewayConfig(max_streams=2), with_worker=False) as service,
        httpx.AsyncClient(base_url=service.base_url) as http,
        opened(http, f"/stream/{now.conversation}") as one,
        opened(http, f"/stream/{now.conversation}") as two,
    ):
        await anext(one)
        await anext(two)
        refused = await http.get(f"/stream/{now.conversation}")

        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)


@pytest.mark.promise("H5")
async def test_a_client_that_leaves_frees_its_stream_and_the_run_goes_on(
    http: httpx.AsyncClient, service: Service
) -> None:
    async with opened(http, f"/stream/{now.conversation}") as chunks:
        await anext(chunks)
    await wait_until(lambda: len(service.streams) == 0, description="the stream is freed")

    assert await ask(service)


@pytest.mark.promise("H13")
async def test_open_streams_end_cleanly_at_shutdown_and_resume_elsewhere() -> None:
    bus = MemoryBus()
    async with running(bus=bus) as first:
        async with GatewayClient(first.base_url) as client:
            await client.send(
                conversation_id=now.conversation, recipient="agent:DevAgent", sender="user:local", content="before"
            )
        http = httpx.AsyncClient(base_url=first.base_url, timeout=10)
        streaming = asyncio.create_task(http.get(f"/stream/{now.conversation}"))
        await wait_until(lambda: len(first.streams) == 1, description="the stream is open")
        await ask(first, "again")
    # no RemoteProtocolError: the chunked body has its end
    seen = parse((await streaming).text)
    await http.aclose()

    async with running(bus=bus) as second:
        await ask(second, "after")
        async with httpx.AsyncClient(base_url=second.base_url) as http:
            rest = await events(http, f"/stream/{now.conversation}?until=done", last_event_id=str(seen[-1][0]))
            whole = await events(http, f"/stream/{now.conversation}?until=done")

    assert seen + rest == whole
