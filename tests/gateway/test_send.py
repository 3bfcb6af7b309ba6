"""`POST /send`: what it takes, what it answers, and that nothing bad gets in."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import httpx
import pytest

from magent2.bus.interface import BusConfig
from magent2.bus.memory import MemoryBus
from magent2.errors import Unavailable
from magent2.settings import GatewayConfig
from magent2.testing import Service, running
from tests.gateway.names import now

pytestmark = pytest.mark.anyio


def message(**changes: Any) -> dict[str, Any]:
    body = {
        "conversation_id": now.conversation,
        "sender": "user:local",
        "recipient": f"agent:{now.agent}",
        "content": "hello",
    }
    return {**body, **changes}


async def log_of(service: Service, conversation_id: str | None = None) -> list[bytes]:
    """What is in the log right now."""
    return [data async for _, data in service.conversations._scan(f"log:{conversation_id or now.conversation}")]


async def test_a_message_is_accepted_with_its_place_in_the_log(http: httpx.AsyncClient, service: Service) -> None:
    answer = await http.post("/send", json=message(id="m1"))

    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ok",
        "message_id": "m1",
        "conversation_id": now.conversation,
        "topic": f"log:{now.conversation}",
        "cursor": "0-0",
        "duplicate": False,
    }
    assert len(await log_of(service)) == 1
    assert (await service.conversations.depth(now.agent)).waiting == 1


async def test_the_cursor_is_the_place_just_before_the_message(http: httpx.AsyncClient, service: Service) -> None:
    await http.post("/send", json=message())
    second = (await http.post("/send", json=message(content="second"))).json()

    async for batch in service.conversations.follow(now.conversation, second["cursor"]):
        assert b'"text":"second"' in batch[0].data
        break


async def test_the_same_id_again_is_a_duplicate_and_runs_nothing(http: httpx.AsyncClient, service: Service) -> None:
    first = (await http.post("/send", json=message(id="m1"))).json()
    again = (await http.post("/send", json=message(id="m1"))).json()

    assert again == {**first, "duplicate": True}
    assert (await service.conversations.depth(now.agent)).waiting == 1


@pytest.mark.promise("M7")
async def test_fifty_identical_sends_at_once_are_one_message(http: httpx.AsyncClient, service: Service) -> None:
    answers = await asyncio.gather(*(http.post("/send", json=message(id="m1")) for _ in range(50)))

    assert {answer.status_code for answer in answers} == {200}
    assert sum(not answer.json()["duplicate"] for answer in answers) == 1
    assert len({answer.json()["cursor"] for answer in answers}) == 1
    assert len(await log_of(service)) == 1


async def test_the_same_id_with_other_content_conflicts(http: httpx.AsyncClient, service: Service) -> None:
    await http.post("/send", json=message(id="m1"))
    answer = await http.post("/send", json=message(id="m1", content="other"))

    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "id_conflict"
    assert len(await log_of(service)) == 1


async def test_the_same_id_to_another_recipient_is_another_message(http: httpx.AsyncClient, service: Service) -> None:
    await http.post("/send", json=message(id="m1"))
    answer = await http.post("/send", json=message(id="m1", recipient="agent:Other"))

    assert answer.json()["duplicate"] is False
    assert len(await log_of(service)) == 2


async def test_on_busy_reject_refuses_while_there_is_work_but_knows_its_own_retry(http: httpx.AsyncClient) -> None:
    eager = message(id="m1", metadata={"on_busy": "reject"})
    assert (await http.post("/send", json=eager)).status_code == 200
    refused = await http.post("/send", json=message(id="m2", metadata={"on_busy": "reject"}))
    retried = await http.post("/send", json=eager)

    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "busy")
    assert (retried.status_code, retried.json()["duplicate"]) == (200, True)


@pytest.mark.parametrize("recipient", ["chat:{}", "user:eve"])
async def test_a_message_to_a_chat_or_a_user_is_only_written(
    http: httpx.AsyncClient, service: Service, recipient: str
) -> None:
    assert (await http.post("/send", json=message(recipient=recipient.format(now.conversation)))).status_code == 200
    assert len(await log_of(service)) == 1


async def test_a_full_queue_answers_429_with_retry_after() -> None:
    async with running(bus=MemoryBus(BusConfig(key_backlog=1)), with_worker=False) as service:
        async with httpx.AsyncClient(base_url=service.base_url) as http:
            answers = [await http.post("/send", json=message(content=f"{n}")) for n in range(3)]

        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert int(answers[2].headers["retry-after"]) >= 1
        assert len(await log_of(service)) == 2


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"a":', 400),
        (b"", 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b"[]", 422),
        (b'"text"', 422),
        (b"null", 422),
        (b"{}", 422),
    ],
)
async def test_a_body_that_is_no_message_is_refused(
    http: httpx.AsyncClient, service: Service, body: bytes, status: int
) -> None:
    answer = await http.post("/send", content=body, headers={"content-type": "application/json"})

    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"code", "message", "request_id"}
    assert await log_of(service) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"content": ""},
        {"content": " \n\t "},
        {"content": None},
        {"content": 7},
        {"sender": "local"},
        {"sender": "root:x"},
        {"recipient": "DevAgent"},
        {"recipient": "agent:"},
        {"recipient": "agent:../a"},
        {"recipient": "agent:a\n"},
        {"recipient": "chat:other"},
        {"conversation_id": "a b"},
        {"conversation_id": "x" * 129},
        {"id": "\u0000"},
        {"id": "x" * 300},
        {"type": "event"},
        {"metadata": []},
        {"metadata": {"on_busy": "shout"}},
        {"created_at": "yesterday"},
        {"created_at": "2026-01-01T00:00:00"},
        {"from": "user:admin"},
        {"type": "control", "content": None},
        {"type": "control", "content": "explode"},
        {"type": "control", "content": "cancel", "recipient": "user:x"},
    ],
)
async def test_a_bad_field_is_refused_without_echoing_it(
    http: httpx.AsyncClient, service: Service, changes: dict[str, Any]
) -> None:
    answer = await http.post("/send", json=message(**{"metadata": {"canary": "s3cret"}, **changes}))

    assert answer.status_code == 422
    assert "s3cret" not in answer.text
    assert len(answer.content) <= 1024
    assert await log_of(service) == []


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_another_media_type_is_refused(http: httpx.AsyncClient, media_type: str) -> None:
    answer = await http.post("/send", content=b"{}", headers={"content-type": media_type})

    assert answer.status_code == 415


@pytest.mark.promise("http.limits")
async def test_a_body_over_the_limit_is_refused(service: Service) -> None:
    async with running(with_worker=False, gateway=GatewayConfig(max_body_bytes=1000)) as small:
        async with httpx.AsyncClient(base_url=small.base_url) as http:
            answer = await http.post("/send", json=message(content="x" * 1000))

        assert answer.status_code == 413
        assert "error" in answer.json()
        assert await log_of(small) == []


async def test_unknown_paths_and_methods_answer_in_the_same_shape(http: httpx.AsyncClient) -> None:
    unknown, wrong = await http.get("/nope"), await http.get("/send")

    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert "error" in wrong.json()


async def test_health_and_ready_answer(http: httpx.AsyncClient) -> None:
    assert (await http.get("/health")).json() == {"status": "ok"}
    assert (await http.get("/ready")).status_code == 200


class AwayBus(MemoryBus):
    """A bus whose server is gone."""

    async def ping(self) -> None:
        raise Unavailable

    async def find(self, topic: str, dedup_id: str) -> Any:
        raise Unavailable


@pytest.mark.promise("H12")
async def test_without_the_bus_health_is_fine_and_the_rest_says_503() -> None:
    async with (
        running(bus=AwayBus(), with_worker=False) as service,
        httpx.AsyncClient(base_url=service.base_url) as http,
    ):
        health, ready, sent = await asyncio.gather(
            http.get("/health"), http.get("/ready"), http.post("/send", json=message())
        )

    assert health.status_code == 200
    assert (ready.status_code, "bus" in ready.json()["error"]["message"]) == (503, True)
    assert (sent.status_code, "retry-after" in sent.headers) == (503, True)


@pytest.mark.promise("H15")
async def test_hostile_text_comes_back_byte_exact(http: httpx.AsyncClient, service: Service) -> None:
    hostile = "data: x\n\nevent: evil\nid: 9\r\n\u2028\u0085\u0000\ufeff" + uuid4().hex
    await http.post("/send", json=message(content=hostile))

    async with http.stream("GET", f"/stream/{now.conversation}?max_events=1") as answer:
        text = (await answer.aread()).decode()
    [data] = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]

    assert httpx.Response(200, content=data.encode()).json()["text"] == hostile


@pytest.mark.promise("H9")
async def test_an_unknown_host_is_refused_everywhere(http: httpx.AsyncClient) -> None:
    for path in ("/health", "/ready", f"/stream/{now.conversation}", "/nope"):
        for host in ("evil.test", "127.0.0.1.evil.test", "localhost.evil.test:80", "", "2130706433"):
            answer = await http.get(path, headers={"host": host})
            assert answer.status_code in (400, 421), (path, host)


@pytest.mark.promise("H9")
async def test_a_foreign_origin_is_refused(http: httpx.AsyncClient) -> None:
    for origin in ("https://evil.test", "null", "http://localhost:1"):
        assert (await http.get("/health", headers={"origin": origin})).status_code == 403
    assert (await http.get("/health", headers={"host": "LOCALHOST:8000"})).status_code == 200


@pytest.mark.promise("http.token")
async def test_with_tokens_everything_but_health_needs_one() -> None:
    async with (
        running(with_worker=False, gateway=GatewayConfig(tokens=("old", "new"))) as service,
        httpx.AsyncClient(base_url=service.base_url) as http,
    ):
        refused = [{}, {"authorization": "Bearer"}, {"authorization": "Bearer wrong"}, {"authorization": "Basic new"}]
        for headers in refused:
            answer = await http.post("/send", json=message(), headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert (await http.get(f"/stream/{now.conversation}?token=new")).status_code == 401
        assert (await http.get("/health")).status_code == 200
        for token in ("Bearer old", "bearer new"):
            assert (await http.post("/send", json=message(), headers={"authorization": token})).status_code == 200
