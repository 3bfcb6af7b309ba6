"""A stop always stops: what runs, what waits, what is about to be tried again; and nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from magent2.bus import topics
from magent2.errors import Rejected, RunFailed
from magent2.models.envelope import MessageEnvelope
from magent2.runner.interface import Turn
from magent2.store.history import ModelTurn
from magent2.worker import retry
from tests.support.wait import wait_until
from tests.worker.test_worker import AGENT, House, say, scripted, terminal

pytestmark = pytest.mark.anyio


@pytest.fixture
def house() -> House:
    return House()


async def cancel(house: House, *, agent: str = AGENT, conversation_id: str = "c1", **metadata: Any) -> str:
    envelope = MessageEnvelope(
        conversation_id=conversation_id,
        sender="user:eve",
        recipient=f"agent:{agent}",
        type="control",
        content="cancel",
        metadata=metadata,
    )
    await house.conversations.send(envelope)
    return envelope.id


class Endless:
    """A script that runs until it is stopped; later messages are answered at once."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.stopped = asyncio.Event()

    async def __call__(self, turn: Turn) -> str:
        if turn.envelope.content != "endless":
            return "done"
        self.started.set()
        turn.sink.token("partial", 0)
        await turn.record(ModelTurn(turn=0, agent=AGENT, items=[{"role": "assistant", "content": "partial"}]))
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped.set()
        raise AssertionError


@pytest.mark.promise("run.cancel")
async def test_a_cancel_stops_what_runs(house: House) -> None:
    script = Endless()
    runner = scripted(script)
    async with house.working(runner):
        message_id = await house.send("endless")
        await script.started.wait()
        control_id = await cancel(house)
        events = await house.until(message_id)
        await wait_until(house.idle, description="the job is acknowledged")

        await house.until(await house.send("next"))

    assert script.stopped.is_set()
    assert (events[-1]["event"], events[-1]["reason"]) == ("cancelled", "cancelled by user:eve")
    controls = [(event["control_id"], event["state"]) for event in events if event["event"] == "control"]
    assert controls == [(control_id, "accepted"), (control_id, "applied")]
    assert [item["content"] for item in runner.turns[1].history] == ["endless", "partial"]


async def test_a_cancel_by_run_id_means_that_run_only(house: House) -> None:
    script = Endless()
    async with house.working(scripted(script)):
        message_id = await house.send("endless")
        await script.started.wait()
        await wait_until(lambda: _begun(house), description="its start is in the log")
        await cancel(house, run_id="another")
        [run_id] = {event["run_id"] for event in await house.log() if event["event"] == "run_started"}
        assert not script.stopped.is_set()
        await cancel(house, run_id=run_id)
        events = await house.until(message_id)

    assert events[-1]["event"] == "cancelled"


@pytest.mark.promise("run.cancel")
async def test_a_cancel_stops_what_waits_and_not_what_comes_later(house: House) -> None:
    script = Endless()
    runner = scripted(script)
    async with house.working(runner):
        first = await house.send("endless")
        await script.started.wait()
        second = await house.send("waiting")
        await cancel(house)
        third = await house.send("later")
        await house.until(third)
        events = await house.log()

    assert [(event["message_id"], event["event"]) for event in terminal(events)] == [
        (first, "cancelled"),
        (second, "cancelled"),
        (third, "output"),
    ]
    assert [turn.envelope.content for turn in runner.turns] == ["endless", "later"]


async def test_a_cancel_before_any_worker_is_there_is_kept(house: House) -> None:
    message_id = await house.send()
    await cancel(house)
    runner = scripted(say)
    async with house.working(runner):
        events = await house.until(message_id)

    assert events[-1]["event"] == "cancelled"
    assert runner.turns == []


@pytest.mark.promise("run.cancel")
async def test_a_cancel_reaches_what_waits_to_be_tried_again(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 60.0)

    async def broken(turn: Turn) -> str:
        raise RunFailed("model_error", "down", retryable=True)

    runner = scripted(broken)
    async with house.working(runner):
        message_id = await house.send()
        await wait_until(lambda: _parked(house), description="it waits for its next try")
        await cancel(house)
        events = await house.until(message_id)

    assert events[-1]["event"] == "cancelled"
    assert len(runner.turns) == 1


async def _begun(house: House) -> bool:
    return any(event["event"] == "run_started" for event in await house.log())


async def _parked(house: House) -> bool:
    return (await house.bus.depth(topics.queue(AGENT))).parked == 1


async def test_a_cancel_for_another_agent_or_conversation_stops_nothing_here(house: House) -> None:
    go = asyncio.Event()

    async def hold(turn: Turn) -> str:
        await go.wait()
        return "done"

    async with house.working(scripted(hold)):
        message_id = await house.send()
        await cancel(house, agent="Other")
        await cancel(house, conversation_id="c2")
        go.set()
        events = await house.until(message_id)

    assert events[-1]["event"] == "output"


async def test_a_cancel_with_nothing_to_do_stays_accepted(house: House) -> None:
    await cancel(house)
    async with house.working(scripted(say)):
        events = await house.until(await house.send())

    assert [event["state"] for event in events if event["event"] == "control"] == ["accepted"]
    assert events[-1]["event"] == "output"


async def test_the_same_cancel_again_is_a_duplicate(house: House) -> None:
    envelope = MessageEnvelope(
        conversation_id="c1", sender="user:eve", recipient=f"agent:{AGENT}", type="control", content="cancel"
    )
    first = await house.conversations.send(envelope)
    again = await house.conversations.send(envelope)

    assert (first.duplicate, again.duplicate, again.cursor) == (False, True, first.cursor)
    assert len(await house.bus.read(topics.commands("c1"))) == 1


async def test_interrupt_cancels_what_runs_and_waits_and_then_runs(house: House) -> None:
    script = Endless()
    async with house.working(scripted(script)):
        first = await house.send("endless")
        await script.started.wait()
        second = await house.send("waiting")
        third = await house.send("urgent", metadata={"on_busy": "interrupt"})
        events = await house.until(third)

    assert [(event["message_id"], event["event"]) for event in terminal(events)] == [
        (first, "cancelled"),
        (second, "cancelled"),
        (third, "output"),
    ]
    assert terminal(events)[0]["reason"] == "interrupted by a newer message"


@pytest.mark.parametrize("content", ["approve", "reject"])
async def test_what_is_not_there_yet_is_refused_and_not_half_done(house: House, content: Any) -> None:
    with pytest.raises(Rejected):
        await house.conversations.send(
            MessageEnvelope(
                conversation_id="c1", sender="user:eve", recipient=f"agent:{AGENT}", type="control", content=content
            )
        )
    assert await house.log() == []
