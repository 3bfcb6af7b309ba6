"""The models as the SDK sees them, with a tap: every raw event is seen before the SDK queues it.

The SDK's own event stream is no place to take deltas from: it runs ahead of its consumer without bound, and what is
still queued when a run fails is dropped. Behind a tap all deltas of a model call are out before its `on_llm_end`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from importlib import import_module
from typing import Any

import httpx2
from agents import Agent, ModelProvider, OpenAIProvider
from agents.items import ModelResponse, TResponseStreamEvent
from agents.models.interface import Model
from agents.retry import ModelRetryAdvice, ModelRetryAdviceRequest
from openai import AsyncOpenAI

from magent2.runner.config import RunnerConfig

IDLE_S = 120.0
"""A model stream that says nothing for this long has failed."""
CONNECT_S = 5.0

Seen = Callable[[Any], Awaitable[None]]
tap: ContextVar[Seen] = ContextVar("magent2_tap")
"""Who sees the events of the run at hand."""


class TappedModel(Model):
    """A model whose events are seen on their way."""

    def __init__(self, model: Model) -> None:
        self._model = model

    async def get_response(self, *args: Any, **kwargs: Any) -> ModelResponse:
        return await self._model.get_response(*args, **kwargs)

    async def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[TResponseStreamEvent]:
        seen = tap.get()
        stream: Any = self._model.stream_response(*args, **kwargs)
        async with aclosing(stream):
            async for event in stream:
                await seen(event)
                yield event

    def get_retry_advice(self, request: ModelRetryAdviceRequest) -> ModelRetryAdvice | None:
        return self._model.get_retry_advice(request)

    async def close(self) -> None:
        await self._model.close()

    async def _cleanup_on_run_end(self, owner: object) -> None:
        await self._model._cleanup_on_run_end(owner)


class TappedProvider(ModelProvider):
    """Names to tapped models; an agent that names none gets the configured one."""

    def __init__(self, provider: ModelProvider, default: str) -> None:
        self._provider = provider
        self._default = default

    def get_model(self, model_name: str | None) -> Model:
        return TappedModel(self._provider.get_model(model_name or self._default))


def make_client(config: RunnerConfig) -> AsyncOpenAI:
    """One client of one event loop. It repeats nothing: a failed run is tried again by the worker, which can say so."""
    client = AsyncOpenAI(
        # a server of one's own often wants no key, the client always wants one
        api_key=config.api_key or "none",
        base_url=config.base_url,
        max_retries=0,
        timeout=httpx2.Timeout(IDLE_S, connect=CONNECT_S),
    )
    # imported when first used: now, in the thread that imports the SDK, and not while the first message waits (0.9 s)
    _ = client.responses, client.chat.completions
    import_module("openai.lib.streaming.responses")
    import_module("openai.lib.streaming.chat")
    return client


def make_provider(client: AsyncOpenAI, config: RunnerConfig) -> ModelProvider:
    """The provider for the configured wire. Model names are passed exactly as written, slashes included."""
    wire = OpenAIProvider(openai_client=client, use_responses=config.model_api == "responses")
    return TappedProvider(wire, config.model)


def tapped(agent: Agent[Any], model: str, seen: dict[int, Agent[Any]] | None = None) -> Agent[Any]:
    """A copy of the agent, and of those it can hand off to, whose own models are tapped; the user's stay untouched."""
    seen = {} if seen is None else seen
    if id(agent) in seen:
        return seen[id(agent)]
    own = agent.model
    copy = agent.clone(model=TappedModel(own) if isinstance(own, Model) else own or model)
    seen[id(agent)] = copy
    copy.handoffs = [tapped(to, model, seen) if isinstance(to, Agent) else to for to in agent.handoffs]
    return copy
