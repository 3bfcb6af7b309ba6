"""The four verbs: `send` a message in, `receive` it in a worker, `emit` events, `follow` them out.

The only module, with `wiring`, that touches the bus: names, encoding and idempotency are settled here. Every door
sends and follows here; the worker receives and emits here and sees a `Job`, never a bus type. Rules wrap `send` as
middleware.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from uuid import uuid4

from pydantic import ValidationError

from magent2.bus import topics
from magent2.bus.interface import START, Appended, Bus, Consumer, Cursor, Dedup, Delivery, QueueDepth, parse_cursor
from magent2.errors import CursorExpired, DedupConflict, KeyBusy, LeaseLost, QueueFull, Rejected
from magent2.job import Job, patiently
from magent2.middleware import Middleware, compose
from magent2.models.command import Command
from magent2.models.envelope import MessageEnvelope, Work
from magent2.models.events import BaseEvent, ControlEvent, ErrorEvent, GapEvent, UserMessageEvent, encode
from magent2.models.run import current_run, run_id_of

logger = logging.getLogger(__name__)

_PAGE = 500
_TERMINAL = (b'{"event":"output"', b'{"event":"error"', b'{"event":"cancelled"')
_USER_MESSAGE = b'{"event":"user_message"'


@dataclass(frozen=True, slots=True)
class Accepted:
    """A message durably taken. `cursor` is the place in the log just before it."""

    message_id: str
    conversation_id: str
    topic: str
    cursor: Cursor
    duplicate: bool


@dataclass(frozen=True, slots=True)
class Frame:
    """One event for a reader: its JSON and its cursor; None where there is no entry behind it (a gap)."""

    cursor: Cursor | None
    data: bytes


class Inbox:
    """Where a worker receives the jobs of one agent."""

    def __init__(self, conversations: Conversations, agent: str, consumer: Consumer) -> None:
        self._conversations = conversations
        self._agent = agent
        self._consumer = consumer

    async def receive(self, max: int = 1) -> Sequence[Job]:
        """Wait for one to `max` deliveries; at most one per conversation over all workers.

        Cancelling it loses nothing. May be empty: what cannot be decoded goes to the dead letters here.
        """
        jobs = []
        for delivery in await self._consumer.receive(max):
            try:
                jobs.append(Job(Work.model_validate_json(delivery.data), self._agent, delivery))
            except ValidationError:
                await self._conversations.bury_undecodable(self._agent, delivery)
        return jobs

    async def stop(self) -> None:
        """Receive nothing more, and hand back at once what no `receive` returned. The jobs received stay one's own."""
        await self._consumer.stop()


class Conversations:
    """The verbs over one bus. `on_send` wraps `send`; the first rule is the outermost."""

    def __init__(self, bus: Bus, *, on_send: Sequence[Middleware[MessageEnvelope, Accepted]] = ()) -> None:
        self._bus = bus
        self._send = compose(on_send, self._accept)

    # in

    async def send(self, envelope: MessageEnvelope) -> Accepted:
        """Take the message; durable on return, and idempotent by id and content.

        Raises `DedupConflict` for a known id with other content, `KeyBusy` under `on_busy: reject`, `QueueFull`,
        `Rejected`, `Unavailable`.
        """
        return await self._send(envelope)

    async def _accept(self, envelope: MessageEnvelope) -> Accepted:
        if envelope.type == "control":
            return await self._control(envelope)
        if envelope.on_busy == "steer":
            raise Rejected("steer is not part of this version yet", code="unsupported", status=422)
        accepted = await self._take(envelope)
        if envelope.on_busy == "interrupt" and envelope.agent is not None:
            await self._order(envelope, envelope.agent, accepted.cursor, "interrupted by a newer message")
        return accepted

    async def _take(self, envelope: MessageEnvelope) -> Accepted:
        """Enqueue the message and write it into the log, unless it is known."""
        digest = envelope.digest()
        if known := await self._known(envelope, digest):
            return known
        origin = uuid4().hex
        if envelope.agent is not None:
            try:
                await self._enqueue(envelope.agent, envelope, digest, origin)
            except (KeyBusy, QueueFull):
                # what is busy may be this very message: a retry whose first try got in
                if known := await self._known(envelope, digest):
                    return known
                raise
        # accepted from here on: the worker writes the event too, so a crash before this line loses nothing
        entered = await self._enter(envelope, digest, origin)
        return _accepted(envelope, entered, duplicate=entered.duplicate and entered.origin != origin)

    async def _control(self, envelope: MessageEnvelope) -> Accepted:
        """Write the command into the log and hand it to whoever runs the conversation. Each step may be repeated."""
        agent, run_id = envelope.agent, envelope.metadata.get("run_id")
        if envelope.content != "cancel" or agent is None:
            raise Rejected(f"{envelope.content} is not part of this version yet", code="unsupported", status=422)
        if run_id is not None and not isinstance(run_id, str):
            raise Rejected("metadata.run_id: a string", code="invalid", status=422)
        said = ControlEvent(
            conversation_id=envelope.conversation_id,
            control_id=envelope.id,
            command="cancel",
            sender=envelope.sender,
            state="accepted",
            run_id=run_id,
            agent=agent,
        )
        dedup = Dedup(_message_key(envelope), envelope.digest())
        entered = await self._bus.append(topics.log(envelope.conversation_id), encode(said), dedup=dedup)
        await self._order(envelope, agent, entered.last, f"cancelled by {envelope.sender}", run_id)
        return _accepted(envelope, entered, duplicate=entered.duplicate)

    async def _order(
        self, envelope: MessageEnvelope, agent: str, place: Cursor, reason: str, run_id: str | None = None
    ) -> None:
        command = Command(
            id=envelope.id,
            command="cancel",
            agent=agent,
            sender=envelope.sender,
            reason=reason,
            place=place,
            run_id=run_id,
        )
        topic = topics.commands(envelope.conversation_id)
        await self._bus.append(topic, command.model_dump_json().encode(), dedup=Dedup(_message_key(envelope)))
        # what waits for its time is received at once, and finds the command
        await self._bus.wake(topics.queue(agent), envelope.conversation_id)

    async def _known(self, envelope: MessageEnvelope, digest: str) -> Accepted | None:
        known = await self._bus.find(topics.log(envelope.conversation_id), _message_key(envelope))
        if known is None:
            return None
        if known[0] != digest:
            raise DedupConflict
        return _accepted(envelope, known[1], duplicate=True)

    async def _enqueue(self, agent: str, envelope: MessageEnvelope, digest: str, origin: str) -> None:
        caller = current_run.get()
        work = Work(
            envelope=envelope,
            digest=digest,
            origin=origin,
            trace_id=caller.trace_id if caller else uuid4().hex,
            hops=caller.hops + 1 if caller else 0,
        )
        await self._bus.enqueue(
            topics.queue(agent),
            envelope.conversation_id,
            work.model_dump_json().encode(),
            only_if_idle=envelope.on_busy == "reject",
        )

    async def _enter(self, envelope: MessageEnvelope, digest: str, origin: str) -> Appended:
        dedup = Dedup(_message_key(envelope), digest, origin)
        return await self._bus.append(topics.log(envelope.conversation_id), encode(_entered(envelope)), dedup=dedup)

    # work

    @asynccontextmanager
    async def receive(self, agent: str) -> AsyncIterator[Inbox]:
        """Join the agent's workers. Leaving hands back what was received and not settled."""
        async with self._bus.consume(topics.queue(agent)) as consumer:
            yield Inbox(self, agent, consumer)

    async def enter(self, job: Job) -> Appended:
        """Make sure the job's `user_message` is in the log. Raises `DedupConflict` when another message has its id."""
        work = job.work
        dedup = Dedup(_message_key(work.envelope), work.digest, work.origin)
        topic = topics.log(work.envelope.conversation_id)
        return await job.append(self._bus, topic, [encode(_entered(work.envelope))], dedup)

    async def commands(self, job: Job) -> tuple[Sequence[Command], Cursor]:
        """The commands of the job's conversation so far, and the place from which to follow what comes."""
        entries = await self._bus.read(topics.commands(job.envelope.conversation_id), limit=_PAGE, last=True)
        known = [command for entry in entries if (command := _command(entry.data)) is not None]
        return known, entries[-1].cursor if entries else START

    async def follow_commands(self, job: Job, after: Cursor) -> AsyncGenerator[Command, None]:
        """Commands of the job's conversation as they come, for ever."""
        while True:
            async with self._bus.subscribe(topics.commands(job.envelope.conversation_id), after) as subscription:
                try:
                    async for batch in subscription:
                        for entry in batch:
                            after = entry.cursor
                            if (command := _command(entry.data)) is not None:
                                yield command
                except CursorExpired:
                    after = START

    async def applied(self, job: Job, command: Command) -> None:
        """Say in the log what a command did to the job."""
        event = ControlEvent(
            conversation_id=job.envelope.conversation_id,
            control_id=command.id,
            command=command.command,
            sender=command.sender,
            state="applied",
            run_id=job.run_id,
            message_id=job.envelope.id,
            agent=job.agent,
        )
        dedup = Dedup(f"applied:{command.id}:{job.run_id}")
        await job.append(self._bus, topics.log(job.envelope.conversation_id), [encode(event)], dedup)

    async def emit(self, job: Job, *events: BaseEvent) -> None:
        """Write what a run says, in order, under its fence. Raises `LeaseLost`."""
        await job.append(self._bus, topics.log(job.envelope.conversation_id), [encode(event) for event in events], None)

    async def finish(self, job: Job, terminal: str) -> None:
        """Write the terminal event of a job, once however often this is called."""
        key = f"done:{job.agent}:{job.envelope.id}:{job.work.generation}"
        topic = topics.log(job.envelope.conversation_id)
        await job.append(self._bus, topic, [terminal.encode()], Dedup(key))

    async def bury(self, job: Job, reason: str) -> None:
        """Put the job's message among the dead letters. The caller finishes and acks it."""
        record = {
            "agent": job.agent,
            "reason": reason,
            "attempts": job.attempt,
            "work": job.work.model_dump(mode="json"),
        }
        dedup = Dedup(f"dead:{job.envelope.conversation_id}:{job.envelope.id}:{job.work.generation}")
        data = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
        topic = topics.dead_letters(job.agent)
        await patiently(lambda: self._bus.append(topic, data, dedup=dedup, forever=True), job.lost)

    async def bury_undecodable(self, agent: str, delivery: Delivery) -> None:
        """Put bytes that are no message among the dead letters, and say so in the conversation they were for."""
        conversation_id, bus = delivery.key, self._bus
        logger.error("undecodable message for %s in conversation %s", agent, conversation_id)
        record = {"agent": agent, "reason": "undecodable", "attempts": delivery.attempt, "raw": delivery.data.hex()}
        letter = json.dumps(record).encode()
        dedup = Dedup(f"undecodable:{hashlib.sha256(delivery.data).hexdigest()}")
        error = ErrorEvent(
            conversation_id=conversation_id,
            run_id=run_id_of(agent, conversation_id, delivery.token, 0),
            message_id=_salvaged_id(delivery.data),
            agent=agent,
            code="undecodable",
            message="a message in the queue could not be read; it is in the dead letters",
            retryable=False,
        )
        try:
            dead = topics.dead_letters(agent)
            await patiently(lambda: bus.append(dead, letter, dedup=dedup, forever=True), delivery.lost)
            await patiently(lambda: bus.append(topics.log(conversation_id), encode(error), dedup=dedup), delivery.lost)
            await patiently(delivery.ack, delivery.lost)
        except LeaseLost:
            logger.warning("another worker has it")

    # out

    def follow(
        self, conversation_id: str, after: Cursor = "", *, until: str | None = None
    ) -> AsyncGenerator[Sequence[Frame], None]:
        """Yield the log after the cursor in batches, first what is there, then what comes, for ever.

        Entries that are no longer kept are replaced by a `gap` frame. `until` ends it after the terminal event that
        answers the message with this id, at once if that lies behind the cursor; `until="done"` means the newest
        message to an agent by now. Raises `BadCursor`, at once.
        """
        parse_cursor(after)
        return self._follow(conversation_id, after, until)

    async def open(
        self, conversation_id: str, after: Cursor = "", *, until: str | None = None
    ) -> AsyncGenerator[Sequence[Frame], None]:
        """As `follow`, but with the end already looked up: a bus that is away raises `Unavailable` here."""
        parse_cursor(after)
        return self._until(conversation_id, after, await self._end(conversation_id, after, until))

    async def _end(self, conversation_id: str, after: Cursor, until: str | None) -> str | None:
        """The id of the message whose answer ends the stream; empty if there is nothing to wait for, None for never."""
        topic = topics.log(conversation_id)
        if until == "done":
            until = await self._newest_message(topic) or ""
        return "" if until and await self._answered(topic, until, after) else until

    async def _follow(
        self, conversation_id: str, after: Cursor, until: str | None
    ) -> AsyncGenerator[Sequence[Frame], None]:
        end = await self._end(conversation_id, after, until)
        async with aclosing(self._until(conversation_id, after, end)) as batches:
            async for frames in batches:
                yield frames

    async def _until(
        self, conversation_id: str, after: Cursor, until: str | None
    ) -> AsyncGenerator[Sequence[Frame], None]:
        topic = topics.log(conversation_id)
        if until == "":
            return
        while True:
            async with self._bus.subscribe(topic, after) as subscription:
                try:
                    async for batch in subscription:
                        after = batch[-1].cursor
                        frames = [Frame(entry.cursor, entry.data) for entry in batch]
                        end = until and next((n for n, frame in enumerate(frames) if _answers(frame.data, until)), None)
                        if isinstance(end, int):
                            yield frames[: end + 1]
                            return
                        yield frames
                except CursorExpired as expired:
                    gap = GapEvent(conversation_id=conversation_id, missing_before=expired.earliest)
                    yield [Frame(None, encode(gap))]
                    after = START

    async def _answered(self, topic: str, message_id: str, upto: Cursor) -> bool:
        """Whether the message's terminal event lies at or before the cursor."""
        end = parse_cursor(upto)
        if end == (0, 0) or await self._comes_next(topic, message_id, upto):
            return False
        async for cursor, data in self._scan(topic):
            if parse_cursor(cursor) > end:
                return False
            if _answers(data, message_id):
                return True
        return False

    async def _comes_next(self, topic: str, message_id: str, after: Cursor) -> bool:
        """Whether the message itself is the first entry after the cursor, as it is behind the cursor `send` returns."""
        try:
            page = await self._bus.read(topic, after, 1)
        except CursorExpired:
            return False
        return any(e.data.startswith(_USER_MESSAGE) and json.loads(e.data)["message_id"] == message_id for e in page)

    async def _newest_message(self, topic: str) -> str | None:
        newest = None
        async for _, data in self._scan(topic):
            if data.startswith(_USER_MESSAGE):
                event = json.loads(data)
                if event["recipient"].startswith("agent:"):
                    newest = str(event["message_id"])
        return newest

    async def _scan(self, topic: str) -> AsyncIterator[tuple[Cursor, bytes]]:
        """All that is kept right now; what is trimmed meanwhile makes it start over."""
        after = START
        while True:
            try:
                page = await self._bus.read(topic, after, _PAGE)
            except CursorExpired:
                after = START
                continue
            for entry in page:
                yield entry.cursor, entry.data
            if len(page) < _PAGE:
                return
            after = page[-1].cursor

    # state

    async def depth(self, agent: str) -> QueueDepth:
        """How much work waits for an agent."""
        return await self._bus.depth(topics.queue(agent))

    async def ready(self) -> None:
        """Return when the bus answers, else raise `Unavailable`."""
        await self._bus.ping()


def _salvaged_id(data: bytes) -> str:
    """The id of a message that cannot be decoded, where it shows; empty where it does not."""
    try:
        found = json.loads(data)["envelope"]["id"]
    except (ValueError, KeyError, TypeError):
        return ""
    return found if isinstance(found, str) else ""


def _command(data: bytes) -> Command | None:
    try:
        return Command.model_validate_json(data)
    except ValidationError:  # of a newer release: not for this worker to judge
        return None


def _message_key(envelope: MessageEnvelope) -> str:
    return f"msg:{envelope.recipient}:{envelope.id}"


def _accepted(envelope: MessageEnvelope, entered: Appended, *, duplicate: bool) -> Accepted:
    topic = topics.log(envelope.conversation_id)
    return Accepted(envelope.id, envelope.conversation_id, topic, entered.before, duplicate)


def _entered(envelope: MessageEnvelope) -> UserMessageEvent:
    return UserMessageEvent(
        conversation_id=envelope.conversation_id,
        message_id=envelope.id,
        sender=envelope.sender,
        recipient=envelope.recipient,
        text=envelope.content or "",
        metadata=envelope.metadata,
    )


def _answers(data: bytes, message_id: str) -> bool:
    """Whether this is the terminal event of that message. Our own encoding puts `event` first: no need to parse all."""
    return data.startswith(_TERMINAL) and json.loads(data).get("message_id") == message_id
