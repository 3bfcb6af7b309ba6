"""The seams for optional pieces: what a folder of `magent2/ext` may add, as plain lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module

from starlette.routing import BaseRoute

from magent2.conversations import Accepted
from magent2.errors import BadSettings
from magent2.middleware import Middleware
from magent2.models.envelope import MessageEnvelope


@dataclass(frozen=True, slots=True)
class Extension:
    """One optional piece: rules around `send`, and routes of the gateway."""

    name: str
    on_send: Sequence[Middleware[MessageEnvelope, Accepted]] = ()
    routes: Sequence[BaseRoute] = ()


def load(names: Iterable[str]) -> list[Extension]:
    """The extensions `magent2.ext.<name>.extension`, in the order named. Raises `BadSettings` for an unknown one."""
    found = []
    for name in names:
        try:
            found.append(import_module(f"magent2.ext.{name}").extension)
        except ModuleNotFoundError as error:
            raise BadSettings(f"there is no extension {name!r} ({error})") from None
    return found
