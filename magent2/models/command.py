"""A command to whoever runs a conversation: a record on a topic of its own, so that it is never queued or lost."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Command(BaseModel):
    """Stop what runs or waits for an agent in a conversation.

    With `run_id` it means that run; without, every message of the conversation at or before `place`, a cursor of the
    conversation's log.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    command: Literal["cancel"]
    agent: str
    sender: str
    reason: str
    place: str
    run_id: str | None = None
