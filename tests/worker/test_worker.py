"""What a worker does with a message: one terminal event, whatever happens on the way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from magent2 import job
from magent2.bus import topics
from magent2.bus.interface import BusConfig, Dedup
from magent2.bus.memory import MemoryBus
from magent2.conversations import Conversations
from magent2.errors import LeaseLost, RunFailed, Unavailable
from magent2.models.envelope import MessageEnvelope
from magent2.models.run import current_run
from magent2.runner.interface import Runner, Turn
from magent2.settings import WorkerConfig
from magent2.store.history import ModelTurn
from magent2.store.memory import MemoryStore
from magent2.testing import ScriptedRunner
from magent2.worker import retry
from magent2.worker import worker as worker_module
from magent2.worker.worker import Worker
from tests.support.wait import wait_until

pytestmark = pytest.mark.anyio

AGENT = "DevAgent"


class House:
    """A bus, a store and what is around them, without HTTP."""

    def __init__(self, bus: MemoryBus | None = None) -> None:
        self.bus = bus or MemoryBus(BusConfig(lease_s=0.05))
        self.store = MemoryStore()
        self.conversations = Conversations(self.bus)

    @asynccontextmanager
    async def working(self, runner: Runner, **config: Any) -> AsyncIterator[Worker]:
        worker = Worker(
            self.conversations, self.store, runner, WorkerConfig(**{"agent": AGENT, "drain_s": 0, **config})
        )
        task = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            worker.stop()
            async with asyncio.timeout(10):
                await task

    async def send(self, text: str = "hello", conversation_id: str = "c1", **more: Any) -> str:
        envelope = MessageEnvelope(
            conversation_id=conversation_id, sender="user:local", recipient=f"agent:{AGENT}", content=text, **more
        )
        await self.conversations.send(envelope)
        return envelope.id

    async def until(self, message_id: str, conversation_id: str = "c1") -> list[dict[str, Any]]:
        """All events up to the terminal one of a message."""
        seen: list[dict[str, Any]] = []
        async with asyncio.timeout(10):
            async for batch in self.conversations.follow(conversation_id, until=message_id):
                seen += [json.loads(frame.data) for frame in batch]
        return seen

    async def log(self, conversation_id: str = "c1") -> list[dict[str, Any]]:
        return [json.loads(entry.data) for entry in await self.bus.read(topics.log(conversation_id), limit=10_000)]

    async def dead(self) -> list[dict[str, Any]]:
        return [json.loads(entry.data) for entry in await self.bus.read(topics.dead_letters(AGENT))]

    async def idle(self) -> bool:
        depth = await self.bus.depth(topics.queue(AGENT))
        return (depth.waiting, depth.in_flight, depth.parked) == (0, 0, 0)


@pytest.fixture
def house() -> House:
    return House()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come after milliseconds."""
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.002)
    monkeypatch.setattr(job, "_RETRY_S", (0.002,))


def scripted(script: Callable[[Turn], Awaitable[str]]) -> ScriptedRunner:
    return ScriptedRunner(script)


async def say(turn: Turn) -> str:
    for word in ("hello", " ", "world"):
        turn.sink.token(word, 0)
    return "hello world"


def terminal(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] in ("output", "error", "cancelled")]


async def test_a_message_is_answered_once_and_acknowledged(house: House) -> None:
    async with house.working(scripted(say)):
        events = await house.until(await house.send())
        await wait_until(house.idle, description="the job is acknowledged")

    assert [event["event"] for event in events] == ["user_message", "run_started", "token", "output"]
    assert (events[1]["attempt"], events[1]["resumed_turn"]) == (1, 0)
    assert events[-1]["text"] == "hello world"


async def test_tokens_that_wait_for_an_append_leave_merged(house: House) -> None:
    async def chatter(turn: Turn) -> str:
        for n in range(1000):
            turn.sink.token(f"{n} ", n // 500)
        return ""

    async with house.working(scripted(chatter)):
        events = await house.until(await house.send())

    tokens = [event for event in events if event["event"] == "token"]
    assert [(token["index"], token["turn"]) for token in tokens] == [(0, 0), (1, 1)]
    assert "".join(token["text"] for token in tokens) == "".join(f"{n} " for n in range(1000))


async def test_the_next_message_sees_what_was_committed(house: House) -> None:
    runner = scripted(say)
    async with house.working(runner):
        await house.until(await house.send("first"))
        await house.until(await house.send("second"))

    assert list(runner.turns[0].history) == []
    assert [item["content"] for item in runner.turns[1].history] == ["first", "hello world"]


@pytest.mark.promise("M2")
async def test_conversations_run_side_by_side_up_to_the_bound_and_one_at_a_time_each(house: House) -> None:
    running: list[str] = []
    most = 0
    go = asyncio.Event()

    async def hold(turn: Turn) -> str:
        nonlocal most
        assert turn.envelope.conversation_id not in running
        running.append(turn.envelope.conversation_id)
        most = max(most, len(running))
        await go.wait()
        running.remove(turn.envelope.conversation_id)
        return ""

    async with house.working(scripted(hold), concurrency=3):
        ids = [(await house.send(f"{n}", f"c{n % 5}"), f"c{n % 5}") for n in range(10)]
        await wait_until(lambda: len(running) == 3, description="three run")
        go.set()
        for message_id, conversation_id in ids:
            await house.until(message_id, conversation_id)

    assert most == 3


async def test_the_run_context_is_set_while_it_runs(house: House) -> None:
    async def look(turn: Turn) -> str:
        context = current_run.get()
        assert context is not None
        return f"{context.agent} {context.conversation_id} {context.message_id} {context.hops}"

    async with house.working(scripted(look)):
        message_id = await house.send()
        events = await house.until(message_id)

    assert events[-1]["text"] == f"{AGENT} c1 {message_id} 0"


async def test_a_retryable_error_is_tried_again_after_a_word_in_the_log(house: House) -> None:
    async def flaky(turn: Turn) -> str:
        if len(runner.turns) < 3:
            turn.sink.token("half", 0)
            raise RunFailed("model_error", "overloaded", retryable=True)
        return "whole"

    runner = scripted(flaky)
    async with house.working(runner):
        events = await house.until(await house.send())

    started = [event for event in events if event["event"] == "run_started"]
    assert [event["attempt"] for event in started] == [1, 2, 3]
    assert len({event["run_id"] for event in started}) == 1
    assert [event["level"] for event in events if event["event"] == "log"] == ["warning", "warning"]
    assert [event["text"] for event in terminal(events)] == ["whole"]


async def test_an_error_that_cannot_be_retried_ends_the_message(house: House) -> None:
    async def refuse(turn: Turn) -> str:
        raise RunFailed("model_refusal", "no")

    async with house.working(scripted(refuse)):
        events = await house.until(await house.send())

    assert (events[-1]["code"], events[-1]["retryable"], events[-1]["message"]) == ("model_refusal", False, "no")
    assert await house.dead() == []


async def test_a_retryable_error_that_outlives_its_attempts_is_a_dead_letter(house: House) -> None:
    async def broken(turn: Turn) -> str:
        raise RunFailed("model_error", "down", retryable=True)

    runner = scripted(broken)
    async with house.working(runner, max_attempts=3):
        message_id = await house.send()
        events = await house.until(message_id)
        await wait_until(house.idle, description="the job is acknowledged")

    assert len(runner.turns) == 3
    assert (events[-1]["code"], events[-1]["message"]) == ("attempts_exhausted", "model_error: down")
    [letter] = await house.dead()
    assert (letter["work"]["envelope"]["id"], letter["reason"]) == (message_id, "model_error: down")


async def test_what_the_agent_raises_is_an_error_without_its_text(house: House) -> None:
    async def defect(turn: Turn) -> str:
        raise ValueError("sk-secret")

    async with house.working(scripted(defect)):
        events = await house.until(await house.send())

    assert events[-1]["code"] == "agent_error"
    assert "sk-secret" not in json.dumps(events)


async def test_an_error_leaves_the_message_in_the_history(house: House) -> None:
    async def once(turn: Turn) -> str:
        if len(runner.turns) == 1:
            raise RunFailed("max_turns", "enough")
        return "fine"

    runner = scripted(once)
    async with house.working(runner):
        await house.until(await house.send("first"))
        await house.until(await house.send("second"))

    assert [item["content"] for item in runner.turns[1].history] == ["first"]


@pytest.mark.promise("M8")
async def test_a_message_whose_workers_died_each_time_ends_in_the_dead_letters(house: House) -> None:
    message_id = await house.send()
    await house.send("next")
    for _ in range(5):
        async with house.bus.consume(topics.queue(AGENT), renew=False) as dying:
            await dying.receive()
            # it neither settles nor renews
            await wait_until(lambda: _ready_again(house), description="the lease lapses")
    runner = scripted(say)
    async with house.working(runner):
        events = await house.until(message_id)
        await wait_until(house.idle, description="the next message is answered")

    assert events[-1]["code"] == "attempts_exhausted"
    assert [turn.envelope.content for turn in runner.turns] == ["next"]
    assert len(await house.dead()) == 1


async def _ready_again(house: House) -> bool:
    return (await house.bus.depth(topics.queue(AGENT))).in_flight == 0


async def test_progress_starts_the_count_of_strikes_anew(house: House) -> None:
    async def progress(turn: Turn) -> str:
        number = len(runner.turns)
        if number <= 6:
            await turn.record(ModelTurn(turn=number, agent=AGENT, items=[]))
            raise RunFailed("model_error", "down", retryable=True)
        return f"after {len(turn.journal)} turns"

    runner = scripted(progress)
    async with house.working(runner, max_attempts=2):
        events = await house.until(await house.send())

    assert events[-1]["text"] == "after 6 turns"
    assert [event["resumed_turn"] for event in events if event["event"] == "run_started"] == list(range(7))


async def test_the_journal_is_gone_after_the_commit(house: House) -> None:
    async def journal(turn: Turn) -> str:
        await turn.record(ModelTurn(turn=0, agent=AGENT, items=[]))
        return ""

    async with house.working(scripted(journal)):
        message_id = await house.send()
        await house.until(message_id)
        await wait_until(house.idle, description="the job is acknowledged")

    assert await house.store.entries(f"{AGENT}:c1", f"journal:{message_id}:0") == []


@pytest.mark.promise("run.once")
async def test_a_redelivery_that_finds_a_commit_only_finishes_it(house: House) -> None:
    runner = scripted(say)
    async with house.working(runner):
        message_id = await house.send()
        await house.until(message_id)
        work = (await _work_of(house, message_id)).encode()
        # the same job once more, as after a crash between the terminal event and the acknowledgement
        await house.bus.enqueue(topics.queue(AGENT), "c1", work)
        await wait_until(house.idle, description="the second delivery is acknowledged")

    assert len(runner.turns) == 1
    assert len(terminal(await house.log())) == 1


async def _work_of(house: House, message_id: str) -> str:
    from magent2.models.envelope import Work

    envelope = MessageEnvelope(
        id=message_id, conversation_id="c1", sender="user:local", recipient=f"agent:{AGENT}", content="hello"
    )
    return Work(envelope=envelope, digest=envelope.digest(), trace_id="t").model_dump_json()


async def test_a_job_whose_id_belongs_to_another_message_is_dropped_unrun(house: House) -> None:
    await house.bus.append(topics.log("c1"), b'{"event":"log"}', dedup=Dedup(f"msg:agent:{AGENT}:m1", "another digest"))
    await house.bus.enqueue(topics.queue(AGENT), "c1", (await _work_of(house, "m1")).encode())
    runner = scripted(say)
    async with house.working(runner):
        await wait_until(house.idle, description="the job is acknowledged")

    assert runner.turns == []
    assert terminal(await house.log()) == []


async def test_the_worker_writes_the_message_if_its_sender_died_after_the_enqueue(house: House) -> None:
    await house.bus.enqueue(topics.queue(AGENT), "c1", (await _work_of(house, "m1")).encode())
    async with house.working(scripted(say)):
        events = await house.until("m1")

    assert [event["event"] for event in events] == ["user_message", "run_started", "token", "output"]


async def test_bytes_that_are_no_message_are_a_dead_letter_and_an_error_in_their_conversation(house: House) -> None:
    await house.bus.enqueue(topics.queue(AGENT), "c1", b"\xff not json")
    async with house.working(scripted(say)):
        await wait_until(house.idle, description="it is acknowledged")
        events = await house.until(await house.send())

    assert events[0]["code"] == "undecodable"
    assert events[-1]["text"] == "hello world"
    assert [letter["reason"] for letter in await house.dead()] == ["undecodable"]


@pytest.mark.promise("M4")
async def test_a_worker_that_lost_its_lease_stops_the_run_and_writes_nothing_more(house: House) -> None:
    started, stopped = asyncio.Event(), asyncio.Event()

    async def long(turn: Turn) -> str:
        if len(runner.turns) > 1:
            return "second"
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
            turn.sink.token("too late", 0)
        return "first"

    runner = scripted(long)
    async with house.working(runner):
        message_id = await house.send()
        await started.wait()
        # the bus gives the job to somebody else, as it does when a lease lapses
        q = house.bus._queues[topics.queue(AGENT)]
        q.flight["c1"].deadline = 0
        house.bus._advance(q)
        q.bell.ring()
        async with asyncio.timeout(5):
            await stopped.wait()
        events = await house.until(message_id)

    assert [event["text"] for event in events if event["event"] in ("token", "output")] == ["second"]


async def test_stop_finishes_what_runs_within_the_drain(house: House) -> None:
    started, go = asyncio.Event(), asyncio.Event()

    async def slow(turn: Turn) -> str:
        started.set()
        await go.wait()
        return "finished"

    async with house.working(scripted(slow), drain_s=10) as worker:
        message_id = await house.send()
        await started.wait()
        worker.stop()
        await house.send("later", "c2")
        go.set()
        events = await house.until(message_id)

    assert events[-1]["text"] == "finished"
    assert (await house.bus.depth(topics.queue(AGENT))).waiting == 1


async def test_stop_hands_back_what_does_not_finish_and_counts_nothing(house: House) -> None:
    started = asyncio.Event()

    async def endless(turn: Turn) -> str:
        started.set()
        if len(runner.turns) == 1:
            await asyncio.Event().wait()
        return "by another worker"

    runner = scripted(endless)
    async with house.working(runner, drain_s=0):
        message_id = await house.send()
        await started.wait()
    async with house.bus.consume(topics.queue(AGENT)) as peek:
        [delivery] = await peek.receive()
        assert (delivery.attempt, delivery.starts) == (1, 2)
        await delivery.release()
    async with house.working(runner):
        events = await house.until(message_id)

    assert events[-1]["text"] == "by another worker"
    assert [event["attempt"] for event in events if event["event"] == "run_started"] == [1, 3]


class MoodyBus(MemoryBus):
    """A bus that is away for a while: every append fails, half of them after they were made."""

    away = 0

    async def append(self, topic: str, *data: bytes, **more: Any) -> Any:
        if self.away > 0:
            self.away -= 1
            if self.away % 2:
                await super().append(topic, *data, **more)
            raise Unavailable
        return await super().append(topic, *data, **more)


@pytest.mark.promise("run.outage")
async def test_a_run_outlives_an_outage_and_writes_nothing_twice() -> None:
    house = House(bus := MoodyBus())

    async def chat(turn: Turn) -> str:
        for n in range(5):
            bus.away = 3
            turn.sink.token(f"{n} ", 0)
            await turn.sink.flush()
        bus.away = 4
        return "0 1 2 3 4 "

    async with house.working(scripted(chat)):
        events = await house.until(await house.send())

    assert "".join(event["text"] for event in events if event["event"] == "token") == "0 1 2 3 4 "
    assert len(terminal(events)) == 1


@pytest.mark.promise("M4")
async def test_a_stale_journal_write_is_refused(house: House) -> None:
    go, lost = asyncio.Event(), asyncio.Event()

    async def zombie(turn: Turn) -> str:
        if len(runner.turns) > 1:
            return f"{len(turn.journal)} entries"
        await go.wait()
        try:
            await turn.record(ModelTurn(turn=0, agent=AGENT, items=[]))
        except LeaseLost:
            lost.set()
            raise
        return "zombie"

    runner = scripted(zombie)
    async with house.working(runner):
        message_id = await house.send()
        await wait_until(lambda: len(runner.turns) == 1, description="it runs")
        # a newer delivery raised the fence meanwhile
        await house.store.delete(f"{AGENT}:c1", "guard", token="9" * 20)
        go.set()
        async with asyncio.timeout(5):
            await lost.wait()

    assert terminal(await house.log()) == []
    assert message_id


async def test_a_word_that_is_no_text_breaks_neither_its_run_nor_the_others(house: House) -> None:
    async def halves(turn: Turn) -> str:
        turn.sink.token("\ud83d", 0)
        turn.sink.token("\ude00 \udfff", 0)
        await turn.sink.flush()
        return "said"

    async with house.working(scripted(halves)):
        events = await house.until(await house.send())

    assert [event["text"] for event in events if event["event"] == "token"] == ["\U0001f600 \ufffd"]
    assert events[-1]["text"] == "said"


async def test_an_event_that_cannot_be_written_fails_its_own_run_only(house: House) -> None:
    async def rude(turn: Turn) -> str:
        if turn.envelope.content == "rude":
            turn.sink.token(b"no text at all", 0)  # type: ignore[arg-type]
            await turn.sink.flush()
        return "fine"

    async with house.working(scripted(rude)):
        bad, good = await house.send("rude", "c1"), await house.send("polite", "c2")
        answered = await house.until(good, "c2")
        failed = await house.until(bad, "c1")

    assert answered[-1]["text"] == "fine"
    assert failed[-1]["code"] == "agent_error"


async def test_a_job_that_the_store_alone_calls_stale_does_not_block_its_conversation(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_AWAY_S", 0.001)
    await house.store.delete(f"{AGENT}:c1", "guard", token="9" * 20)
    async with house.working(scripted(say), max_attempts=2):
        await house.send()
        await wait_until(house.idle, description="it is given up")

    assert [event["code"] for event in terminal(await house.log())] == ["attempts_exhausted"]
    assert len(await house.dead()) == 1


async def test_a_history_that_cannot_be_read_ends_in_the_dead_letters(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_AWAY_S", 0.001)
    await house.store.add(f"{AGENT}:c1", "commits", "x", b"not a commit")
    async with house.working(scripted(say), max_attempts=2):
        message_id = await house.send()
        events = await house.until(message_id)
        other = await house.until(await house.send("other", "c2"), "c2")

    assert events[-1]["code"] == "attempts_exhausted"
    assert [letter["work"]["envelope"]["id"] for letter in await house.dead()] == [message_id]
    assert other[-1]["text"] == "hello world"


async def test_an_agent_that_cancels_itself_is_an_error_and_no_stop(house: House) -> None:
    async def giving_up(turn: Turn) -> str:
        raise asyncio.CancelledError

    runner = scripted(giving_up)
    async with house.working(runner):
        events = await house.until(await house.send())

    assert (events[-1]["event"], events[-1]["code"]) == ("error", "agent_error")
    assert len(runner.turns) == 1


async def test_what_a_run_says_behind_its_end_is_not_in_the_log(house: House) -> None:
    late: list[Turn] = []

    async def hasty(turn: Turn) -> str:
        late.append(turn)
        return "done"

    async with house.working(scripted(hasty)):
        await house.until(await house.send())
        late[0].sink.token("too late", 0)
        await house.until(await house.send("next", "c2"), "c2")

    assert (await house.log())[-1]["event"] == "output"


async def test_what_a_guardrail_stopped_is_not_shown_to_the_model_again(house: House) -> None:
    async def guarded(turn: Turn) -> str:
        if turn.envelope.content == "forbidden":
            raise RunFailed("guardrail", "stopped")
        return "fine"

    runner = scripted(guarded)
    async with house.working(runner):
        await house.until(await house.send("forbidden"))
        await house.until(await house.send("allowed"))

    assert list(runner.turns[1].history) == []


async def test_an_id_used_again_with_other_content_after_the_window_is_another_message() -> None:
    house = House(MemoryBus(BusConfig(dedup_ttl_s=0.05)))
    runner = scripted(say)
    async with house.working(runner):
        await house.until(await house.send("first", id="m1"))
        await wait_until(lambda: _forgotten(house), description="the id is forgotten")
        await house.send("second", id="m1")
        await wait_until(lambda: len(runner.turns) == 2, description="it is run")

    assert [turn.envelope.content for turn in runner.turns] == ["first", "second"]


async def _forgotten(house: House) -> bool:
    return await house.bus.find(topics.log("c1"), f"msg:agent:{AGENT}:m1") is None


async def test_after_an_outage_of_the_model_jobs_still_run_side_by_side(house: House) -> None:
    running = 0
    most = 0
    together = asyncio.Event()

    async def recovering(turn: Turn) -> str:
        nonlocal running, most
        tries[turn.envelope.conversation_id] = tries.get(turn.envelope.conversation_id, 0) + 1
        if tries[turn.envelope.conversation_id] < 4:
            raise RunFailed("model_error", "down", retryable=True)
        running += 1
        most = max(most, running)
        if running == 5:
            together.set()
        await together.wait()
        return "up again"

    tries: dict[str, int] = {}
    async with house.working(scripted(recovering)):
        ids = [await house.send(f"{n}", f"c{n}") for n in range(5)]
        for n, message_id in enumerate(ids):
            await house.until(message_id, f"c{n}")

    assert most == 5


async def test_a_job_is_handed_back_only_when_its_run_has_ended(house: House) -> None:
    started, told, let_go = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def stubborn(turn: Turn) -> str:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            told.set()
            await let_go.wait()
        raise AssertionError

    leaving = house.working(scripted(stubborn), drain_s=0)
    worker = await leaving.__aenter__()
    await house.send()
    await started.wait()
    worker.stop()
    await told.wait()
    in_flight = (await house.bus.depth(topics.queue(AGENT))).in_flight
    let_go.set()
    await leaving.__aexit__(None, None, None)

    depth = await house.bus.depth(topics.queue(AGENT))
    assert (in_flight, depth.in_flight, depth.waiting) == (1, 0, 1)
