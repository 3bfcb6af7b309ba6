"""The envelope: what is refused, what is made up where it is absent, and what makes two sends the same message."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from magent2.models.envelope import MessageEnvelope, Work

SENT: dict[str, Any] = {
    "conversation_id": "c1",
    "sender": "user:local",
    "recipient": "agent:DevAgent",
    "content": "hello",
}


def parsed(**changed: Any) -> MessageEnvelope:
    """As it is after the wire: fields given as `None` are sent, absent ones are not."""
    return MessageEnvelope.model_validate_json(json.dumps(SENT | changed))


def test_what_is_absent_is_made_up() -> None:
    envelope = parsed()

    assert str(UUID(envelope.id)) == envelope.id
    assert (envelope.type, envelope.metadata, envelope.on_busy) == ("message", {}, "queue")
    assert envelope.created_at.tzinfo is UTC
    assert parsed().id != envelope.id


def test_the_fields_are_those_of_the_contract() -> None:
    assert list(MessageEnvelope.model_fields) == [
        "id",
        "conversation_id",
        "sender",
        "recipient",
        "type",
        "content",
        "metadata",
        "created_at",
    ]


def test_times_are_utc() -> None:
    envelope = parsed(created_at="2026-11-21T12:00:00+02:00")

    assert envelope.created_at == datetime(2026, 11, 21, 10, tzinfo=UTC)
    assert envelope.created_at.utcoffset() == timedelta(0)
    assert '"created_at":"2026-11-21T10:00:00Z"' in envelope.model_dump_json()


@pytest.mark.promise("message.names")
@pytest.mark.parametrize("name", ["a", "A.b_c-9", "x" * 128, "..", "-"])
def test_a_name_is_letters_digits_dot_underscore_and_dash(name: str) -> None:
    envelope = parsed(id=name, conversation_id=name, sender=f"agent:{name}", recipient=f"agent:{name}")

    assert (envelope.id, envelope.conversation_id, envelope.agent) == (name, name, name)


@pytest.mark.promise("message.names")
@pytest.mark.parametrize("name", ["", "x" * 129, "a b", "a\n", "a/b", "a:b", "ä", "a\0", "{a}", "*"])
@pytest.mark.parametrize(("field", "prefix"), [("id", ""), ("conversation_id", ""), ("sender", "user:"),
                                               ("recipient", "agent:"), ("recipient", "user:")])  # fmt: skip
def test_anything_else_is_no_name(field: str, prefix: str, name: str) -> None:
    with pytest.raises(ValidationError):
        parsed(**{field: prefix + name})


@pytest.mark.promise("message.names")
@pytest.mark.parametrize(
    "changed",
    [
        {"sender": "local"},
        {"sender": "chat:c1"},
        {"recipient": "DevAgent"},
        {"recipient": "chat:c2"},  # another conversation's log
        {"content": None},
        {"content": ""},
        {"content": " \n\t"},
        {"content": 7},
        {"content": ["hello"]},
        {"metadata": []},
        {"metadata": {"on_busy": "wait"}},
        {"metadata": {"on_busy": None}},
        {"type": "event"},
        {"created_at": "yesterday"},
        {"created_at": "2026-11-21T10:00:00"},
        {"surprise": 1},
        {"type": "control", "content": None},
        {"type": "control", "content": "explode"},
        {"type": "control", "content": "cancel", "recipient": "user:ada"},
    ],
    ids=json.dumps,
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        parsed(**changed)


@pytest.mark.parametrize(
    ("recipient", "agent"), [("agent:A", "A"), ("user:ada", None), ("chat:c1", None), ("agent:user", "user")]
)
def test_only_an_agent_is_run(recipient: str, agent: str | None) -> None:
    assert parsed(recipient=recipient).agent == agent


@pytest.mark.promise("message.digest")
def test_the_same_send_later_has_the_same_digest() -> None:
    first, later = parsed(id="m1"), parsed(id="m1")

    assert first.created_at != later.created_at
    assert first.digest() == later.digest()


@pytest.mark.promise("message.digest")
@pytest.mark.parametrize(
    "changed",
    [
        {"content": "hello!"},
        {"sender": "user:ada"},
        {"recipient": "agent:Other"},
        {"conversation_id": "c2"},
        {"metadata": {"a": 1}},
        {"created_at": "2026-11-21T10:00:00Z"},
    ],
    ids=json.dumps,
)
def test_what_the_sender_changes_changes_the_digest(changed: dict[str, Any]) -> None:
    assert parsed(id="m1", **changed).digest() != parsed(id="m1").digest()


@pytest.mark.promise("message.digest")
def test_how_it_is_written_does_not_change_the_digest() -> None:
    one = parsed(metadata={"a": 1, "b": {"c": 2, "d": 3}}, created_at="2026-11-21T10:00:00Z")
    other = parsed(metadata={"b": {"d": 3, "c": 2}, "a": 1}, created_at="2026-11-21T11:00:00+01:00")

    assert one.digest() == other.digest()


@pytest.mark.promise("message.digest")
@given(st.text(min_size=1).filter(str.strip), st.dictionaries(st.text(), st.text() | st.integers() | st.none()))
def test_the_digest_survives_the_queue(content: str, metadata: dict[str, Any]) -> None:
    """A worker has the sender's digest from `Work`; its own envelope has every field and would make another."""
    metadata.pop("on_busy", None)
    envelope = parsed(content=content, metadata=metadata)
    work = Work(envelope=envelope, digest=envelope.digest(), trace_id="t1")

    received = Work.model_validate_json(work.model_dump_json())

    assert received.digest == envelope.digest()
    assert received.envelope == envelope
