"""What a runner promises: it answers one message, telling what happens as it happens, and can go on after a crash.

Held by `tests/contracts/test_runner.py`. The worker owns the log, the journal and the commit; a runner only sees the
`Turn` it is given. Cancelling `run` stops the model stream and the tools at once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from magent2.models.envelope import MessageEnvelope
from magent2.models.events import LogLevel, Usage
from magent2.store.history import Item, JournalEntry


class Sink(Protocol):
    """Where a run says what happens. The calls return at once; `flush` waits until all of it is in the log."""

    def token(self, text: str, turn: int) -> None:
        """A piece of the answer."""

    def reasoning(self, text: str, turn: int) -> None:
        """A piece of the model's reasoning."""

    def tool_step(
        self,
        *,
        tool_call_id: str,
        name: str,
        args: dict[str, Any] | str,
        status: Literal["start", "success", "error", "unknown"],
        turn: int,
        result_summary: str | None = None,
        error: str | None = None,
        duration_ms: float | None = None,
    ) -> None:
        """The true start or end of a tool call."""

    def agent_updated(self, from_: str, to: str) -> None:
        """A hand-off."""

    def log(self, level: LogLevel, component: str, message: str) -> None:
        """What an operator should see in the conversation."""

    async def breathe(self) -> None:
        """Let others run, and wait while too much is unwritten. Call it every few tokens."""

    async def flush(self) -> None:
        """Return when everything said so far is in the log."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message to answer, and all a runner may know of it.

    `history` is the conversation before the message, `journal` what earlier attempts have finished. `record` writes
    a journal entry, durably on return, and raises `LeaseLost` when the job is somebody else's.
    """

    envelope: MessageEnvelope
    run_id: str
    history: Sequence[Item]
    journal: Sequence[JournalEntry]
    sink: Sink
    record: Callable[[JournalEntry], Awaitable[None]]
    steers: Callable[[], Sequence[Item]] = field(default=lambda: ())


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run: the input items the message added to the history (the message first), and the answer."""

    items: Sequence[Item]
    text: str
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class ApprovalRequest:
    """One tool call that waits for a person."""

    tool_call_id: str
    name: str
    args: dict[str, Any] | str


@dataclass(frozen=True, slots=True)
class Parked:
    """A run that waits for approvals; `state` brings it back, and is a secret of the server."""

    state: str
    requests: Sequence[ApprovalRequest]


class Runner(Protocol):
    """Answers messages; one per worker, used by many runs at once."""

    @property
    def kind(self) -> str:
        """`echo`, `openai`, …: for the start line and `/agents`."""

    @property
    def model(self) -> str:
        """The model's name as configured."""

    async def run(self, turn: Turn) -> Result | Parked:
        """Answer the message. Raises `RunFailed` for what users should see; anything else is a defect."""

    async def aclose(self) -> None:
        """Close what was opened."""
