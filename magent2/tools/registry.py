"""What tools there are, and which of them an agent gets.

A tool group is an entry point of the group `magent2.tools`: its name is the group's, its object a function that takes
`ToolDeps` and returns `Tool`s. Third parties join the same way. A group that cannot be loaded says why in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from magent2.conversations import Conversations
from magent2.store.interface import Store
from magent2.tools.interface import Tool

logger = logging.getLogger(__name__)

GROUP = "magent2.tools"


@dataclass(frozen=True, slots=True)
class ToolDeps:
    """What tools may be made from. Facts of the run at hand come from `magent2.models.run.current_run`."""

    conversations: Conversations
    store: Store


Build = Callable[[ToolDeps], Sequence[Tool]]


def discover_tools() -> Mapping[str, EntryPoint]:
    """The tool groups installed here, by name; none is imported yet."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def build(deps: ToolDeps, *, allowed: Sequence[str], explicit: bool) -> list[Tool]:
    """The tools an agent gets.

    `allowed` names groups or single tools; when it is empty, all are given, or none if `explicit`. Names that match
    nothing are logged and skipped.
    """
    if not allowed and explicit:
        return []
    built = {name: _built(name, point, deps) for name, point in discover_tools().items()}
    tools = [(group, tool) for group, made in built.items() for tool in made]
    for name in allowed:
        if name not in built and all(tool.name != name for _, tool in tools):
            logger.warning("AGENT_TOOLS: there is no tool or group %r here, skipped", name)
    return [tool for group, tool in tools if not allowed or group in allowed or tool.name in allowed]


def _built(name: str, point: EntryPoint, deps: ToolDeps) -> Sequence[Tool]:
    try:
        make: Build = point.load()
        return make(deps)
    except Exception:  # third-party code may raise anything: the other tools must not go with it
        logger.warning("tool group %r cannot be loaded", name, exc_info=True)
        return ()
