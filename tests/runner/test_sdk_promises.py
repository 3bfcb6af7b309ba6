"""What the runner relies on in the Agents SDK: a new version that breaks one of it fails here first."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Protocol, cast

import agents
import pytest
from agents import (
    Agent,
    ModelProvider,
    ModelSettings,
    OpenAIProvider,
    RunConfig,
    RunHooks,
    Runner,
    ToolErrorFormatterArgs,
    UserError,
    function_tool,
)
from agents.items import TResponseInputItem
from agents.models.interface import Model
from agents.run_context import RunContextWrapper
from agents.tool import default_tool_timeout_error_message
from agents.tool_context import ToolContext
from agents.tracing import get_trace_provider
from openai import AsyncOpenAI

from magent2.runner.config import RunnerConfig
from magent2.runner.openai import OpenAIRunner
from magent2.runner.openai_events import REASONING_DELTAS, RESPONSE_ENDS, TEXT_DELTA
from tests.support.stub_model import Reply, Script, StubModel, StubRequest, ToolCall, in_order, obey, running_stub

pytestmark = pytest.mark.anyio


@dataclass
class Watched(RunHooks[Any]):
    """Hooks, a tapped model and tools that leave a line each, in the order it happened."""

    seen: list[str] = field(default_factory=list)
    contexts: list[Any] = field(default_factory=list)
    raise_in: str = ""

    def note(self, name: str) -> None:
        self.seen.append(name)
        if name == self.raise_in:
            raise RuntimeError(f"in {name}")

    async def on_llm_start(self, context: Any, agent: Any, system_prompt: Any, input_items: Any) -> None:
        self.note("llm_start")

    async def on_llm_end(self, context: Any, agent: Any, response: Any) -> None:
        self.note("llm_end")

    async def on_tool_start(self, context: Any, agent: Any, tool: Any) -> None:
        self.contexts.append(context)
        self.note("tool_start")

    async def on_tool_end(self, context: Any, agent: Any, tool: Any, result: Any) -> None:
        self.note("tool_end")

    async def on_handoff(self, context: Any, from_agent: Any, to_agent: Any) -> None:
        self.note("handoff")


class Tapped(Model):
    """A model whose events are noted on their way, as the runner's are."""

    def __init__(self, model: Model, watched: Watched) -> None:
        self.model, self.watched = model, watched
        self.events: list[Any] = []

    async def get_response(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    async def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        stream: Any = self.model.stream_response(*args, **kwargs)
        async for event in stream:
            self.events.append(event)
            if event.type == TEXT_DELTA:
                self.watched.note("delta")
            yield event


class Provider(ModelProvider):
    def __init__(self, model: Model) -> None:
        self.model = model

    def get_model(self, model_name: str | None) -> Model:
        return self.model


@dataclass
class Bench:
    stub: StubModel
    watched: Any
    model: Tapped
    config: RunConfig
    formatted: list[ToolErrorFormatterArgs[Any]]

    def start(self, agent: Agent[Any], given: str | list[Any]) -> Any:
        return Runner.run_streamed(
            agent, cast("str | list[TResponseInputItem]", given), hooks=self.watched, run_config=self.config
        )

    async def run(self, agent: Agent[Any], given: str | list[Any]) -> Any:
        result = self.start(agent, given)
        async with asyncio.timeout(10):
            async for _ in result.stream_events():
                pass
        return result


class MakeBench(Protocol):
    """The SDK, set up as the runner does, for the length of the block."""

    def __call__(
        self, script: Script = obey, *, responses: bool = True, raise_in: str = ""
    ) -> AbstractAsyncContextManager[Bench]: ...


@pytest.fixture(scope="module")
async def stub() -> AsyncIterator[StubModel]:
    """One model server for all tests, since stopping one takes a tenth of a second; `bench` starts it afresh."""
    async with running_stub() as running:
        yield running


@pytest.fixture
def bench(stub: StubModel) -> MakeBench:
    @asynccontextmanager
    async def opened(script: Script = obey, *, responses: bool = True, raise_in: str = "") -> AsyncIterator[Bench]:
        stub.script, stub.hung_up = script, 0
        stub.requests.clear()
        client = AsyncOpenAI(api_key="none", base_url=stub.base_url, max_retries=0)
        watched = Watched(raise_in=raise_in)
        wire = OpenAIProvider(openai_client=client, use_responses=responses)
        model = Tapped(wire.get_model("stub-model"), watched)
        formatted: list[ToolErrorFormatterArgs[Any]] = []
        config = RunConfig(
            model_provider=Provider(model),
            model_settings=ModelSettings(include_usage=True),
            tracing_disabled=True,
            tool_error_formatter=formatted.append,  # returns None: the SDK's own text stays
            tool_not_found_behavior="return_error_to_model",
        )
        try:
            yield Bench(stub, watched, model, config, formatted)
        finally:
            await client.close()

    return opened


def agent_with(*tools: Any, **more: Any) -> Agent[Any]:
    return Agent(name="A", tools=list(tools), **more)


@pytest.fixture(params=[True, False], ids=["responses", "chat"])
def responses(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_this_is_the_version_it_was_measured_on() -> None:
    assert version("openai-agents").startswith("0.24")


# ---------------------------------------------------------------- the order of things


async def test_every_delta_passes_the_tap_before_the_hook_of_its_turns_end(bench: MakeBench, responses: bool) -> None:
    async with bench(responses=responses) as desk:
        await desk.run(agent_with(), "count 3")

    assert desk.watched.seen == ["llm_start", "delta", "delta", "delta", "llm_end"]


async def test_the_tap_sees_a_delta_before_the_consumer_does(bench: MakeBench) -> None:
    gate = asyncio.Event()
    async with bench(lambda _request: Reply("one two three", gate=gate, gate_after=1)) as desk:
        result = desk.start(agent_with(), "go")
        async with asyncio.timeout(10):
            async for event in result.stream_events():
                if event.type == "raw_response_event" and event.data.type == TEXT_DELTA:
                    assert "delta" in desk.watched.seen
                    gate.set()

    assert desk.watched.seen.count("delta") == 3


async def test_a_tool_runs_between_its_two_hooks_and_after_its_model_turn(bench: MakeBench, responses: bool) -> None:
    async with bench(responses=responses) as desk:

        @function_tool
        async def work() -> str:
            desk.watched.note("effect")
            return "done"

        await desk.run(agent_with(work), "call work {}")

    order = [name for name in desk.watched.seen if name != "delta"]
    assert order == ["llm_start", "llm_end", "tool_start", "effect", "tool_end", "llm_start", "llm_end"]


async def test_the_start_hook_of_a_parallel_call_comes_before_its_effect(bench: MakeBench) -> None:
    seen: list[str] = []

    class Hooks(RunHooks[Any]):
        async def on_tool_start(self, context: Any, agent: Any, tool: Any) -> None:
            seen.append(f"start {context.tool_arguments}")

        async def on_tool_end(self, context: Any, agent: Any, tool: Any, result: Any) -> None:
            seen.append(f"end {context.tool_arguments}")

    @function_tool
    async def work(n: int) -> str:
        seen.append(f'effect {{"n": {n}}}')
        return "done"

    async with bench() as desk:
        desk.watched = Hooks()
        await desk.run(agent_with(work), 'calls work {"n": 1} ; work {"n": 2}')

    for arguments in ('{"n": 1}', '{"n": 2}'):
        assert [name.split()[0] for name in seen if name.endswith(arguments)] == ["start", "effect", "end"]


async def test_a_hook_that_waits_holds_the_effect_back(bench: MakeBench) -> None:
    gate = asyncio.Event()
    started = asyncio.Event()

    class Slow(RunHooks[Any]):
        async def on_tool_start(self, context: Any, agent: Any, tool: Any) -> None:
            started.set()
            await gate.wait()

    effects: list[str] = []

    @function_tool
    async def work() -> str:
        effects.append("done")
        return "done"

    async with bench() as desk:
        result = Runner.run_streamed(agent_with(work), "call work {}", hooks=Slow(), run_config=desk.config)

        async def consume() -> None:
            async for _ in result.stream_events():
                pass

        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            group.create_task(consume())
            await started.wait()
            for _ in range(50):
                await asyncio.sleep(0)
            assert effects == []
            gate.set()

    assert effects == ["done"]


async def test_a_hand_off_has_its_own_hook_and_no_tool_hook(bench: MakeBench) -> None:
    back = Agent[Any](name="Back")
    async with bench(in_order(Reply(calls=(ToolCall("transfer_to_back"),)), Reply("here"))) as desk:
        result = await desk.run(agent_with(handoffs=[back]), "go")

    order = [name for name in desk.watched.seen if name != "delta"]
    assert order == ["llm_start", "llm_end", "handoff", "llm_start", "llm_end"]
    assert result.final_output == "here"


# ---------------------------------------------------------------- names and shapes


async def test_a_tool_hook_is_told_the_calls_id_name_and_arguments(bench: MakeBench, responses: bool) -> None:
    @function_tool
    async def work(n: int) -> str:
        return "done"

    async with bench(responses=responses) as desk:
        await desk.run(agent_with(work), 'call work {"n": 1}')

    [context] = desk.watched.contexts
    assert isinstance(context, ToolContext)
    assert (context.tool_name, context.tool_arguments) == ("work", '{"n": 1}')
    assert context.tool_call is not None
    assert context.tool_call.call_id == context.tool_call_id


async def test_what_a_run_added_is_what_follows_its_input(bench: MakeBench, responses: bool) -> None:
    @function_tool
    async def work() -> str:
        return "worked"

    given = [{"role": "user", "content": "before"}, {"role": "user", "content": "call work {}"}]
    async with bench(responses=responses) as desk:
        result = await desk.run(agent_with(work), given)

    items = result.to_input_list()
    assert items[: len(given)] == given
    assert [item.get("type") for item in items[len(given) :]] == ["function_call", "function_call_output", "message"]


async def test_the_events_have_these_names(bench: MakeBench, responses: bool) -> None:
    async with bench(responses=responses) as desk:
        await desk.run(agent_with(), "think hard")

    kinds = [event.type for event in desk.model.events]
    assert TEXT_DELTA in kinds
    assert REASONING_DELTAS.intersection(kinds)
    assert kinds[-1] == "response.completed"
    assert "response.completed" in RESPONSE_ENDS


async def test_usage_is_counted_on_both_wires(bench: MakeBench, responses: bool) -> None:
    async with bench(responses=responses) as desk:
        result = await desk.run(agent_with(), "count 3")

    usage = result.context_wrapper.usage
    assert (usage.requests, usage.output_tokens) == (1, 3)
    assert usage.total_tokens == usage.input_tokens + 3


async def test_on_the_chat_wire_nobody_says_that_an_answer_was_cut_off(bench: MakeBench) -> None:
    """A known gap: `finish_reason: length` is dropped, and the run ends as if the answer were whole."""
    async with bench(responses=False) as desk:
        result = await desk.run(agent_with(), "incomplete")

    assert result.final_output == "this is not the"
    assert desk.model.events[-1].type == "response.completed"


async def test_an_unfinished_answer_on_the_responses_wire_raises(bench: MakeBench) -> None:
    async with bench() as desk:
        with pytest.raises(agents.ModelBehaviorError):
            await desk.run(agent_with(), "incomplete")

    assert desk.model.events[-1].type == "response.incomplete"


async def test_a_tools_exception_reaches_the_formatter_but_not_the_model(bench: MakeBench, responses: bool) -> None:
    @function_tool
    async def boom() -> str:
        raise ValueError("hunter2")

    async with bench(responses=responses) as desk:
        await desk.run(agent_with(boom), "call boom {}")
        request = StubRequest(desk.stub.requests[-1]["wire"], desk.stub.bodies[-1])

    [told] = desk.formatted
    assert isinstance(told.error, ValueError)
    assert told.call_id == desk.watched.contexts[0].tool_call_id
    assert "hunter2" not in str(request.body)


async def test_an_unknown_tool_reaches_the_formatter_and_the_model_may_go_on(bench: MakeBench) -> None:
    async with bench() as desk:
        result = await desk.run(agent_with(), "call nothing {}")

    [told] = desk.formatted
    assert (told.kind, told.tool_name) == ("tool_not_found", "nothing")
    assert desk.watched.contexts == []
    assert result.final_output.startswith("done: ")


async def test_a_tool_that_is_late_says_so_in_these_words(bench: MakeBench) -> None:
    @function_tool(timeout=0.01)
    async def late() -> str:
        await asyncio.Event().wait()
        raise NotImplementedError

    async with bench() as desk:
        result = await desk.run(agent_with(late), "call late {}")

    words = default_tool_timeout_error_message(tool_name="late", timeout_seconds=0.01)
    assert result.final_output == f"done: {words}"


@pytest.mark.parametrize("hook", ["llm_start", "llm_end", "tool_start", "tool_end"])
async def test_an_exception_in_a_hook_ends_the_run_with_the_hooks_error_inside(bench: MakeBench, hook: str) -> None:
    @function_tool
    async def work() -> str:
        return "done"

    async with bench(raise_in=hook) as desk:
        with pytest.raises((RuntimeError, UserError)) as raised:
            await desk.run(agent_with(work), "call work {}")

    error: BaseException | None = raised.value
    while error is not None and str(error) != f"in {hook}":
        error = error.__cause__
    assert error is not None, "the hook's own error is not in the chain of causes"


def test_the_model_interface_has_the_parts_that_are_passed_on() -> None:
    for name in ("get_response", "stream_response", "get_retry_advice", "close", "_cleanup_on_run_end"):
        assert callable(getattr(Model, name)), name


def test_an_agents_hand_off_knows_its_agent() -> None:
    back = Agent[Any](name="Back")
    made = agents.handoff(back)

    assert made._agent_ref is not None
    assert made._agent_ref() is back


async def test_an_agents_tools_can_be_asked_for_without_a_run() -> None:
    @function_tool
    async def work() -> str:
        raise NotImplementedError

    assert await agent_with(work).get_all_tools(RunContextWrapper(None)) == [work]


def test_the_hooks_take_what_ours_take() -> None:
    expected = {
        "on_llm_start": ["self", "context", "agent", "system_prompt", "input_items"],
        "on_llm_end": ["self", "context", "agent", "response"],
        "on_tool_start": ["self", "context", "agent", "tool"],
        "on_tool_end": ["self", "context", "agent", "tool", "result"],
        "on_handoff": ["self", "context", "from_agent", "to_agent"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(RunHooks, name)).parameters) == parameters


# ---------------------------------------------------------------- nothing leaves


async def test_no_trace_is_handed_to_anybody_once_a_runner_was_made() -> None:
    runner = OpenAIRunner(RunnerConfig(api_key="none", base_url="http://127.0.0.1:1/v1"))
    provider: Any = get_trace_provider()
    await runner.aclose()

    assert provider._multi_processor._processors == ()


async def test_a_cancelled_run_closes_the_models_stream(bench: MakeBench) -> None:
    gate = asyncio.Event()
    async with bench(lambda _request: Reply("one two three", gate=gate, gate_after=1)) as desk:
        result = desk.start(agent_with(), "go")
        async with asyncio.timeout(10):
            async for event in result.stream_events():
                if event.type == "raw_response_event" and event.data.type == TEXT_DELTA:
                    result.cancel()
            while desk.stub.hung_up == 0:
                await asyncio.sleep(0.005)

    assert desk.watched.seen == ["llm_start", "delta"]
