"""The events: their fields to the letter, and JSON that comes back as it was."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from magent2.models.events import (
    TERMINAL,
    AgentUpdatedEvent,
    ApprovalRequestedEvent,
    BaseEvent,
    CancelledEvent,
    ControlEvent,
    ErrorCode,
    ErrorEvent,
    GapEvent,
    LogEvent,
    OutputEvent,
    ReasoningEvent,
    RunStartedEvent,
    SignalEvent,
    StreamEvent,
    TokenEvent,
    ToolStepEvent,
    Usage,
    UserMessageEvent,
    decode,
    encode,
)

EVERY = {"event", "conversation_id", "created_at"}
RUN = {"run_id", "message_id", "agent"}
STAMP: dict[str, Any] = {"conversation_id": "c1", "run_id": "r1", "message_id": "m1", "agent": "DevAgent"}
AT = datetime(2026, 11, 21, 10, tzinfo=UTC)

EVENTS: list[tuple[BaseEvent, set[str]]] = [
    (
        UserMessageEvent(
            conversation_id="c1", message_id="m1", sender="user:a", recipient="agent:B", text="hi", metadata={"a": [1]}
        ),
        {"message_id", "sender", "recipient", "text", "metadata"},
    ),
    (RunStartedEvent(**STAMP, attempt=2, resumed_turn=1, model="m"), RUN | {"attempt", "resumed_turn", "model"}),
    (TokenEvent(**STAMP, text="Hel", index=0, turn=0), RUN | {"text", "index", "turn"}),
    (ReasoningEvent(**STAMP, text="Hm", index=3, turn=1), RUN | {"text", "index", "turn"}),
    (
        ToolStepEvent(**STAMP, tool_call_id="t1", name="add", args={"a": 1}, status="success", turn=0, duration_ms=1.5),
        RUN | {"tool_call_id", "name", "args", "status", "result_summary", "error", "duration_ms", "turn"},
    ),
    (AgentUpdatedEvent.model_validate({**STAMP, "from": "A", "to": "B"}), RUN | {"from", "to"}),
    (
        ApprovalRequestedEvent(**STAMP, tool_call_id="t1", name="add", args="{broken", expires_at=AT),
        RUN | {"tool_call_id", "name", "args", "expires_at"},
    ),
    (
        ControlEvent(conversation_id="c1", control_id="m2", command="cancel", sender="user:a", state="applied"),
        RUN | {"control_id", "command", "sender", "state", "reason"},
    ),
    (
        LogEvent(conversation_id="c1", level="warning", component="worker", message="again"),
        RUN | {"level", "component", "message"},
    ),
    (
        SignalEvent(conversation_id="c1", topic="signal:done", direction="send", message_id="m1"),
        {"topic", "direction", "message_id"},
    ),
    (
        OutputEvent(**STAMP, text="Hello", usage=Usage(requests=1, input_tokens=9, output_tokens=2, total_tokens=11)),
        RUN | {"text", "usage"},
    ),
    (OutputEvent(**STAMP, text="", usage=None), RUN | {"text", "usage"}),
    (
        ErrorEvent(**STAMP, code="model_error", message="no", retryable=True),
        RUN | {"code", "message", "retryable"},
    ),
    (CancelledEvent(**STAMP, reason="asked"), RUN | {"reason"}),
    (GapEvent(conversation_id="c1", missing_before=None), {"missing_before"}),
]

each_event = pytest.mark.parametrize(("event", "fields"), EVENTS, ids=[event.event for event, _ in EVENTS])


def test_every_kind_of_event_is_here() -> None:
    kinds = {kind.model_fields["event"].default for kind in get_args(get_args(StreamEvent)[0])}

    assert {event.event for event, _ in EVENTS} == kinds


@pytest.mark.promise("event.fields")
@each_event
def test_the_fields_are_those_of_the_contract(event: BaseEvent, fields: set[str]) -> None:
    assert set(json.loads(encode(event))) == EVERY | fields


@pytest.mark.promise("event.bytes")
@each_event
def test_an_event_comes_back_as_it_was(event: BaseEvent, fields: set[str]) -> None:
    data = encode(event)

    assert decode(data) == event
    assert type(decode(data)) is type(event)
    assert encode(decode(data)) == data


@pytest.mark.promise("event.bytes")
@each_event
def test_the_kind_comes_first(event: BaseEvent, fields: set[str]) -> None:
    """Readers of the log tell terminal events by this prefix, without parsing."""
    assert encode(event).startswith(b'{"event":"%s"' % event.event.encode())


@pytest.mark.promise("event.bytes")
@given(st.text())
def test_any_text_is_one_line(text: str) -> None:
    """Of CR and LF, which end a line of a stream; other separators do not."""
    data = encode(TokenEvent(**STAMP, text=text, index=0, turn=0))

    assert not {b"\r", b"\n"} & {data[n : n + 1] for n in range(len(data))}
    assert json.loads(data)["text"] == text


@pytest.mark.promise("event.fields")
def test_the_codes_of_errors_and_the_terminal_events_are_those_of_the_contract() -> None:
    assert set(get_args(ErrorCode)) == {
        "model_error",
        "model_timeout",
        "model_refusal",
        "max_turns",
        "guardrail",
        "agent_error",
        "hop_limit",
        "attempts_exhausted",
        "undecodable",
    }
    assert {"output", "error", "cancelled"} == TERMINAL


def test_times_end_in_z() -> None:
    event = TokenEvent(**STAMP, created_at=AT, text="", index=0, turn=0)

    assert json.loads(encode(event))["created_at"] == "2026-11-21T10:00:00Z"


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b'{"event":"surprise","conversation_id":"c1"}', b'{"event":"token","conversation_id":"c1"}',
     b'{"conversation_id":"c1"}'],
)  # fmt: skip
def test_what_is_no_event_is_refused(data: bytes) -> None:
    with pytest.raises(ValidationError):
        decode(data)


def test_a_field_of_a_later_version_is_ignored() -> None:
    data = json.loads(encode(TokenEvent(**STAMP, text="a", index=0, turn=0))) | {"mood": "good"}

    assert isinstance(decode(json.dumps(data)), TokenEvent)
