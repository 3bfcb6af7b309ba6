"""The real `magent2 local`: a process, a model server on a socket, and a client."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from magent2.client.api import GatewayClient
from tests.support.processes import Event, Process, ask, events_until, of_kind, starting, tell
from tests.support.stub_model import Reply, StubModel, StubRequest, obey, running_stub

pytestmark = pytest.mark.anyio

TOKENS = [f"t{number}" for number in range(200)]

MY_APP = """
from agents import Agent, function_tool

@function_tool
async def add(a: int, b: int) -> int:
    return a + b

@function_tool
async def boom(password: str) -> str:
    raise ValueError(f"cannot use {password}")

agent = Agent(name="Adder", instructions="You add.", tools=[add, boom])
not_an_agent = 42
"""


@dataclass
class Running:
    """A `magent2 local`, its model, and the gate that holds the model's answer to `gated` after three tokens."""

    process: Process
    stub: StubModel
    gate: asyncio.Event
    client: GatewayClient


@asynccontextmanager
async def gated_stub() -> AsyncIterator[tuple[StubModel, asyncio.Event]]:
    gate = asyncio.Event()

    def script(request: StubRequest) -> Reply:
        if request.last_user == "gated":
            return Reply(" ".join(TOKENS), gate=gate, gate_after=3)
        return obey(request)

    async with running_stub(script) as stub:
        yield stub, gate


@pytest.fixture(scope="module")
async def services(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, Running]]:
    """The built-in agent on both wires, and a user's own: started side by side, since importing the SDK takes long."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("responses", "chat_completions", "own")}
    (folders["own"] / "my_app.py").write_text(MY_APP, encoding="utf-8")
    async with gated_stub() as (stub, gate):
        with (
            starting(folders["responses"], OPENAI_BASE_URL=stub.base_url) as responses,
            starting(folders["chat_completions"], OPENAI_BASE_URL=stub.base_url) as chat,
            starting(folders["own"], OPENAI_BASE_URL=stub.base_url) as own,
        ):
            started = {
                "responses": responses.local(),
                "chat_completions": chat.local(AGENT_MODEL_API="chat_completions"),
                "own": own.local("my_app:agent", AGENT_MAX_TURNS="3"),
            }
            async with (
                GatewayClient((await started["responses"].ready()).base_url) as first,
                GatewayClient((await started["chat_completions"].ready()).base_url) as second,
                GatewayClient((await started["own"].ready()).base_url) as third,
            ):
                clients = {"responses": first, "chat_completions": second, "own": third}
                yield {name: Running(started[name], stub, gate, clients[name]) for name in started}


@pytest.fixture(params=["responses", "chat_completions"])
def local(services: dict[str, Running], request: pytest.FixtureRequest) -> Running:
    """The built-in agent, once for each wire."""
    running = services[request.param]
    running.gate.clear()
    return running


@pytest.fixture
def own(services: dict[str, Running]) -> Running:
    """The user's own agent."""
    return services["own"]


def the_end(events: list[Event]) -> Event:
    """The one terminal event."""
    [end] = of_kind(events, "output", "error", "cancelled")
    assert events[-1] == end
    return end


# ---------------------------------------------------------------- what a run says


async def test_tokens_arrive_while_the_model_is_still_talking(local: Running) -> None:
    sent = await tell(local.client, "talking", "gated")
    tokens: list[Event] = []
    async with asyncio.timeout(20), aclosing(local.client.follow("talking", until=sent.message_id)) as events:
        async for event in events:
            tokens += of_kind([event.data], "token")
            if tokens and not local.gate.is_set():
                # the model cannot have finished: it waits for us
                assert tokens[0]["text"].startswith("t0")
                local.gate.set()
            end = event.data

    assert (end["event"], end["text"]) == ("output", " ".join(TOKENS))
    assert "".join(token["text"] for token in tokens) == end["text"]
    assert [token["index"] for token in tokens] == list(range(len(tokens)))
    assert {token["turn"] for token in tokens} == {0}


async def test_two_hundred_tokens_and_what_they_cost(local: Running) -> None:
    events = await ask(local.client, "count", "count 200")

    assert events[0]["event"] == "user_message"
    assert (events[1]["event"], events[1]["attempt"]) == ("run_started", 1)
    assert "".join(event["text"] for event in of_kind(events, "token")) == " ".join(TOKENS)
    end = the_end(events)
    assert end["text"] == " ".join(TOKENS)
    usage = end["usage"]
    assert (usage["requests"], usage["output_tokens"]) == (1, 200)
    assert usage["total_tokens"] == usage["input_tokens"] + 200


async def test_the_second_message_shows_the_model_the_first(local: Running) -> None:
    await ask(local.client, "memory", "my name is Ada")

    assert the_end(await ask(local.client, "memory", "recall"))["text"] == "my name is Ada"
    assert the_end(await ask(local.client, "elsewhere", "recall"))["text"] == ""


async def test_reasoning_is_shown_and_is_not_the_answer(local: Running) -> None:
    events = await ask(local.client, "thinking", "think two by two")

    assert "".join(event["text"] for event in of_kind(events, "reasoning")) == "two by two"
    assert [event["index"] for event in of_kind(events, "reasoning")] == list(range(len(of_kind(events, "reasoning"))))
    assert "".join(event["text"] for event in of_kind(events, "token")) == "thought: two by two"
    assert the_end(events)["text"] == "thought: two by two"


async def test_a_tool_of_the_users_own_agent_starts_and_ends(own: Running) -> None:
    events = await ask(own.client, "tools", 'call add {"a": 2, "b": 3}')

    start, end = of_kind(events, "tool_step")
    assert (start["status"], end["status"]) == ("start", "success")
    assert start["tool_call_id"] == end["tool_call_id"]
    assert (start["name"], start["args"], start["turn"]) == ("add", {"a": 2, "b": 3}, 0)
    assert (start["duration_ms"], end["result_summary"]) == (None, "5")
    assert end["duration_ms"] >= 0
    assert {token["turn"] for token in of_kind(events, "token")} == {1}
    assert the_end(events)["text"] == "done: 5"
    assert the_end(events)["usage"]["requests"] == 2


async def test_a_tool_that_raises_is_an_error_that_gives_no_secret_away(own: Running) -> None:
    events = await ask(own.client, "raising", 'call boom {"password": "hunter2"}')

    end = of_kind(events, "tool_step")[-1]
    assert (end["status"], end["error"]) == ("error", "ValueError")
    assert the_end(events)["event"] == "output"


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("command", "code"),
    [("fail 401", "model_error"), ("refuse never", "model_refusal")],
)
async def test_an_error_no_wait_will_help_ends_the_run_at_once(local: Running, command: str, code: str) -> None:
    events = await ask(local.client, f"error-{command.split()[0]}", command)

    end = the_end(events)
    assert (end["event"], end.get("code"), end.get("retryable")) == ("error", code, False)
    assert [event["attempt"] for event in of_kind(events, "run_started")] == [1]


async def test_an_answer_cut_off_at_the_models_limit_is_an_error(services: dict[str, Running]) -> None:
    """On the Responses wire: on the other the SDK hides it, see `tests/runner/test_sdk_promises.py`."""
    events = await ask(services["responses"].client, "cut-off", "incomplete")

    end = the_end(events)
    assert (end["event"], end.get("code"), end.get("retryable")) == ("error", "model_error", False)
    assert "cut off at its token limit" in end["message"]


async def test_a_server_error_is_tried_again_and_answered(local: Running) -> None:
    events = await ask(local.client, "flaky", "flaky 2 500")

    assert the_end(events)["text"] == "recovered"
    assert [event["attempt"] for event in of_kind(events, "run_started")] == [1, 2, 3]
    assert [event["level"] for event in of_kind(events, "log")] == ["warning", "warning"]
    assert len({event["run_id"] for event in of_kind(events, "run_started")}) == 1


async def test_a_run_without_end_is_stopped_at_its_limit_of_turns(own: Running) -> None:
    events = await ask(own.client, "turns", " ; ".join(["chain add {}"] + ['add {"a": 1, "b": 1}'] * 5))

    end = the_end(events)
    assert (end["event"], end.get("code"), end.get("retryable")) == ("error", "max_turns", False)


async def test_after_an_error_the_conversation_goes_on(local: Running) -> None:
    await ask(local.client, "goes-on", "fail 401")

    assert the_end(await ask(local.client, "goes-on", "count 2"))["text"] == "t0 t1"


# ---------------------------------------------------------------- starting


@pytest.mark.parametrize(
    ("environment", "code", "told"),
    [
        ({"BUS_LEASE_SECONDS": "abc"}, 2, "BUS_LEASE_SECONDS"),
        ({"MAGENT2_API_TOKN": "x"}, 2, "MAGENT2_API_TOKN is not a setting of magent2; did you mean MAGENT2_API_TOKEN"),
        ({"OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}, 5, "cannot reach the model at http://127.0.0.1:1/v1"),
    ],
)
async def test_what_keeps_it_from_starting_is_told_in_one_line(
    tmp_path: Path, environment: dict[str, str], code: int, told: str
) -> None:
    with starting(tmp_path) as processes:
        process = processes.local(**environment)

        assert await process.ended() == code
        assert told in process.said
        assert len(process.said.splitlines()) == 1, process.said


async def test_a_port_in_use_is_told_in_one_line(tmp_path: Path) -> None:
    with starting(tmp_path) as processes, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = processes.local(GATEWAY_PORT=str(port))

        assert await process.ended() == 2
        assert process.said.startswith(f"magent2: port {port} is in use")
        assert len(process.said.splitlines()) == 1, process.said


async def test_an_agent_that_cannot_be_loaded_is_told_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "my_app.py").write_text(MY_APP, encoding="utf-8")
    with starting(tmp_path) as processes:
        told = {
            "nowhere:agent": "there is no module 'nowhere'",
            "my_app:nobody": "'my_app' has no attribute 'nobody'",
            "my_app:not_an_agent": "is a int, not an agents.Agent",
            "my_app": "is not MODULE:ATTRIBUTE",
        }
        started = {spec: processes.local(spec, AGENT_SESSION_PATH=f"{n}.db") for n, spec in enumerate(told)}

        for spec, process in started.items():
            assert await process.ended(within_s=30) == 2, process.said
            assert told[spec] in process.said
            assert "Traceback" not in process.said


# ---------------------------------------------------------------- ending


async def test_without_a_key_it_echoes_and_sigterm_ends_it_with_0(tmp_path: Path) -> None:
    with starting(tmp_path) as processes:
        process = await processes.local().ready()
        async with GatewayClient(process.base_url) as client:
            assert the_end(await ask(client, "c1", "hello there"))["text"] == "hello there"

        assert "echo" in process.said
        assert await process.stopped(signal.SIGTERM) == 0
        assert "Traceback" not in process.said


async def test_ctrl_c_ends_open_streams_cleanly_and_exits_130(tmp_path: Path) -> None:
    with starting(tmp_path) as processes:
        process = await processes.local().ready()
        async with (
            asyncio.timeout(15),
            httpx.AsyncClient(base_url=process.base_url, trust_env=False) as http,
            http.stream("GET", "/stream/c1") as response,
        ):
            chunks = response.aiter_bytes()
            first = await anext(chunks)
            process.signal(signal.SIGINT)
            # a response that is cut off in the middle would raise RemoteProtocolError
            rest = [chunk async for chunk in chunks]

        assert first.startswith(b"retry:")
        assert rest == []
        assert await process.ended() == 130
        assert "Traceback" not in process.said


async def test_sigterm_lets_a_run_finish(tmp_path: Path) -> None:
    async with gated_stub() as (stub, gate):
        with starting(tmp_path, OPENAI_BASE_URL=stub.base_url) as processes:
            process = await processes.local().ready()
            async with GatewayClient(process.base_url) as client:
                await tell(client, "c1", "gated")
                await stub.wait_for_requests(1, within_s=20)
                process.signal(signal.SIGTERM)
                await process.says("finishing 1 runs")
                gate.set()

                assert await process.ended() == 0
                assert "handing back" not in process.said


async def test_the_history_survives_a_restart_in_the_same_folder(tmp_path: Path) -> None:
    async with running_stub() as stub:
        with starting(tmp_path, OPENAI_BASE_URL=stub.base_url) as processes:
            process = await processes.local().ready()
            async with GatewayClient(process.base_url) as client:
                await ask(client, "c1", "my name is Ada")
            await process.stopped()

            process = await processes.local().ready()
            async with GatewayClient(process.base_url) as client:
                sent = await tell(client, "c1", "recall")
                events = await events_until(client, sent)

            assert the_end(events)["text"] == "my name is Ada"
            assert (tmp_path / ".sessions" / "agents.db").exists()
