"""What a tool is: a name, a JSON schema and an async function, nothing of any SDK."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

Invoke = Callable[[dict[str, Any]], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Tool:
    """One function the model may call.

    `schema` is the JSON schema of its arguments, an object. `invoke` gets them parsed and returns what the model
    reads; an exception it raises is told to the model as a short error. `idempotent`: after a crash a call whose
    outcome is unknown may be run again. `needs_approval`: each call waits for a person.
    """

    name: str
    description: str
    schema: dict[str, Any]
    invoke: Invoke
    idempotent: bool = False
    needs_approval: bool = False


def idempotent(tool: T) -> T:
    """Say of a tool, one of the SDK's too, that a call whose outcome a crash left unknown may be run again."""
    tool.magent2_idempotent = True  # type: ignore[attr-defined]
    return tool


def is_idempotent(tool: object) -> bool:
    """Whether a call of this tool may be run again."""
    return bool(getattr(tool, "magent2_idempotent", False))
