"""Workers that die in the middle of a run, and others that go on: real processes, a real Valkey, kill -9.

Importing the SDK takes seconds, so the processes are shared. All workers are started at once, each stops at the end of
importing the user's agent, and the tests let them go one after another, in the order of this file.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from magent2.client.api import GatewayClient, Sent
from tests.conftest import BINARIES, REDIS_NAMES
from tests.support.processes import Event, Process, Processes, events_until, of_kind, starting, tell
from tests.support.servers import running_server
from tests.support.stub_model import Reply, StubModel, StubRequest, obey, running_stub
from tests.support.wait import wait_until

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

MY_APP = '''
"""An agent whose tools leave a line in a file, and which waits where a test has put a file named for it."""

import asyncio
import os
import time
from pathlib import Path

from agents import Agent, function_tool

from magent2.models.run import current_run

HERE = Path(__file__).parent


async def wait_while_held(name):
    if (HERE / f"hold-{name}").exists():
        (HERE / f"at-{name}").touch()
        while (HERE / f"hold-{name}").exists():
            await asyncio.sleep(0.01)


@function_tool
async def step(n: int) -> str:
    """A step with an effect in the world."""
    conversation = current_run.get().conversation_id
    with (HERE / "effects").open("a") as effects:
        effects.write(f"{conversation} {n}\\n")
    await wait_while_held(f"{conversation}-in-step-{n}")
    return f"step {n} done"


async def instructions(context, agent):
    # asked for before every model call
    conversation = current_run.get().conversation_id
    done = effects_of(conversation)
    await wait_while_held(f"{conversation}-after-{done}-steps")
    return "You take steps."


def effects_of(conversation):
    path = HERE / "effects"
    return path.read_text().split().count(conversation) if path.exists() else 0


agent = Agent(name="Stepper", instructions=instructions, tools=[step])

while not (HERE / os.environ["LET_GO"]).exists():
    time.sleep(0.01)
'''

THREE_STEPS = 'chain step {"n": 1} ; step {"n": 2} ; step {"n": 3}'


@dataclass
class World:
    """What the tests share."""

    folder: Path
    processes: Processes
    client: GatewayClient
    stub: StubModel
    gate: asyncio.Event
    """While it is not set, the model stops after three tokens of its answer to `gated …`."""

    workers: list[Process] = field(default_factory=list)

    async def let_go(self, number: int) -> Process:
        """Let this worker receive."""
        (self.folder / f"go-{number}").touch()
        return await self.workers[number].ready()

    def hold(self, place: str) -> None:
        """Have runs stop at this place of the agent."""
        (self.folder / f"hold-{place}").touch()

    def unhold(self) -> None:
        """Have no run stop any more."""
        for path in self.folder.glob("hold-*"):
            path.unlink()

    async def reached(self, place: str) -> None:
        """Return when a run stands at this place."""
        await wait_until((self.folder / f"at-{place}").exists, timeout_s=20, description=f"a run at {place}")

    def effects(self, conversation_id: str) -> list[int]:
        """The steps taken in this conversation, in order."""
        lines = (self.folder / "effects").read_text().splitlines()
        return [int(n) for conversation, n in map(str.split, lines) if conversation == conversation_id]

    def asked(self, words: str) -> list[StubRequest]:
        """The requests to the model whose last user message is this."""
        requests = [StubRequest(request["wire"], request["body"]) for request in self.stub.requests]
        return [request for request in requests if request.last_user == words]


@pytest.fixture(scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A gateway, and workers that are let go one by one."""
    folder = tmp_path_factory.mktemp("crash")
    (folder / "stepper.py").write_text(MY_APP, encoding="utf-8")
    gate = asyncio.Event()

    def script(request: StubRequest) -> Reply:
        if request.last_user.startswith("gated"):
            return Reply("one two three four five", gate=gate, gate_after=3)
        return obey(request)

    async with running_stub(script) as stub:
        with running_server(BINARIES[REDIS_NAMES[0]]) as server:
            environment = {"REDIS_URL": server.url, "OPENAI_BASE_URL": stub.base_url, "BUS_LEASE_SECONDS": "1"}
            with starting(folder, **environment) as processes:
                gateway = processes.gateway()
                workers = [
                    processes.worker("stepper:agent", LET_GO=f"go-{number}", **more)
                    for number, more in enumerate(({}, {}, {"WORKER_DRAIN_SECONDS": "0.2"}, {"BUS_MAX_ATTEMPTS": "1"}))
                ]
                async with GatewayClient((await gateway.ready()).base_url) as client:
                    yield World(folder, processes, client, stub, gate, workers)


@dataclass
class Killed:
    """The logs of the conversations whose worker was killed."""

    world: World
    events: dict[str, list[Event]]
    asked_before: dict[str, int]
    """How often the model was asked for each message before the kill."""


CRASHES = {
    "streaming": "gated streaming",
    "tool-runs": f"{THREE_STEPS} ; ",
    "between": THREE_STEPS,
    "waiting": "count 2",
}


@pytest.fixture(scope="module")
async def killed(world: World) -> Killed:
    """One worker is killed with three conversations in three states; another one finishes them all."""
    world.gate.clear()
    world.hold("tool-runs-in-step-1")
    world.hold("between-after-2-steps")
    first = await world.let_go(0)
    sent: dict[str, Sent] = {}
    for conversation_id in ("streaming", "tool-runs", "between"):
        sent[conversation_id] = await tell(world.client, conversation_id, CRASHES[conversation_id])
    sent["waiting"] = await tell(world.client, "streaming", CRASHES["waiting"])  # behind the first in its conversation
    async with asyncio.timeout(20):
        async for event in world.client.follow("streaming"):
            if event.data["event"] == "token":
                break
    await world.reached("tool-runs-in-step-1")
    await world.reached("between-after-2-steps")
    asked_before = {name: len(world.asked(words)) for name, words in CRASHES.items()}

    first.kill()
    world.unhold()
    world.gate.set()
    await world.let_go(1)
    events = {name: await events_until(world.client, sent[name]) for name in sent}
    return Killed(world, events, asked_before)


def runs(events: list[Event], message_id: str) -> list[tuple[int, int]]:
    """Attempt and resumed turn of each start of a message."""
    started = of_kind(events, "run_started")
    assert len({event["run_id"] for event in started if event["message_id"] == message_id}) == 1
    return [(event["attempt"], event["resumed_turn"]) for event in started if event["message_id"] == message_id]


def the_end(events: list[Event]) -> Event:
    """The one terminal event of the message that came first."""
    message_id = events[0]["message_id"]
    [end] = [e for e in of_kind(events, "output", "error", "cancelled") if e["message_id"] == message_id]
    return end


async def whole_log(client: GatewayClient, conversation_id: str) -> list[Event]:
    """Everything in the log by now: to the end of the newest message."""
    async with asyncio.timeout(10):
        return [event.data async for event in client.follow(conversation_id, until="done")]


async def test_killed_while_the_model_talks_the_turn_is_asked_again(killed: Killed) -> None:
    events = killed.events["streaming"]

    assert runs(events, events[0]["message_id"]) == [(1, 0), (2, 0)]
    assert the_end(events)["text"] == "one two three four five"
    again = events[[e["event"] for e in events].index("run_started", 3) :]
    said = [e for e in of_kind(again, "token") if e["message_id"] == events[0]["message_id"]]
    assert "".join(token["text"] for token in said) == "one two three four five"
    assert said[0]["index"] == 0
    assert (killed.asked_before["streaming"], len(killed.world.asked(CRASHES["streaming"]))) == (1, 2)


@pytest.mark.promise("M16")
async def test_killed_while_a_tool_runs_its_outcome_is_unknown_and_it_is_not_run_again(killed: Killed) -> None:
    events = killed.events["tool-runs"]

    assert runs(events, events[0]["message_id"]) == [(1, 0), (2, 1)]
    steps = [(step["args"]["n"], step["status"]) for step in of_kind(events, "tool_step")]
    assert steps == [(1, "start"), (1, "unknown"), (2, "start"), (2, "success"), (3, "start"), (3, "success")]
    start, unknown, *_ = of_kind(events, "tool_step")
    assert start["tool_call_id"] == unknown["tool_call_id"]
    assert killed.world.effects("tool-runs") == [1, 2, 3]
    assert the_end(events)["text"] == "done: [outcome unknown] | step 2 done | step 3 done"
    assert the_end(events)["usage"]["requests"] == 4
    # the first turn was journalled: it was paid once
    assert (killed.asked_before["tool-runs"], len(killed.world.asked(CRASHES["tool-runs"]))) == (1, 4)


@pytest.mark.promise("run.resume")
async def test_killed_between_two_turns_nothing_is_done_or_asked_twice(killed: Killed) -> None:
    events = killed.events["between"]

    assert runs(events, events[0]["message_id"]) == [(1, 0), (2, 2)]
    steps = [(step["args"]["n"], step["status"]) for step in of_kind(events, "tool_step")]
    assert steps == [(n, status) for n in (1, 2, 3) for status in ("start", "success")]
    assert killed.world.effects("between") == [1, 2, 3]
    assert the_end(events)["text"] == "done: step 1 done | step 2 done | step 3 done"
    assert the_end(events)["usage"]["requests"] == 4
    assert (killed.asked_before["between"], len(killed.world.asked(CRASHES["between"]))) == (2, 4)


async def test_what_waited_behind_a_killed_run_is_answered_after_it(killed: Killed) -> None:
    events = killed.events["waiting"]

    assert the_end(events)["text"] == "t0 t1"
    log = await whole_log(killed.world.client, "streaming")
    assert [end["text"] for end in of_kind(log, "output")] == ["one two three four five", "t0 t1"]


@pytest.mark.promise("run.once")
async def test_every_message_has_one_terminal_event(killed: Killed) -> None:
    for conversation_id in ("streaming", "tool-runs", "between"):
        log = await whole_log(killed.world.client, conversation_id)

        asked = [event["message_id"] for event in of_kind(log, "user_message")]
        assert [end["message_id"] for end in of_kind(log, "output", "error", "cancelled")] == asked


async def test_a_model_error_that_passes_is_tried_again_by_the_same_or_another_worker(killed: Killed) -> None:
    world = killed.world
    events = await events_until(world.client, await tell(world.client, "flaky", "flaky 1 500"))

    assert runs(events, events[0]["message_id"]) == [(1, 0), (2, 0)]
    assert the_end(events)["text"] == "recovered"
    assert len(world.asked("flaky 1 500")) == 2


async def test_the_history_holds_what_a_killed_run_finished(killed: Killed) -> None:
    world = killed.world
    await events_until(world.client, await tell(world.client, "tool-runs", "and now"))

    [request] = world.asked("and now")
    assert list(request.tool_outputs.values()) == ["[outcome unknown]", "step 2 done", "step 3 done"]
    assert request.user_texts == [CRASHES["tool-runs"], "and now"]


@pytest.mark.promise("M17")
async def test_sigterm_finishes_the_run_in_flight_and_exits_0(killed: Killed) -> None:
    world, worker = killed.world, killed.world.workers[1]
    world.gate.clear()
    sent = await tell(world.client, "drained", "gated drained")
    await wait_until(lambda: len(world.asked("gated drained")) == 1, description="the model is asked")

    worker.signal(signal.SIGTERM)
    await worker.says("finishing 1 runs")
    world.gate.set()
    events = await events_until(world.client, sent)

    assert await worker.ended() == 0
    assert runs(events, sent.message_id) == [(1, 0)]
    assert the_end(events)["text"] == "one two three four five"
    assert len(world.asked("gated drained")) == 1


@pytest.mark.promise("M17")
async def test_a_run_that_takes_longer_than_the_drain_is_handed_back_and_not_counted(killed: Killed) -> None:
    world = killed.world
    world.gate.clear()
    if world.workers[1].exit_code is None:  # when this test runs without the one before
        await world.workers[1].stopped()
    worker = await world.let_go(2)
    sent = await tell(world.client, "handed-back", "gated handed back")
    await wait_until(lambda: len(world.asked("gated handed back")) == 1, description="the model is asked")
    hung_up = world.stub.hung_up

    assert await worker.stopped() == 0
    assert "handing back 1 runs" in worker.said
    await wait_until(lambda: world.stub.hung_up == hung_up + 1, description="the model's stream is closed")
    world.gate.set()
    await world.let_go(3)  # with BUS_MAX_ATTEMPTS=1: it would give up what had been delivered and counted once
    events = await events_until(world.client, sent)

    assert runs(events, sent.message_id) == [(1, 0), (2, 0)]
    assert the_end(events)["text"] == "one two three four five"


async def test_no_process_has_shown_a_traceback(killed: Killed) -> None:
    for worker in killed.world.workers:
        assert "Traceback" not in worker.said
