"""`GatewayClient` against a gateway that breaks in every way it can."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from magent2.client.api import GatewayClient, SendFailed, Sent, StreamedEvent, StreamFailed
from tests.client.stand_in import Answer, Connection, StandIn, running_stand_in
from tests.support.wait import wait_until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def stand_in() -> AsyncIterator[StandIn]:
    async with running_stand_in() as server:
        yield server


class Eager(GatewayClient):
    """Waits no longer than it was told to."""

    def backoff(self, failures: int, at_least_s: float = 0.0) -> float:
        return at_least_s


@pytest.fixture
async def client(stand_in: StandIn) -> AsyncIterator[GatewayClient]:
    async with Eager(stand_in.base_url, token="t1", send_timeout_s=3) as opened:
        yield opened


async def send(client: GatewayClient, content: str = "hello there", **more: Any) -> Sent:
    return await client.send(
        conversation_id="c1", recipient="agent:DevAgent", sender="user:local", content=content, **more
    )


async def collect(client: GatewayClient, **more: Any) -> list[StreamedEvent]:
    async with asyncio.timeout(5):
        return [event async for event in client.follow("c1", **more)]


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"event": "token", "text": f"{number}", "index": number, "turn": 0} for number in range(count)]


def numbers(events: list[StreamedEvent]) -> list[str]:
    return [event.data["text"] for event in events]


def unused_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


# ---------------------------------------------------------------- send


async def test_send_returns_what_was_accepted(stand_in: StandIn, client: GatewayClient) -> None:
    sent = await send(client, "é\u2028🙂", metadata={"on_busy": "queue"}, id="m1")

    assert sent == Sent("m1", "c1", "0-0", duplicate=False, topic="queue")
    assert stand_in.sends == [
        {
            "id": "m1",
            "conversation_id": "c1",
            "sender": "user:local",
            "recipient": "agent:DevAgent",
            "type": "message",
            "content": "é\u2028🙂",
            "metadata": {"on_busy": "queue"},
        }
    ]
    assert stand_in.tokens == ["Bearer t1"]


async def test_a_send_whose_answer_was_lost_is_repeated_with_its_id(stand_in: StandIn, client: GatewayClient) -> None:
    stand_in.answers.append(Answer(cut=True))

    sent = await send(client)

    assert sent.duplicate
    assert [body["id"] for body in stand_in.sends] == [sent.message_id] * 2


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_a_busy_gateway_is_asked_again(stand_in: StandIn, client: GatewayClient, status: int) -> None:
    stand_in.answers.append(Answer(status, {"Retry-After": "0"}))

    await send(client)

    assert len(stand_in.sends) == 2


async def test_a_retry_after_past_the_deadline_fails_at_once(stand_in: StandIn, client: GatewayClient) -> None:
    stand_in.answers.append(Answer(503, {"Retry-After": "60"}, b'{"error":{"code":"unavailable","message":"no bus"}}'))

    with pytest.raises(SendFailed, match="no bus") as failed:
        await send(client)

    assert (failed.value.status, failed.value.code) == (503, "unavailable")
    assert len(stand_in.sends) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422, 500])
async def test_a_refusal_is_not_repeated(stand_in: StandIn, client: GatewayClient, status: int) -> None:
    stand_in.answers.append(Answer(status, {}, b"<html>"))

    with pytest.raises(SendFailed) as failed:
        await send(client)

    assert (failed.value.status, failed.value.code) == (status, f"http_{status}")
    assert len(stand_in.sends) == 1


@pytest.mark.parametrize("body", [b"[]", b"{}", b"hello", b'{"message_id": 1}'])
async def test_an_answer_of_something_else_is_no_acceptance(
    stand_in: StandIn, client: GatewayClient, body: bytes
) -> None:
    stand_in.answers.append(Answer(200, {}, body))

    with pytest.raises(SendFailed, match="like a magent2 gateway"):
        await send(client)


async def test_a_gateway_that_is_not_there() -> None:
    async with Eager(unused_url()) as client:
        with pytest.raises(SendFailed, match="cannot reach") as failed:
            await send(client)

    assert failed.value.status is None


async def test_a_gateway_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://user:secret@127.0.0.1:{listener.getsockname()[1]}"
        async with GatewayClient(url, send_timeout_s=0.1) as client:
            with pytest.raises(SendFailed, match="unknown") as failed:
                await send(client)

    assert "secret" not in str(failed.value)


@pytest.mark.parametrize("jitter", [0.0, 1.0])
async def test_backoff_grows_and_keeps_what_was_asked_for(jitter: float) -> None:
    client = GatewayClient("http://localhost", jitter=lambda: jitter)

    waits = [client.backoff(failures) for failures in range(1, 30)]

    assert waits == sorted(waits)
    assert 0.1 <= waits[0] < 0.2
    assert 10 <= waits[-1] <= 15
    assert 60 <= client.backoff(1, at_least_s=60) <= 90


# ---------------------------------------------------------------- follow


async def test_follow_ends_after_the_answer(stand_in: StandIn, client: GatewayClient) -> None:
    sent = await send(client)

    events = await collect(client, after=sent.cursor, until=sent.message_id)

    kinds = [event.data["event"] for event in events]
    assert kinds == ["user_message", "run_started", "token", "token", "output"]
    assert [event.cursor for event in events] == [f"{number}-0" for number in range(1, 6)]
    assert stand_in.streams == [{"last_event_id": None, "after": "0-0", "until": sent.message_id}]


@pytest.mark.parametrize(
    "broken", [Connection(cut_after=2), Connection(cut_inside=2), Connection(end_after=2)], ids=["cut", "inside", "end"]
)
async def test_a_broken_stream_is_resumed_where_it_was(
    stand_in: StandIn, client: GatewayClient, broken: Connection
) -> None:
    await stand_in.append("c1", *numbered(6))
    stand_in.connections += [broken, Connection(status=503), Connection(cut_after=0)]

    events = await collect(client, max_events=6)

    assert numbers(events) == list("012345")
    assert [(asked["last_event_id"], asked["max_events"]) for asked in stand_in.streams] == [
        (None, "6"),
        ("2-0", "4"),
        ("2-0", "4"),
        ("2-0", "4"),
    ]


async def test_any_cuts_lose_and_repeat_nothing(stand_in: StandIn, client: GatewayClient) -> None:
    await stand_in.append("c1", *numbered(200))
    dice = random.Random(7)
    for _ in range(40):
        cut: dict[str, Any] = {dice.choice(["cut_after", "cut_inside", "end_after"]): dice.randrange(1, 5)}
        stand_in.connections.append(Connection(first=b"", chunk=dice.choice([1, 7, None]), **cut))

    events = await collect(client, max_events=200)

    assert [int(number) for number in numbers(events)] == list(range(200))


async def test_what_is_sent_again_is_dropped(stand_in: StandIn, client: GatewayClient) -> None:
    await stand_in.append("c1", *numbered(4))
    stand_in.connections += [Connection(cut_after=3), Connection(repeat=True)]

    assert numbers(await collect(client, max_events=4)) == list("0123")


async def test_a_silent_connection_is_taken_for_broken(stand_in: StandIn) -> None:
    stand_in.connections.append(Connection(first=b": ping\n\n"))
    async with GatewayClient(stand_in.base_url, idle_timeout_s=0.1) as client:
        following = asyncio.create_task(collect(client, max_events=1))
        await wait_until(lambda: len(stand_in.streams) == 2, description="a second connection")
        await stand_in.append("c1", *numbered(1))

        assert numbers(await following) == ["0"]


GAP = b'retry: 10\n\ndata: {"event":"gap","conversation_id":"c1","missing_before":"1-0"}\n\n'


async def test_after_a_gap_smaller_cursors_are_shown(stand_in: StandIn, client: GatewayClient) -> None:
    await stand_in.append("c1", *numbered(2))
    stand_in.connections.append(Connection(first=GAP, repeat=True))

    events = await collect(client, after="9-0", max_events=3)

    assert [(event.cursor, event.data["event"]) for event in events] == [
        (None, "gap"),
        ("1-0", "token"),
        ("2-0", "token"),
    ]


async def test_after_a_gap_what_was_seen_before_stays_unseen(stand_in: StandIn, client: GatewayClient) -> None:
    """The store came back from an older copy: part of its log is known, part of it is new under an old cursor."""
    await stand_in.append("c1", *numbered(3))
    stand_in.connections += [Connection(cut_after=3), Connection(first=GAP, cut_after=0)]
    stand_in.connections.append(Connection(first=GAP, repeat=True))
    seen: list[str] = []
    async with asyncio.timeout(5), aclosing(client.follow("c1", max_events=5)) as events:
        async for event in events:
            seen.append(event.data.get("text", "gap"))
            if len(seen) == 3:
                stand_in.log("c1")[2:] = []
                await stand_in.append("c1", {"event": "token", "text": "new"})

    assert seen == ["0", "1", "2", "gap", "new"]


async def test_a_stream_that_ends_at_once_twice_has_nothing_to_wait_for(
    stand_in: StandIn, client: GatewayClient
) -> None:
    sent = await send(client)

    assert await collect(client, after="5-0", until=sent.message_id) == []
    assert len(stand_in.streams) == 2


async def test_until_done_ends_with_the_stream(stand_in: StandIn, client: GatewayClient) -> None:
    await send(client)
    stand_in.connections.append(Connection(end_after=5))

    events = await collect(client, until="done")

    assert events[-1].data["event"] == "output"
    assert len(stand_in.streams) == 1


@pytest.mark.parametrize("status", [400, 401, 404, 406, 422, 500])
async def test_a_refused_stream_is_not_asked_for_again(stand_in: StandIn, client: GatewayClient, status: int) -> None:
    stand_in.connections.append(Connection(status=status))

    with pytest.raises(StreamFailed, match="not now") as failed:
        await collect(client)

    assert (failed.value.status, failed.value.code) == (status, "refused")
    assert len(stand_in.streams) == 1


async def test_a_busy_gateway_is_asked_for_the_stream_again(stand_in: StandIn, client: GatewayClient) -> None:
    await stand_in.append("c1", *numbered(1))
    stand_in.connections += [Connection(status=429, headers={"Retry-After": "0"}), Connection(status=503)]

    assert numbers(await collect(client, max_events=1)) == ["0"]


async def test_a_stream_that_does_not_come_back(stand_in: StandIn) -> None:
    stand_in.connections += [Connection(cut_after=0)] + [Connection(status=502)] * 20
    async with GatewayClient(stand_in.base_url, resume_for_s=0.3) as client:
        with pytest.raises(StreamFailed):
            await collect(client)


@pytest.mark.parametrize("data", [b"data: [1]\n\n", b"data: {\n\n", b"data\n\n"])
async def test_something_that_is_not_an_event(stand_in: StandIn, client: GatewayClient, data: bytes) -> None:
    stand_in.connections.append(Connection(first=data))

    with pytest.raises(StreamFailed, match="not an event"):
        await collect(client)


async def test_a_page_of_another_server(stand_in: StandIn, client: GatewayClient) -> None:
    stand_in.connections.append(Connection(headers={"content-type": "text/html"}))

    with pytest.raises(StreamFailed, match="like a magent2 gateway"):
        await collect(client)


async def test_leaving_early_closes_the_connection(stand_in: StandIn, client: GatewayClient) -> None:
    await stand_in.append("c1", *numbered(3))
    async with aclosing(client.follow("c1")) as events:
        async for event in events:
            assert event.data["text"] == "0"
            break

    assert stand_in.streams == [{"last_event_id": None}]
