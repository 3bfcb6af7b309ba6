"""What a runner is made from; the environment is read in `settings`, not here."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from magent2.errors import BadAgent

ModelApi = Literal["responses", "chat_completions"]


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """One worker's runner. `agent` is a `module:attribute` of the user's own agent, or None for the built-in one.

    `api_key` and `base_url` are None when not set. `tools` are the names allowed by `AGENT_TOOLS`.
    """

    name: str = "DevAgent"
    model: str = "gpt-4o-mini"
    instructions: str | None = None
    max_turns: int = 10
    api_key: str | None = None
    base_url: str | None = None
    model_api: ModelApi = "responses"
    agent: str | None = None
    tools: tuple[str, ...] = ()
    explicit_tools: bool = False

    @property
    def kind(self) -> Literal["echo", "openai"]:
        """The runner this configuration asks for."""
        return "openai" if self.agent or self.api_key or self.base_url else "echo"


def locate_agent(spec: str) -> tuple[str, str]:
    """The module and the attribute of a `module:attribute`, without importing it.

    The current folder is searched first, as for `python -m`. Raises `BadAgent` in plain words.
    """
    module, colon, attribute = spec.partition(":")
    if not (module and colon and attribute):
        raise BadAgent(f"{spec!r} is not MODULE:ATTRIBUTE, for instance my_app:agent")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = find_spec(module)
    except (ImportError, ValueError):  # a parent package is missing, or it is no name at all
        found = None
    if found is None:
        raise BadAgent(f"{spec}: there is no module {module!r} here")
    return module, attribute
