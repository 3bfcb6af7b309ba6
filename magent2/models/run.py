"""The facts of the run at hand: the fence its writes carry, and a contextvar tools and logs read."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from uuid import NAMESPACE_URL, uuid5


@dataclass(frozen=True, slots=True)
class Fence:
    """A write made under a lease. The resource keeps the highest `token` per `writer` and refuses a smaller one.

    `token` compares as a string. `seq` counts the writes of one delivery from 1: a `seq` already seen was a repeat
    whose answer got lost, and returns what the first one returned.
    """

    writer: str
    token: str
    seq: int = 0


@dataclass(frozen=True, slots=True)
class RunContext:
    """Whose run this is. Set by the worker around a run; read by tools, logs and `Conversations.send`."""

    agent: str
    conversation_id: str
    message_id: str
    run_id: str
    trace_id: str
    hops: int


current_run: ContextVar[RunContext | None] = ContextVar("magent2_current_run", default=None)

_NAMESPACE = uuid5(NAMESPACE_URL, "https://github.com/magent2/magent2")


def run_id_of(agent: str, conversation_id: str, message_id: str, generation: int) -> str:
    """The id of the run that answers a message: the same over all attempts, so it is derived, not stored."""
    return str(uuid5(_NAMESPACE, f"run:{agent}:{conversation_id}:{message_id}:{generation}"))


def derived_id(agent: str, message_id: str, tool_call_id: str) -> str:
    """The id of what a tool call sends onward, so that a repeated effect is recognised where it lands."""
    return str(uuid5(_NAMESPACE, f"effect:{agent}:{message_id}:{tool_call_id}"))
