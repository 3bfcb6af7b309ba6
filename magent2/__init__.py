"""magent2: the runtime that puts agents written with the OpenAI Agents SDK into service."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magent2.client.api import GatewayClient
    from magent2.models.envelope import MessageEnvelope
    from magent2.tools.interface import Tool, idempotent

__version__ = "0.1.0"

__all__ = ["GatewayClient", "MessageEnvelope", "Tool", "__version__", "idempotent"]

_HOME = {
    "GatewayClient": "magent2.client.api",
    "MessageEnvelope": "magent2.models.envelope",
    "Tool": "magent2.tools.interface",
    "idempotent": "magent2.tools.interface",
}


def __getattr__(name: str) -> Any:
    # imported when asked for: the command line must not pay for them
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
