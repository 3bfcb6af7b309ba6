"""What a runner is made from; the environment is read in `settings`, not here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
