"""A message in a worker's hands: what settles it, and what is written under its lease."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from magent2.bus.interface import Appended, Bus, Cursor, Dedup, Delivery, parse_cursor
from magent2.errors import LeaseLost, Unavailable
from magent2.models.envelope import Work
from magent2.models.run import Fence, run_id_of

T = TypeVar("T")

_RETRY_S = (0.05, 0.1, 0.2, 0.5, 1.0)


class Job:
    """One message for a worker, and all that settles it. Settling and emitting raise `LeaseLost` when it is over.

    What may be repeated is repeated while the bus is away: a run outlives an outage.
    """

    def __init__(self, work: Work, agent: str, delivery: Delivery) -> None:
        self.work = work
        self.envelope = work.envelope
        self.agent = agent
        self.run_id = run_id_of(agent, work.envelope.conversation_id, work.envelope.id, work.generation)
        self.attempt = delivery.attempt
        self.starts = delivery.starts
        self.lapses = delivery.lapses
        self.token = delivery.token
        self.lost = delivery.lost
        self._delivery = delivery
        self._seq = 0
        self._appending = asyncio.Lock()  # a later `seq` that came first would hide the earlier one

    @property
    def scope(self) -> str:
        """The store's scope of this job: journal, commits and fence are per (agent, conversation)."""
        return f"{self.agent}:{self.envelope.conversation_id}"

    async def append(self, bus: Bus, topic: str, data: Sequence[bytes], dedup: Dedup | None) -> Appended:
        """Append under this job's fence."""
        async with self._appending:
            self._seq += 1
            fence = Fence(self.agent, self.token, self._seq)
            return await patiently(lambda: bus.append(topic, *data, fence=fence, dedup=dedup), self.lost)

    async def ack(self) -> None:
        """Done: forget the message. Only when the terminal event is in the log."""
        await patiently(self._delivery.ack, self.lost)

    async def nack(self, delay_s: float) -> None:
        """Run it again after a delay; counts as an attempt."""
        await patiently(lambda: self._delivery.nack(delay_s=delay_s), self.lost)

    async def park(self, for_s: float) -> None:
        """Wait without a worker until woken or the time is over."""
        await patiently(lambda: self._delivery.park(for_s), self.lost)

    async def release(self) -> None:
        """Hand it back untouched. Not repeated: the lease lapses anyway."""
        await self._delivery.release()


async def patiently(act: Callable[[], Awaitable[T]], lost: asyncio.Event) -> T:
    """Do what may be repeated until the server answers. Raises `LeaseLost` once the job is lost."""
    tries = 0
    while True:
        if lost.is_set():
            raise LeaseLost
        try:
            return await act()
        except Unavailable:
            await asyncio.sleep(_RETRY_S[min(tries, len(_RETRY_S) - 1)])
            tries += 1


def place_of(cursor: Cursor) -> tuple[int, int]:
    """A cursor of a log as something that compares: earlier is less."""
    return parse_cursor(cursor)
