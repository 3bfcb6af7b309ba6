"""What runs say, on its way to the log: tokens that arrive while an append is in flight leave together in the next.

One task writes for all runs of the process. A task per run would starve when the loop is saturated: 2.9 s to the first
token under load were measured, against 0.4 s with one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from magent2.conversations import Conversations
from magent2.errors import LeaseLost
from magent2.job import Job
from magent2.models.events import (
    AgentUpdatedEvent,
    BaseEvent,
    LogEvent,
    LogLevel,
    ReasoningEvent,
    RunStartedEvent,
    TokenEvent,
    ToolStatus,
    ToolStepEvent,
)
from magent2.models.text import mended

MAX_UNWRITTEN_CHARS = 256 * 1024
"""A run that is this far ahead of the log waits: memory stays bounded while the bus is away."""


@dataclass(slots=True)
class _Text:
    """Adjacent deltas of one kind and turn, to become one event."""

    kind: type[TokenEvent] | type[ReasoningEvent]
    turn: int
    parts: list[str] = field(default_factory=list)


class RunLog:
    """The `Sink` of one delivery of a job. `flush` raises what a write failed with: once, a lost lease for good."""

    def __init__(self, job: Job, conversations: Conversations, mark: Callable[[RunLog], None]) -> None:
        self._job = job
        self._conversations = conversations
        self._mark = mark
        self._pending: list[_Text | BaseEvent] = []
        self._unwritten = 0
        self._writing = False
        self._written = asyncio.Event()
        self._failure: Exception | None = None
        self._closed = False
        self._index: dict[type, int] = {TokenEvent: 0, ReasoningEvent: 0}
        self._stamp: dict[str, Any] = {
            "conversation_id": job.envelope.conversation_id,
            "run_id": job.run_id,
            "message_id": job.envelope.id,
            "agent": job.agent,
        }

    def started(self, resumed_turn: int, model: str) -> None:
        """The worker took the message."""
        self._say(RunStartedEvent(**self._stamp, attempt=self._job.starts, resumed_turn=resumed_turn, model=model))

    def token(self, text: str, turn: int) -> None:
        self._text(TokenEvent, text, turn)

    def reasoning(self, text: str, turn: int) -> None:
        self._text(ReasoningEvent, text, turn)

    def tool_step(
        self,
        *,
        tool_call_id: str,
        name: str,
        args: dict[str, Any] | str,
        status: ToolStatus,
        turn: int,
        result_summary: str | None = None,
        error: str | None = None,
        duration_ms: float | None = None,
    ) -> None:
        self._say(
            ToolStepEvent(
                **self._stamp,
                tool_call_id=tool_call_id,
                name=name,
                args=args,
                status=status,
                result_summary=result_summary,
                error=error,
                duration_ms=duration_ms,
                turn=turn,
            )
        )

    def agent_updated(self, from_: str, to: str) -> None:
        self._say(AgentUpdatedEvent.model_validate({**self._stamp, "from": from_, "to": to}))

    def log(self, level: LogLevel, component: str, message: str) -> None:
        self._say(LogEvent(**self._stamp, level=level, component=component, message=message))

    async def breathe(self) -> None:
        await asyncio.sleep(0)
        if self._unwritten > MAX_UNWRITTEN_CHARS:
            await self.flush()

    async def flush(self) -> None:
        while self._failure is None and (self._pending or self._writing):
            self._written.clear()
            await self._written.wait()
        if (failure := self._failure) is not None:
            if not isinstance(failure, LeaseLost):
                self._failure = None  # told; what ends the run is still to be written
            raise failure

    def close(self) -> None:
        """Say nothing more: a tool that outlives its run has no place behind the terminal event."""
        self._closed = True

    async def write(self) -> None:
        """Append what is pending. Called by the writer only, never twice at a time."""
        items = self._pending
        self._pending, self._unwritten, self._writing = [], 0, True
        try:
            await self._conversations.emit(self._job, *[self._event(item) for item in items])
        except Exception as error:  # noqa: BLE001  whatever it is, it is this run's: the writer writes for all
            self._failure = error
        finally:
            self._writing = False
            self._written.set()

    def _text(self, kind: type[TokenEvent] | type[ReasoningEvent], text: str, turn: int) -> None:
        if not text or self._closed:
            return
        last = self._pending[-1] if self._pending else None
        if not (isinstance(last, _Text) and last.kind is kind and last.turn == turn):
            last = _Text(kind, turn)
            self._pending.append(last)
        last.parts.append(text)
        self._unwritten += len(text)
        self._mark(self)

    def _say(self, event: BaseEvent) -> None:
        if self._closed:
            return
        self._pending.append(event)
        self._mark(self)

    def _event(self, item: _Text | BaseEvent) -> BaseEvent:
        if isinstance(item, BaseEvent):
            return item
        index = self._index[item.kind]
        self._index[item.kind] = index + 1
        return item.kind(**self._stamp, text=mended("".join(item.parts)), index=index, turn=item.turn)


class Writer:
    """Writes all runs' logs, round by round: each round takes what came during the one before."""

    def __init__(self, conversations: Conversations) -> None:
        self._conversations = conversations
        self._dirty: dict[RunLog, None] = {}  # a set that keeps the order: nobody waits longer than a round
        self._bell = asyncio.Event()

    def open(self, job: Job) -> RunLog:
        """A log for one delivery of a job."""
        return RunLog(job, self._conversations, self._mark)

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._bell.wait()
            self._bell.clear()
            dirty, self._dirty = self._dirty, {}
            await asyncio.gather(*(log.write() for log in dirty))

    def _mark(self, log: RunLog) -> None:
        self._dirty[log] = None
        self._bell.set()


__all__ = ["RunLog", "Writer"]
