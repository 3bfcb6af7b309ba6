"""The agent a worker runs: the built-in one, or the user's own, imported from `module:attribute` as uvicorn does."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from agents import Agent, FunctionTool, Handoff

from magent2.errors import BadAgent
from magent2.runner.config import RunnerConfig, locate_agent
from magent2.runner.openai_models import tapped

INSTRUCTIONS = "You are a helpful assistant."


def load_agent(config: RunnerConfig, tools: Sequence[FunctionTool] = ()) -> Agent[Any]:
    """A tapped copy of the agent with these tools. Raises `BadAgent` in plain words."""
    if config.agent is None:
        agent: Agent[Any] = Agent(
            name=config.name, instructions=config.instructions or INSTRUCTIONS, model=config.model, tools=list(tools)
        )
    else:
        agent = _imported(config.agent)
        if tools:
            agent = agent.clone(tools=[*agent.tools, *tools])
    return tapped(agent, config.model)


def reachable(agent: Agent[Any]) -> dict[str, Agent[Any]]:
    """The agent and all it can hand off to, by name."""
    found: dict[str, Agent[Any]] = {}
    waiting = [agent]
    while waiting:
        next_one = waiting.pop()
        if next_one.name in found:
            continue
        found[next_one.name] = next_one
        for handoff in next_one.handoffs:
            to = handoff._agent_ref() if isinstance(handoff, Handoff) and handoff._agent_ref else handoff
            if isinstance(to, Agent):
                waiting.append(to)
    return found


def _imported(spec: str) -> Agent[Any]:
    module_name, attribute = locate_agent(spec)
    try:
        found: Any = import_module(module_name)
    except Exception as error:
        raise BadAgent(f"{spec}: importing {module_name!r} raised {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise BadAgent(f"{spec}: {module_name!r} has no attribute {attribute!r}")
        found = getattr(found, part)
    return _made(spec, found)


def _made(spec: str, found: Any) -> Agent[Any]:
    if not isinstance(found, Agent) and callable(found):
        try:
            found = found()
        except Exception as error:
            raise BadAgent(f"{spec}: calling it raised {type(error).__name__}: {error}") from error
    if not isinstance(found, Agent):
        raise BadAgent(f"{spec} is a {type(found).__name__}, not an agents.Agent or a function that makes one")
    return found
