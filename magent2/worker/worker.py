"""The worker: receives jobs of one agent, runs several conversations at once, and ends cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from magent2.conversations import Conversations, Inbox
from magent2.errors import LeaseLost, Unavailable
from magent2.job import Job
from magent2.log import span
from magent2.runner.interface import Runner
from magent2.settings import WorkerConfig
from magent2.store.interface import Store
from magent2.worker.run import Run, end
from magent2.worker.writer import Writer

logger = logging.getLogger(__name__)

_AWAY_S = 0.5
"""Between tries to receive while the bus is away."""

_ALONE_FROM_LAPSES = 2
"""After so many lapsed leases in a row a job runs alone: one that kills its worker takes no others along."""


class Worker:
    """Runs the jobs of one agent until `stop`. What it is given it does not close."""

    def __init__(self, conversations: Conversations, store: Store, runner: Runner, config: WorkerConfig) -> None:
        self._conversations = conversations
        self._store = store
        self._runner = runner
        self._config = config
        self._writer = Writer(conversations)
        self._drain_s = config.drain_s
        self._stopping = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()

    def stop(self, *, drain_s: float | None = None) -> None:
        """Take nothing new; finish or hand back within `drain_s`, by default the configured. `run` returns then."""
        if drain_s is not None:
            self._drain_s = drain_s
        self._stopping.set()

    async def run(self) -> None:
        """Work until `stop`."""
        writing = asyncio.create_task(self._writer.run(), name="magent2-writer")
        try:
            async with self._conversations.receive(self._config.agent) as inbox:
                try:
                    await self._receive(inbox)
                finally:
                    await self._drain()
        finally:
            writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writing

    async def _receive(self, inbox: Inbox) -> None:
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            while not self._stopping.is_set():
                if len(self._running) >= self._config.concurrency:
                    await self._until_fewer(self._config.concurrency - 1, stopping)
                    continue
                receiving = asyncio.create_task(inbox.receive(self._config.concurrency - len(self._running)))
                await asyncio.wait({receiving, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if not receiving.done():
                    receiving.cancel()
                    await asyncio.wait({receiving})
                    if receiving.cancelled():
                        return  # nothing is lost: `stop` hands back what arrived meanwhile
                try:
                    jobs = receiving.result()
                except Unavailable as error:
                    logger.warning("the bus is away (%s), trying again", error)
                    await asyncio.wait({stopping}, timeout=_AWAY_S)
                    continue
                for job in jobs:
                    await self._start(job, stopping)
        finally:
            stopping.cancel()
            await inbox.stop()

    async def _start(self, job: Job, stopping: asyncio.Task[bool]) -> None:
        alone = job.lapses >= _ALONE_FROM_LAPSES
        if alone:
            await self._until_fewer(0, stopping)
        if self._stopping.is_set():
            with contextlib.suppress(LeaseLost, Unavailable):
                await job.release()
            return
        task = asyncio.create_task(self._handle(job), name=f"magent2-run-{job.run_id}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        if alone:
            await self._until_fewer(0, stopping)

    async def _until_fewer(self, most: int, stopping: asyncio.Task[bool]) -> None:
        """Return when at most this many run, or on `stop`."""
        while len(self._running) > most and not stopping.done():
            await asyncio.wait({*self._running, stopping}, return_when=asyncio.FIRST_COMPLETED)

    async def _handle(self, job: Job) -> None:
        """One delivery, from here to its end. The one place that catches whatever a run may raise."""
        with span("run", conversation_id=job.envelope.conversation_id, run_id=job.run_id, agent=job.agent):
            run = Run(job, self._conversations, self._store, self._runner, self._writer, self._config)
            answering = asyncio.create_task(run.answer())
            losing = asyncio.create_task(job.lost.wait())
            try:
                await asyncio.wait({answering, losing}, return_when=asyncio.FIRST_COMPLETED)
                if not answering.done():
                    logger.warning("lease lost: stopping the run, another worker has it")
                    await end(answering)
                    return
                answering.result()
            except asyncio.CancelledError:
                # drained: the model stream and the tools end, and the job goes back untouched
                await end(answering)
                with contextlib.suppress(LeaseLost, Unavailable):
                    await job.release()
            except LeaseLost:
                logger.warning("refused as stale: another worker has the job, or had a newer one")
                # it may be the store alone that says so: then the lease is still ours, and must not block for ever
                await self._try_again(job, run)
            except Exception:
                logger.exception("a run broke")
                await self._try_again(job, run)
            finally:
                losing.cancel()

    async def _try_again(self, job: Job, run: Run) -> None:
        """Hand a broken job back, counted; give it up when that has been done often enough."""
        with contextlib.suppress(LeaseLost, Unavailable):
            if job.attempt >= self._config.max_attempts + _ALONE_FROM_LAPSES:
                await run.abandon("it broke its worker's handling each time; see the worker's log")
            else:
                await job.nack(_AWAY_S)

    async def _drain(self) -> None:
        """Give the runs their time, then hand back what is left."""
        if self._running and self._drain_s > 0:
            logger.info("finishing %d runs within %g s", len(self._running), self._drain_s)
            await asyncio.wait(self._running, timeout=self._drain_s)
        for task in self._running:
            task.cancel()
        if self._running:
            logger.info("handing back %d runs", len(self._running))
            await asyncio.wait(self._running)
