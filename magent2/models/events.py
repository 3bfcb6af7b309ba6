"""Every event of a conversation's stream, as one union told apart by `event`.

`token`, `tool_step` and `output` keep these fields for good. New fields may be added, none is renamed.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from magent2.models.envelope import UtcTime

LogLevel = Literal["debug", "info", "warning", "error"]
ToolStatus = Literal["start", "success", "error", "unknown"]
ErrorCode = Literal[
    "model_error",
    "model_timeout",
    "model_refusal",
    "max_turns",
    "guardrail",
    "agent_error",
    "hop_limit",
    "attempts_exhausted",
    "undecodable",
]


class BaseEvent(BaseModel):
    """What every event has. `created_at` is UTC, RFC 3339."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    event: str
    conversation_id: str
    created_at: UtcTime = Field(default_factory=lambda: datetime.now(UTC))


class RunEvent(BaseEvent):
    """What every event made by a run has; `message_id` is the message being answered."""

    run_id: str
    message_id: str
    agent: str


class UserMessageEvent(BaseEvent):
    """A message entered the conversation."""

    event: Literal["user_message"] = "user_message"
    message_id: str
    sender: str
    recipient: str
    text: str
    metadata: dict[str, Any]


class RunStartedEvent(RunEvent):
    """A worker took the message. `attempt > 1`: forget what earlier attempts said from turn `resumed_turn` on."""

    event: Literal["run_started"] = "run_started"
    attempt: int
    resumed_turn: int
    model: str


class TokenEvent(RunEvent):
    """A piece of the answer. `index` counts from 0 within one attempt; `turn` is which model call.

    {"event": "token", "conversation_id": "c1", "text": "Hel", "index": 0, "turn": 0, …}
    """

    event: Literal["token"] = "token"
    text: str
    index: int
    turn: int


class ReasoningEvent(RunEvent):
    """A piece of the model's reasoning, where the model shows it."""

    event: Literal["reasoning"] = "reasoning"
    text: str
    index: int
    turn: int


class ToolStepEvent(RunEvent):
    """The true start or the true end of one tool call. `duration_ms` only at the end."""

    event: Literal["tool_step"] = "tool_step"
    tool_call_id: str
    name: str
    args: dict[str, Any] | str
    status: ToolStatus
    result_summary: str | None = None
    error: str | None = None
    duration_ms: float | None = None
    turn: int


class AgentUpdatedEvent(RunEvent):
    """A hand-off from one agent to another."""

    event: Literal["agent_updated"] = "agent_updated"
    from_: str = Field(alias="from")
    to: str


class ApprovalRequestedEvent(RunEvent):
    """The run waits for a person."""

    event: Literal["approval_requested"] = "approval_requested"
    tool_call_id: str
    name: str
    args: dict[str, Any] | str
    expires_at: UtcTime


class ControlEvent(BaseEvent):
    """A control message, or a steer, and what became of it."""

    event: Literal["control"] = "control"
    control_id: str
    command: Literal["cancel", "approve", "reject", "steer"]
    sender: str
    state: Literal["accepted", "applied", "refused"]
    reason: str | None = None
    run_id: str | None = None
    message_id: str | None = None
    agent: str | None = None


class LogEvent(BaseEvent):
    """What an operator should see in the conversation."""

    event: Literal["log"] = "log"
    level: LogLevel
    component: str
    message: str
    run_id: str | None = None
    message_id: str | None = None
    agent: str | None = None


class SignalEvent(BaseEvent):
    """A signal was sent or received."""

    event: Literal["signal"] = "signal"
    topic: str
    direction: Literal["send", "recv"]
    message_id: str


class Usage(BaseModel):
    """What the model calls of a run cost, in requests and tokens."""

    requests: int
    input_tokens: int
    output_tokens: int
    total_tokens: int


class OutputEvent(RunEvent):
    """Terminal: the answer."""

    event: Literal["output"] = "output"
    text: str
    usage: Usage | None


class ErrorEvent(RunEvent):
    """Terminal: the run failed."""

    event: Literal["error"] = "error"
    code: ErrorCode
    message: str
    retryable: bool


class CancelledEvent(RunEvent):
    """Terminal: the run, or the waiting message, was cancelled."""

    event: Literal["cancelled"] = "cancelled"
    reason: str


class GapEvent(BaseEvent):
    """Events before `missing_before` are not kept. Sent by a reader's own stream, never stored, so without a cursor."""

    event: Literal["gap"] = "gap"
    missing_before: str | None


TerminalEvent = OutputEvent | ErrorEvent | CancelledEvent
TERMINAL = frozenset({"output", "error", "cancelled"})

StreamEvent = Annotated[
    UserMessageEvent
    | RunStartedEvent
    | TokenEvent
    | ReasoningEvent
    | ToolStepEvent
    | AgentUpdatedEvent
    | ApprovalRequestedEvent
    | ControlEvent
    | LogEvent
    | SignalEvent
    | OutputEvent
    | ErrorEvent
    | CancelledEvent
    | GapEvent,
    Field(discriminator="event"),
]

_stream_event: TypeAdapter[StreamEvent] = TypeAdapter(StreamEvent)


def encode(event: BaseEvent) -> bytes:
    """The event as one line of JSON: the bytes that stay these bytes until the socket."""
    return event.__pydantic_serializer__.to_json(event)


def decode(data: bytes | str) -> StreamEvent:
    """The event behind the bytes. Raises `pydantic.ValidationError` for an unknown event or a missing field."""
    return _stream_event.validate_json(data)
