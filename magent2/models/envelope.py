"""The message envelope: what `POST /send` takes and what travels through a queue."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator

NAME = r"[A-Za-z0-9._-]{1,128}"

Id = Annotated[str, StringConstraints(pattern=rf"^{NAME}\z")]
Sender = Annotated[str, StringConstraints(pattern=rf"^(user|agent):{NAME}\z")]
Recipient = Annotated[str, StringConstraints(pattern=rf"^(agent|chat|user):{NAME}\z")]
UtcTime = Annotated[AwareDatetime, AfterValidator(lambda time: time.astimezone(UTC))]

COMMANDS = ("cancel", "approve", "reject")
BusyPolicy = Literal["queue", "reject", "interrupt", "steer"]


class MessageEnvelope(BaseModel):
    """One message from a sender to a recipient in a conversation.

    {"id": "6f1c…", "conversation_id": "conv-1", "sender": "user:local", "recipient": "agent:DevAgent",
     "type": "message", "content": "hello", "metadata": {}, "created_at": "2026-11-21T10:00:00Z"}

    A recipient `agent:<Name>` runs that agent; `chat:<conversation_id>` and `user:<name>` only write into
    the log. For a control message `content` is the command and `metadata` its arguments.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Id = Field(default_factory=lambda: str(uuid4()))
    conversation_id: Id
    sender: Sender
    recipient: Recipient
    type: Literal["message", "control"] = "message"
    content: str | None
    metadata: dict[str, Any] = Field(default_factory=dict)
    created_at: UtcTime = Field(default_factory=lambda: datetime.now(UTC))

    @model_validator(mode="after")
    def _content_fits_type(self) -> MessageEnvelope:
        if self.type == "message":
            if self.content is None or not self.content.strip():
                raise ValueError("content must not be empty")
        elif self.content not in COMMANDS:
            raise ValueError(f"a control message's content is one of {', '.join(COMMANDS)}")
        elif self.agent is None:
            raise ValueError("a control message goes to agent:<Name>")
        if self.recipient.startswith("chat:") and self.recipient != f"chat:{self.conversation_id}":
            raise ValueError("a chat: recipient names the conversation the message is in")
        if self.metadata.get("on_busy", "queue") not in ("queue", "reject", "interrupt", "steer"):
            raise ValueError("metadata.on_busy is one of queue, reject, interrupt, steer")
        return self

    @property
    def agent(self) -> str | None:
        """The agent this message runs, or None."""
        kind, _, name = self.recipient.partition(":")
        return name if kind == "agent" else None

    @property
    def on_busy(self) -> BusyPolicy:
        """What to do when the conversation already has work for this agent."""
        policy: BusyPolicy = self.metadata.get("on_busy", "queue")
        return policy

    def digest(self) -> str:
        """A digest of what the sender sent: never of generated fields, so a retry has the same one."""
        sent = self.model_dump(mode="json", include=self.model_fields_set - {"id"})
        canonical = json.dumps(sent, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


class Work(BaseModel):
    """What lies in an agent's queue: the envelope and what magent2 itself must know of it.

    `digest` is the sender's (see `MessageEnvelope.digest`); `origin` tells one acceptance of a message from another;
    `generation` grows with each redrive from the dead letters; `trace_id` and `hops` follow a chain of agents that call
    agents.
    """

    model_config = ConfigDict(frozen=True)

    envelope: MessageEnvelope
    digest: str
    origin: str = ""
    generation: int = 0
    trace_id: str
    hops: int = 0
