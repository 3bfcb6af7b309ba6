"""One delivery of one message: load what is known, run, journal, commit, finish, acknowledge.

The order is the promise: effects are journalled before they are built upon, the commit is put if absent under the job's
fence, the terminal event follows the commit, and the acknowledgement comes last. A crash between any two of them is
made good by the next delivery.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from magent2.conversations import Conversations
from magent2.errors import DedupConflict, LeaseLost, RunFailed
from magent2.job import Job, patiently, place_of
from magent2.models.command import Command
from magent2.models.events import CancelledEvent, ErrorEvent, OutputEvent, TerminalEvent, encode
from magent2.models.run import RunContext, current_run
from magent2.models.text import mended
from magent2.runner.interface import Parked, Result, Runner, Turn
from magent2.settings import WorkerConfig
from magent2.store.history import (
    Commit,
    Item,
    Journaled,
    JournalEntry,
    ModelTurn,
    history,
    journal_items,
    own_calls,
    repair,
    started_calls,
    user_item,
)
from magent2.store.interface import Store
from magent2.worker.retry import GiveUp, Retry, decide
from magent2.worker.writer import RunLog, Writer

logger = logging.getLogger(__name__)

_COMMITS = "commits"
_CANCEL_AGAIN_S = 5.0
_JOURNAL_TTL_S = 7 * 86_400.0


@dataclass(slots=True)
class _Known:
    """What the store knows when a delivery begins."""

    commits: Sequence[Commit]
    journal: Sequence[Journaled]
    commands: Sequence[Command]
    commands_seen: str  # the place from which to follow what comes
    place: str  # of the message in the log

    def commit_of(self, job: Job) -> Commit | None:
        """The commit of this very message, when an earlier delivery got that far."""
        for commit in reversed(self.commits):
            if _commit_id(commit.message_id, commit.generation, commit.digest) == _commit_id_of(job):
                return commit
        return None

    def stops(self, command: Command, job: Job) -> bool:
        """Whether a command means this job."""
        if command.agent != job.agent:
            return False
        if command.run_id is not None:
            return command.run_id == job.run_id
        return place_of(self.place) <= place_of(command.place)

    def strikes(self, job: Job) -> int:
        """Counted deliveries since the last one that finished anything."""
        return job.attempt - (self.journal[-1].attempt if self.journal else 0)


class _Stopped(Exception):
    """A command stops the run."""

    def __init__(self, command: Command) -> None:
        self.command = command


class Run:
    """Answers one delivery of a message."""

    def __init__(
        self, job: Job, conversations: Conversations, store: Store, runner: Runner, writer: Writer, config: WorkerConfig
    ) -> None:
        self.job = job
        self._conversations = conversations
        self._store = store
        self._runner = runner
        self._log: RunLog = writer.open(job)
        self._config = config
        self._journal_name = f"journal:{job.envelope.id}:{job.work.generation}"
        self._entries: list[JournalEntry] = []
        self._recorded = False
        self._stamp: dict[str, Any] = {
            "conversation_id": job.envelope.conversation_id,
            "run_id": job.run_id,
            "message_id": job.envelope.id,
            "agent": job.agent,
        }

    async def answer(self) -> None:
        """Bring the message to its one terminal event, or leave it to a later delivery. Raises `LeaseLost`."""
        try:
            known = await self._load()
        except DedupConflict:
            # another message has this id; its sender was told 409 and nothing is run
            await self.job.ack()
            return
        if commit := known.commit_of(self.job):
            await self._finish(commit)
            return
        strikes = known.strikes(self.job)
        if strikes > self._config.max_attempts:
            # it never came so far as to fail by itself: each of its workers died
            why = f"{strikes - 1} deliveries in a row came to nothing"
            failed = RunFailed("attempts_exhausted", why, retryable=True)
            await self._give_up(failed, dead_letter=True)
            return
        try:
            result = await self._unless_stopped(known)
        except RunFailed as failed:
            await self._failed(failed, strikes)
        except _Stopped as stopped:
            await self._stopped(stopped.command)
        else:
            output = OutputEvent(**self._stamp, text=mended(result.text), usage=result.usage)
            await self._commit(result.items, output)

    async def _load(self) -> _Known:
        """Raise the store's fence, make sure the message is in the log, then read what is known: two round trips."""
        job, store = self.job, self._store

        async def load() -> tuple[Any, ...]:
            return await asyncio.gather(
                store.entries(job.scope, _COMMITS),
                store.entries(job.scope, self._journal_name),
                self._conversations.commands(job),
            )

        # first: from here on an earlier holder of this job can add nothing to what is read next
        fencing = patiently(lambda: store.delete(job.scope, "guard", token=job.token), job.lost)
        _, entered = await asyncio.gather(fencing, self._conversations.enter(job))
        commits, journal, commands = await patiently(load, job.lost)
        known = _Known(
            commits=[Commit.model_validate_json(data) for data in commits],
            journal=[Journaled.model_validate_json(data) for data in journal],
            commands=commands[0],
            commands_seen=commands[1],
            place=entered.last,
        )
        self._entries = [journaled.entry for journaled in known.journal]
        return known

    async def _unless_stopped(self, known: _Known) -> Result:
        """Run, but for a command that came before or comes meanwhile. Raises `_Stopped`."""
        for command in known.commands:
            if known.stops(command, self.job):
                raise _Stopped(command)
        running = asyncio.create_task(self._run(known))
        watching = asyncio.create_task(self._watch(known))
        try:
            await asyncio.wait({running, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                watching.result()
            return await running
        finally:
            await end(running, watching)

    async def _watch(self, known: _Known) -> None:
        async with aclosing(self._conversations.follow_commands(self.job, known.commands_seen)) as commands:
            async for command in commands:
                if known.stops(command, self.job):
                    raise _Stopped(command)

    async def _stopped(self, command: Command) -> None:
        """End the message as cancelled; the history keeps what was finished."""
        await self._log.flush()
        await self._conversations.applied(self.job, command)
        await self._commit(self._items(), CancelledEvent(**self._stamp, reason=command.reason))

    async def _run(self, known: _Known) -> Result:
        resumed_turn = sum(isinstance(entry, ModelTurn) for entry in self._entries)
        self._log.started(resumed_turn, self._runner.model)
        turn = Turn(
            envelope=self.job.envelope,
            run_id=self.job.run_id,
            history=repair(history(known.commits)),
            journal=tuple(self._entries),
            sink=self._log,
            record=self._record,
        )
        job = self.job
        token = current_run.set(
            RunContext(
                agent=job.agent,
                conversation_id=job.envelope.conversation_id,
                message_id=job.envelope.id,
                run_id=job.run_id,
                trace_id=job.work.trace_id,
                hops=job.work.hops,
            )
        )
        try:
            result = await self._runner.run(turn)
            await self._log.flush()
        except (RunFailed, LeaseLost):
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # nobody stopped this run: something inside cancelled itself, and must not pass for a stop
            raise RunFailed("agent_error", "the agent was cancelled from within") from None
        except Exception as error:
            logger.exception("run failed")
            raise RunFailed("agent_error", f"the agent raised {type(error).__name__}") from error
        finally:
            current_run.reset(token)
        if isinstance(result, Parked):
            raise RunFailed("agent_error", "a tool waits for approval, which this version does not support yet")
        return result

    async def _record(self, entry: JournalEntry) -> None:
        """Journal what was finished, durably on return."""
        self._entries.append(entry)
        self._recorded = True
        data = Journaled(attempt=self.job.attempt, entry=entry).model_dump_json().encode()
        # unique over all deliveries, and the same when it is repeated
        id = f"{self.job.token}:{len(self._entries)}"
        job = self.job
        name, token = self._journal_name, self.job.token
        await patiently(lambda: self._store.add(job.scope, name, id, data, token=token, ttl_s=_JOURNAL_TTL_S), job.lost)

    async def _failed(self, failed: RunFailed, strikes: int) -> None:
        if self._recorded:
            strikes = 1  # something was finished meanwhile: the count starts anew
        match decide(failed, strikes, max_attempts=self._config.max_attempts, jitter=random.random()):
            case Retry(delay_s):
                self._log.log("warning", "worker", f"{failed.code}: {failed}; trying again in {delay_s:.1f} s")
                await self._log.flush()
                await self.job.nack(delay_s)
            case GiveUp(dead_letter):
                await self._give_up(failed, dead_letter=dead_letter)

    async def _give_up(self, failed: RunFailed, *, dead_letter: bool) -> None:
        code, message = failed.code, str(failed)
        if dead_letter:
            message = message if code == "attempts_exhausted" else f"{code}: {message}"
            code = "attempts_exhausted"
        await self._log.flush()
        if dead_letter:
            await self._conversations.bury(self.job, message)
        event = ErrorEvent.model_validate(
            {**self._stamp, "code": code, "message": message, "retryable": failed.retryable}
        )
        # what a guardrail stopped is not shown to the model again
        await self._commit([] if code == "guardrail" else self._items(), event)

    async def abandon(self, reason: str) -> None:
        """Give the message up without what the store knows of it: it can be neither run nor loaded."""
        await self._conversations.bury(self.job, reason)
        event = ErrorEvent(**self._stamp, code="attempts_exhausted", message=reason, retryable=False)
        await self._conversations.finish(self.job, encode(event).decode())
        await self.job.ack()

    def _items(self) -> list[Item]:
        """What an unfinished run leaves in the history: the message and what was finished, calls closed."""
        text = self.job.envelope.content or ""
        return repair([user_item(text), *journal_items(self._entries)], started_calls(self._entries))

    async def _commit(self, items: Sequence[Item], event: TerminalEvent) -> None:
        job = self.job
        self._log.close()
        commit = Commit(
            message_id=job.envelope.id,
            digest=job.work.digest,
            generation=job.work.generation,
            items=mended(own_calls(items, job.envelope.id)),
            terminal=encode(event).decode(),
        )
        data = commit.model_dump_json().encode()
        id = _commit_id_of(job)
        await patiently(lambda: self._store.add(job.scope, _COMMITS, id, data, token=job.token), job.lost)
        await self._finish(commit)

    async def _finish(self, commit: Commit) -> None:
        """The terminal event, then the acknowledgement. Repeating it changes nothing."""
        job = self.job
        await self._conversations.finish(job, commit.terminal)
        if self._entries:
            await patiently(lambda: self._store.clear(job.scope, self._journal_name, token=job.token), job.lost)
        await job.ack()


def _commit_id(message_id: str, generation: int, digest: str) -> str:
    return f"{message_id}:{generation}:{digest[:16]}"


def _commit_id_of(job: Job) -> str:
    return _commit_id(job.envelope.id, job.work.generation, job.work.digest)


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait for their end, whatever they raise; being cancelled oneself does not shorten it."""
    cancelled: asyncio.CancelledError | None = None
    while pending := {task for task in tasks if not task.done()}:
        for task in pending:
            task.cancel()
        try:
            # again after a while: code below may swallow one, as `asyncio.wait_for` of Python 3.11 can
            await asyncio.wait(pending, timeout=_CANCEL_AGAIN_S)
        except asyncio.CancelledError as error:
            cancelled = error
    for task in tasks:
        if not task.cancelled():
            task.exception()
    if cancelled is not None:
        raise cancelled
