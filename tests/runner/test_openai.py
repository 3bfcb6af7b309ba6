"""The runner for the Agents SDK, in process, against a model server on a socket."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx2
import openai
import pytest
from agents import (
    Agent,
    GuardrailFunctionOutput,
    InputGuardrail,
    InputGuardrailTripwireTriggered,
    MaxTurnsExceeded,
    ModelBehaviorError,
    ModelRefusalError,
    ModelResponse,
    OpenAIChatCompletionsModel,
    OutputGuardrail,
    StopAtTools,
    UserError,
    function_tool,
)
from agents.exceptions import ModelTimeoutError
from agents.models.interface import Model
from agents.usage import Usage as SdkUsage
from openai import AsyncOpenAI
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseFunctionWebSearch,
    ResponseOutputMessage,
    ResponseOutputText,
)
from openai.types.responses.response_function_web_search import ActionSearch
from pydantic import BaseModel

from magent2.errors import BadAgent, LeaseLost, RunFailed
from magent2.models.envelope import MessageEnvelope
from magent2.models.events import Usage
from magent2.runner.config import ModelApi, RunnerConfig
from magent2.runner.interface import Result, Turn
from magent2.runner.openai import OpenAIRunner
from magent2.runner.openai_errors import as_failed
from magent2.runner.openai_events import finished, portable
from magent2.store.history import (
    NOT_RUN,
    UNKNOWN,
    HandedOff,
    Item,
    JournalEntry,
    ModelTurn,
    ToolEnded,
    ToolStarted,
    journal_items,
    open_calls,
    repair,
    started_calls,
    user_item,
)
from magent2.tools.interface import Tool, idempotent
from tests.support.stub_model import (
    Frame,
    Reply,
    ResponsesAnswer,
    Script,
    StubModel,
    StubRequest,
    ToolCall,
    in_order,
    obey,
    running_stub,
)
from tests.support.wait import wait_until

pytestmark = pytest.mark.anyio

SECRET = "sk-proj-abcdefghijklmnop"
WIRES: tuple[ModelApi, ...] = ("responses", "chat_completions")


# ---------------------------------------------------------------- what a run is given, and what it did


@dataclass
class Recorder:
    """A sink and a journal that remember everything in the order it happened, effects of tools included."""

    trace: list[tuple[Any, ...]] = field(default_factory=list)
    entries: list[JournalEntry] = field(default_factory=list)
    lose_at: type[ModelTurn | ToolStarted | ToolEnded] | None = None
    """The job is lost when an entry of this kind is to be journalled."""

    def token(self, text: str, turn: int) -> None:
        self.trace.append(("token", text, turn))

    def reasoning(self, text: str, turn: int) -> None:
        self.trace.append(("reasoning", text, turn))

    def tool_step(self, **fields: Any) -> None:
        fields = {"result_summary": None, "error": None, "duration_ms": None, **fields}
        self.trace.append(("tool_step", fields["status"], fields))

    def agent_updated(self, from_: str, to: str) -> None:
        self.trace.append(("agent_updated", from_, to))

    def log(self, level: str, component: str, message: str) -> None:
        self.trace.append(("log", level, message))

    async def breathe(self) -> None:
        await asyncio.sleep(0)

    async def flush(self) -> None:
        self.trace.append(("flush",))

    async def record(self, entry: JournalEntry) -> None:
        if self.lose_at is not None and isinstance(entry, self.lose_at):
            raise LeaseLost
        await asyncio.sleep(0)  # as the store would
        self.entries.append(entry)
        self.trace.append(("journal", type(entry).__name__))

    def effect(self, what: str) -> None:
        self.trace.append(("effect", what))

    @property
    def effects(self) -> list[str]:
        return [entry[1] for entry in self.trace if entry[0] == "effect"]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [entry[2] for entry in self.trace if entry[0] == "tool_step"]

    def said(self, turn: int | None = None) -> str:
        return "".join(entry[1] for entry in self.trace if entry[0] == "token" and turn in (None, entry[2]))

    @property
    def order(self) -> list[str]:
        """What happened, each run of tokens as one."""
        names = [entry[0] if entry[0] in ("token", "flush") else " ".join(map(str, entry[:2])) for entry in self.trace]
        return [name for place, name in enumerate(names) if name != "token" or names[place - 1 : place] != ["token"]]


here: ContextVar[Recorder] = ContextVar("recorder")
"""Where tools leave their effects."""


@dataclass
class Bench:
    """A runner, its model, and a way to have it answer."""

    runner: OpenAIRunner
    stub: StubModel
    wire: ModelApi

    async def answer(
        self,
        content: str,
        *,
        journal: Sequence[JournalEntry] = (),
        history: Sequence[Item] = (),
        recorder: Recorder | None = None,
    ) -> tuple[Result, Recorder]:
        recorder = recorder or Recorder()
        here.set(recorder)
        envelope = MessageEnvelope.model_validate(
            {
                "id": "m1",
                "conversation_id": "c1",
                "sender": "user:test",
                "recipient": "agent:DevAgent",
                "type": "message",
                "content": content,
            }
        )
        turn = Turn(
            envelope=envelope,
            run_id="r1",
            history=list(history),
            journal=tuple(journal),
            sink=recorder,
            record=recorder.record,
        )
        async with asyncio.timeout(10):
            result = await self.runner.run(turn)
        assert isinstance(result, Result)
        return result, recorder

    async def failing(self, content: str, **more: Any) -> RunFailed:
        with pytest.raises(RunFailed) as failed:
            await self.answer(content, **more)
        return failed.value

    @property
    def requests(self) -> list[StubRequest]:
        return [StubRequest(request["wire"], request["body"]) for request in self.stub.requests]


class MakeBench(Protocol):
    """A runner for an agent of this module, or for the built-in one, for the length of the block."""

    def __call__(
        self,
        script: Script = obey,
        *,
        agent: str | None = "stepper",
        wire: ModelApi = "responses",
        tools: Sequence[Tool] = (),
        **config: Any,
    ) -> AbstractAsyncContextManager[Bench]: ...


@pytest.fixture(scope="module")
async def stub() -> AsyncIterator[StubModel]:
    """One model server for all tests, since stopping one takes a tenth of a second; `bench` starts it afresh."""
    async with running_stub() as running:
        yield running


@pytest.fixture
def bench(stub: StubModel) -> MakeBench:
    @asynccontextmanager
    async def opened(
        script: Script = obey,
        *,
        agent: str | None = "stepper",
        wire: ModelApi = "responses",
        tools: Sequence[Tool] = (),
        **config: Any,
    ) -> AsyncIterator[Bench]:
        stub.script, stub.hung_up = script, 0
        stub.requests.clear()
        spec = None if agent is None else f"{__name__}:{agent}"
        runner = OpenAIRunner(
            RunnerConfig(
                base_url=stub.base_url, api_key=SECRET, model="stub-model", model_api=wire, agent=spec, **config
            ),
            tools,
        )
        try:
            yield Bench(runner, stub, wire)
        finally:
            await runner.aclose()

    return opened


# ---------------------------------------------------------------- agents of a user


@function_tool
async def step(n: int) -> str:
    here.get().effect(f"step {n}")
    return f"step {n} done"


@function_tool
async def boom() -> str:
    raise ValueError(f"cannot use {SECRET}")


@function_tool
async def endless() -> str:
    here.get().effect("begun")
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        here.get().effect("cancelled")
        raise
    raise NotImplementedError


@function_tool
async def meet(n: int) -> str:
    """Ends only when two of its kind are running."""
    here.get().effect(f"meet {n}")
    async with asyncio.timeout(5):
        while len(here.get().effects) < 2:
            await asyncio.sleep(0)
    return f"met {n}"


@idempotent
@function_tool
async def look(n: int) -> str:
    here.get().effect(f"look {n}")
    return f"saw {n}"


@idempotent
@function_tool
async def stumble() -> str:
    raise ValueError(f"cannot use {SECRET}")


@idempotent
@function_tool(failure_error_function=None)
async def fall() -> str:
    raise ValueError(f"cannot use {SECRET}")


class Sum(BaseModel):
    total: int


class Searcher(Model):
    """A model that searches the web on its own server, then answers."""

    output: Sequence[ResponseFunctionWebSearch | ResponseOutputMessage] = (
        ResponseFunctionWebSearch(
            id="ws-1",
            type="web_search_call",
            status="completed",
            action=ActionSearch(type="search", query="weather", queries=["weather"]),
        ),
        ResponseOutputMessage(
            id="msg-1",
            type="message",
            role="assistant",
            status="completed",
            content=[ResponseOutputText(type="output_text", text="it rains", annotations=[])],
        ),
    )

    async def get_response(self, *args: Any, **kwargs: Any) -> ModelResponse:
        return ModelResponse(output=list(self.output), usage=SdkUsage(), response_id=None)

    async def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        response = Response(
            id="resp-1",
            created_at=0,
            model="searcher",
            object="response",
            output=list(self.output),
            parallel_tool_calls=True,
            tool_choice="auto",
            tools=[],
        )
        yield ResponseCompletedEvent(type="response.completed", sequence_number=0, response=response)


def trip(context: Any, agent: Any, given: Any) -> GuardrailFunctionOutput:
    return GuardrailFunctionOutput(output_info=SECRET, tripwire_triggered=True)


def pass_(context: Any, agent: Any, given: Any) -> GuardrailFunctionOutput:
    return GuardrailFunctionOutput(output_info=None, tripwire_triggered=False)


stepper = Agent[None](name="Stepper", instructions="You take steps.", tools=[step, boom, endless, meet, look])
clumsy = Agent[None](name="Stepper", tools=[stumble, fall])
hasty = Agent[None](name="Stepper", tools=[step, look], tool_use_behavior="stop_on_first_tool")
stopping = Agent[None](
    name="Stepper", tools=[step, look], tool_use_behavior=StopAtTools(stop_at_tool_names=["step", "boom"])
)
content = Agent[None](name="Content", output_guardrails=[OutputGuardrail(pass_)])
judged = Agent[None](name="Judged", output_guardrails=[OutputGuardrail(trip)])
searching = Agent[None](name="Searching", model=Searcher())
back = Agent[None](name="Back", instructions="You are in the back.", tools=[step])
front = Agent[None](name="Front", instructions="You are in front.", handoffs=[back])
helper = Agent[None](name="Helper", instructions="You help.")
boss = Agent[None](name="Boss", tools=[helper.as_tool("helper", "Ask the helper.")])
guarded = Agent[None](name="Guarded", input_guardrails=[InputGuardrail(trip)])
adder = Agent[None](name="Adder", output_type=Sum)


# ---------------------------------------------------------------- one answer


@pytest.fixture(params=WIRES)
def wire(request: pytest.FixtureRequest) -> ModelApi:
    given: ModelApi = request.param
    return given


async def test_the_tokens_are_the_answer(bench: MakeBench, wire: ModelApi) -> None:
    async with bench(agent=None, wire=wire) as desk:
        result, recorder = await desk.answer("count 40")

    assert result.text == recorder.said(turn=0) == " ".join(f"t{n}" for n in range(40))
    assert len([entry for entry in recorder.trace if entry[0] == "token"]) == 40
    assert result.items == [user_item("count 40"), {"role": "assistant", "content": result.text}]
    assert result.usage is not None
    assert (result.usage.requests, result.usage.output_tokens) == (1, 40)


async def test_the_model_is_shown_the_history_then_the_message(bench: MakeBench, wire: ModelApi) -> None:
    history = [user_item("my name is Ada"), {"role": "assistant", "content": "hello Ada"}]
    async with bench(agent=None, wire=wire, instructions="Be kind.") as desk:
        await desk.answer("who am I?", history=history)
        [request] = desk.requests

    assert request.messages == [
        ("system", "Be kind."),
        ("user", "my name is Ada"),
        ("assistant", "hello Ada"),
        ("user", "who am I?"),
    ]
    assert (request.wire, request.model) == ("chat" if wire == "chat_completions" else "responses", "stub-model")


async def test_reasoning_is_told_apart_from_the_answer_and_not_kept(bench: MakeBench, wire: ModelApi) -> None:
    async with bench(agent=None, wire=wire) as desk:
        result, recorder = await desk.answer("think two by two")

    assert "".join(entry[1] for entry in recorder.trace if entry[0] == "reasoning") == "two by two"
    assert result.text == recorder.said() == "thought: two by two"
    assert [item.get("type") for item in result.items] == [None, None]


async def test_what_is_finished_is_journalled_before_it_is_built_upon(bench: MakeBench, wire: ModelApi) -> None:
    script = in_order(
        Reply("I go.", calls=(ToolCall("step", '{"n": 1}', "call-1"),)),
        Reply("There."),
    )
    async with bench(script, wire=wire) as desk:
        result, recorder = await desk.answer("go")

    assert recorder.order == [
        "token",
        "flush",
        "journal ModelTurn",
        "tool_step start",
        "journal ToolStarted",
        "effect step 1",
        "journal ToolEnded",
        "tool_step success",
        "token",
        "flush",
        "journal ModelTurn",
    ]
    assert (recorder.said(turn=0), recorder.said(turn=1)) == ("I go.", "There.")
    assert result.items == [user_item("go"), *journal_items(recorder.entries)]
    start, end = recorder.steps
    assert (start["tool_call_id"], start["name"], start["args"], start["turn"]) == ("call-1", "step", {"n": 1}, 0)
    assert (end["tool_call_id"], end["result_summary"], end["error"]) == ("call-1", "step 1 done", None)
    assert end["duration_ms"] >= 0


async def test_parallel_calls_run_side_by_side_and_each_is_journalled(bench: MakeBench, wire: ModelApi) -> None:
    async with bench(wire=wire) as desk:
        result, recorder = await desk.answer('calls meet {"n": 1} ; meet {"n": 2}')

    assert result.text == "done: met 1 | met 2"
    assert sorted(recorder.effects) == ["meet 1", "meet 2"]
    for call_id in {step["tool_call_id"] for step in recorder.steps}:
        assert [step["status"] for step in recorder.steps if step["tool_call_id"] == call_id] == ["start", "success"]
        marks = [entry for entry in recorder.entries if getattr(entry, "call_id", None) == call_id]
        assert [type(mark) for mark in marks] == [ToolStarted, ToolEnded]
    turns = [entry.turn for entry in recorder.entries if isinstance(entry, ModelTurn)]
    assert turns == [0, 1]


async def test_a_tool_that_raises_is_an_error_and_the_run_goes_on(bench: MakeBench, wire: ModelApi) -> None:
    async with bench(wire=wire) as desk:
        result, recorder = await desk.answer("call boom {}")

    assert [(step["status"], step["error"]) for step in recorder.steps] == [("start", None), ("error", "ValueError")]
    assert result.text.startswith("done: ")
    assert SECRET not in repr((result, recorder))


async def test_a_tool_of_ours_that_raises_tells_the_model_the_kind_only(bench: MakeBench) -> None:
    async def invoke(arguments: dict[str, Any]) -> str:
        raise ValueError(SECRET)

    tool = Tool("ours", "Raises.", {"type": "object", "properties": {}}, invoke)
    async with bench(agent=None, tools=[tool]) as desk:
        result, recorder = await desk.answer("call ours {}")
        assert desk.requests[0].tools == ["ours"]

    assert result.text == "done: error: ValueError"
    assert [(step["status"], step["error"]) for step in recorder.steps] == [("start", None), ("error", "ValueError")]


async def test_a_tool_that_does_not_exist_is_an_error_and_the_run_goes_on(bench: MakeBench, wire: ModelApi) -> None:
    async with bench(wire=wire) as desk:
        result, recorder = await desk.answer("call nothing {}")

    assert result.text.startswith("done: ")
    assert [(step["name"], step["status"]) for step in recorder.steps] == [("nothing", "error")]
    assert not open_calls(result.items)
    assert not open_calls(journal_items(recorder.entries))


async def test_arguments_that_are_no_json_are_shown_as_they_are(bench: MakeBench) -> None:
    script = in_order(Reply(calls=(ToolCall("step", "{broken", "call-1"),)), Reply("sorry"))
    async with bench(script) as desk:
        result, recorder = await desk.answer("go")

    assert result.text == "sorry"
    assert recorder.effects == []
    assert {step["args"] for step in recorder.steps} <= {"{broken"}


async def test_a_structured_answer_is_what_the_model_wrote(bench: MakeBench) -> None:
    async with bench(in_order(Reply('{"total": 5}')), agent="adder") as desk:
        result, _ = await desk.answer("2 + 3")

    assert json.loads(result.text) == {"total": 5}


async def test_an_agent_used_as_a_tool_talks_to_the_same_server_and_its_words_are_not_the_answer(
    bench: MakeBench,
) -> None:
    script = in_order(
        Reply(calls=(ToolCall("helper", '{"input": "help me"}', "call-1"),)), Reply("helping"), Reply("helped")
    )
    async with bench(script, agent="boss") as desk:
        result, recorder = await desk.answer("go")
        assert [request.last_user for request in desk.requests] == ["go", "help me", "go"]

    assert result.text == recorder.said() == "helped"
    assert recorder.steps[-1]["result_summary"] == "helping"
    assert [entry.turn for entry in recorder.entries if isinstance(entry, ModelTurn)] == [0, 1]


async def test_two_runs_at_once_do_not_hear_each_other(bench: MakeBench) -> None:
    async with bench(agent=None) as desk:
        answers = await asyncio.gather(*(desk.answer(f"slow {n} 2") for n in (5, 9)))

    for result, recorder in answers:
        assert recorder.said() == result.text
    assert [len(result.text.split()) for result, _ in answers] == [5, 9]


async def test_a_model_object_of_the_users_own_streams_too(bench: MakeBench) -> None:
    async with running_stub() as stub:
        client = AsyncOpenAI(api_key="own", base_url=stub.base_url)
        globals()["with_model"] = Agent[None](
            name="Own", model=OpenAIChatCompletionsModel(model="own-model", openai_client=client)
        )
        async with bench(agent="with_model") as desk:
            result, recorder = await desk.answer("count 3")

            assert desk.requests == []
            assert desk.runner.model == "own-model"
        assert stub.bodies[0]["model"] == "own-model"
        await client.close()

    assert result.text == recorder.said() == "t0 t1 t2"
    assert len([entry for entry in recorder.trace if entry[0] == "token"]) == 3


async def test_a_character_cut_in_two_by_the_server_is_whole_in_what_is_kept(bench: MakeBench, wire: ModelApi) -> None:
    # JSON escapes each half for itself: one chunk ends with \\ud83d, the next begins with \\ude00
    script = in_order(Reply("a\ud83d\ude00b", chunk_chars=2))
    async with bench(script, agent=None, wire=wire) as desk:
        result, recorder = await desk.answer("go")

    assert "a\ud83d" in [entry[1] for entry in recorder.trace if entry[0] == "token"]  # it was cut in two
    answer = {"role": "assistant", "content": "a\U0001f600b"}
    assert journal_items(recorder.entries) == [answer]
    assert result.items == [user_item("go"), answer]


@pytest.mark.parametrize(
    "wire",
    [
        "responses",
        "chat_completions",
    ],
)
async def test_a_character_cut_in_two_by_the_server_is_whole_in_the_answer(bench: MakeBench, wire: ModelApi) -> None:
    async with bench(in_order(Reply("a\ud83d\ude00b", chunk_chars=2)), agent=None, wire=wire) as desk:
        result, _ = await desk.answer("go")

    assert result.text == "a\U0001f600b"


async def test_a_tool_of_the_servers_own_is_no_call_of_ours(bench: MakeBench) -> None:
    async with bench(agent="searching") as desk:
        result, recorder = await desk.answer("go")

        assert desk.requests == []
    [turn] = recorder.entries
    assert isinstance(turn, ModelTurn)
    assert [item.get("type", item.get("role")) for item in turn.items] == ["web_search_call", "assistant"]
    assert result.items == [user_item("go"), *turn.items]
    assert result.text == recorder.said() == "it rains"
    assert recorder.steps == []
    assert finished(recorder.entries) == turn
    assert not open_calls(result.items)


def test_an_item_of_a_tool_of_the_servers_own_keeps_its_id() -> None:
    search = {"type": "web_search_call", "id": "ws-1", "status": "completed", "action": {"type": "search"}}

    assert portable([search]) == [search]


# ---------------------------------------------------------------- hand-offs


def transfer(request: StubRequest) -> Reply:
    """The one in front hands off; the one in the back takes a step and ends."""
    system = request.messages[0][1]
    if system == "You are in front.":
        return Reply(calls=(ToolCall("transfer_to_back", "{}", "call-1"),))
    if not any("step" in text for text in request.outputs_since_user):
        return Reply(calls=(ToolCall("step", '{"n": 1}', "call-2"),))
    return Reply("done in the back")


async def test_a_hand_off_is_told_and_journalled(bench: MakeBench, wire: ModelApi) -> None:
    async with bench(transfer, agent="front", wire=wire) as desk:
        result, recorder = await desk.answer("go")

    assert result.text == "done in the back"
    assert ("agent_updated", "Front", "Back") in recorder.trace
    turns = [(entry.turn, entry.agent) for entry in recorder.entries if isinstance(entry, ModelTurn)]
    assert turns == [(0, "Front"), (1, "Back"), (2, "Back")]
    assert [entry.agent for entry in recorder.entries if isinstance(entry, HandedOff)] == ["Back"]
    assert not open_calls(result.items)


async def test_a_run_is_resumed_at_the_agent_it_was_handed_to(bench: MakeBench, wire: ModelApi) -> None:
    async with bench(transfer, agent="front", wire=wire) as desk:
        whole, recorder = await desk.answer("go")
    journal = recorder.entries

    for cut in range(next(n for n, entry in enumerate(journal) if isinstance(entry, HandedOff)) + 1, len(journal) + 1):
        async with bench(transfer, agent="front", wire=wire) as desk:
            result, again = await desk.answer("go", journal=journal[:cut])
            left = sum(isinstance(entry, ModelTurn) for entry in journal[cut:])

            assert result.text == whole.text
            assert all(request.messages[0] == ("system", "You are in the back.") for request in desk.requests)
            assert len(desk.requests) <= left + 1  # an unknown outcome may be asked about once more
            assert not open_calls(result.items)
            assert ("agent_updated", "Front", "Back") not in again.trace


# ---------------------------------------------------------------- resuming


def two_steps(request: StubRequest) -> Reply:
    done = len(request.outputs_since_user)
    if done < 2:
        return Reply(
            f"turn {done}. ", calls=(ToolCall("step", f'{{"n": {done + 1}}}', f"call-{done + 1}"),), usage=(10, 5)
        )
    return Reply(f"all: {' | '.join(request.outputs_since_user)}", usage=(20, 6))


async def whole_run(bench: MakeBench, wire: ModelApi) -> tuple[Result, Recorder]:
    async with bench(two_steps, wire=wire) as desk:
        return await desk.answer("go")


@pytest.mark.parametrize("cut", range(8))
@pytest.mark.promise("run.resume")
async def test_a_run_cut_off_anywhere_goes_on_from_its_journal(bench: MakeBench, wire: ModelApi, cut: int) -> None:
    whole, recorder = await whole_run(bench, wire)
    journal = recorder.entries[:cut]
    assert len(recorder.entries) == 7

    async with bench(two_steps, wire=wire) as desk:
        result, again = await desk.answer("go", journal=journal)
        turns_journalled = sum(isinstance(entry, ModelTurn) for entry in journal)

        # no journalled turn is asked again, and every new one goes by its own number
        assert len(desk.requests) == 3 - turns_journalled
    new_turns = [entry.turn for entry in again.entries if isinstance(entry, ModelTurn)]
    assert new_turns == list(range(turns_journalled, 3))

    # what the model will read next time: the same items, an effect nobody saw the end of said to be so
    open_call = open_calls(journal_items(journal))
    closed = {call["call_id"]: UNKNOWN if call["call_id"] in started_calls(journal) else NOT_RUN for call in open_call}
    assert result.items[:-1] == [
        item | {"output": closed[item["call_id"]]}
        if str(item.get("type")).endswith("_output") and item["call_id"] in closed
        else item
        for item in whole.items[:-1]
    ]
    outputs = [closed.get(f"call-{n}", f"step {n} done") for n in (1, 2)]
    assert result.text == f"all: {' | '.join(outputs)}"
    both = [*journal, *again.entries]
    assert result.items == [user_item("go"), *repair(journal_items(both), started_calls(both))]

    # and no effect twice
    before = sum(isinstance(entry, ToolStarted) for entry in journal)
    assert again.effects == [f"step {n}" for n in (1, 2) if n > before and f"call-{n}" not in closed]
    assert result.usage == whole.usage


async def test_a_finished_journal_asks_nothing(bench: MakeBench, wire: ModelApi) -> None:
    whole, recorder = await whole_run(bench, wire)

    async with bench(two_steps, wire=wire) as desk:
        result, again = await desk.answer("go", journal=recorder.entries)

        assert desk.requests == []
    assert result == whole
    assert again.trace == []


def answered(agent: str) -> list[JournalEntry]:
    """The journal of a run that died right behind its answer."""
    usage = Usage(requests=1, input_tokens=10, output_tokens=5, total_tokens=15)
    return [ModelTurn(turn=0, agent=agent, items=[{"role": "assistant", "content": "an answer"}], usage=usage)]


async def test_an_answer_maybe_never_judged_is_asked_for_again_and_judged(bench: MakeBench, wire: ModelApi) -> None:
    async with bench(in_order(Reply("another answer")), agent="judged", wire=wire) as desk:
        failed = await desk.failing("go", journal=answered("Judged"))

        [request] = desk.requests
        # the answer nobody judged is not shown to the model
        assert [role for role, _ in request.messages] == ["user"]
    assert (failed.code, failed.retryable) == ("guardrail", False)


async def test_an_answer_nothing_judges_is_not_asked_for_again(bench: MakeBench, wire: ModelApi) -> None:
    async with bench(wire=wire) as desk:
        result, again = await desk.answer("go", journal=answered("Stepper"))

        assert desk.requests == []
    assert (result.text, again.trace) == ("an answer", [])


@pytest.mark.parametrize(
    "cut_off_twice",
    [False, True],
)
async def test_an_answer_judged_at_last_is_in_the_history_once(bench: MakeBench, cut_off_twice: bool) -> None:
    journal = answered("Content")
    if cut_off_twice:  # died again behind the answer it had asked for again
        journal += [entry.model_copy(update={"turn": 1}) for entry in journal if isinstance(entry, ModelTurn)]
    async with bench(in_order(Reply("judged")), agent="content") as desk:
        result, recorder = await desk.answer("go", journal=journal)

        assert desk.requests[0].messages == [("user", "go")]
    assert result.items == [user_item("go"), {"role": "assistant", "content": "judged"}]
    assert result.text == recorder.said() == "judged"


async def test_an_answer_in_the_last_turn_allowed_is_still_judged(bench: MakeBench) -> None:
    async with bench(in_order(Reply("judged")), agent="content", max_turns=1) as desk:
        result, _ = await desk.answer("go", journal=answered("Content"))

    assert result.text == "judged"


def begun(call: ToolCall) -> list[JournalEntry]:
    """The journal of a run that died while this tool ran."""
    item = {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments}
    usage = Usage(requests=1, input_tokens=10, output_tokens=5, total_tokens=15)
    return [
        ModelTurn(turn=0, agent="Stepper", items=[item], usage=usage),
        ToolStarted(call_id=call.call_id),
    ]


@pytest.mark.promise("M16")
async def test_a_call_whose_outcome_is_unknown_is_not_run_again(bench: MakeBench, wire: ModelApi) -> None:
    async with bench(wire=wire) as desk:
        result, recorder = await desk.answer(
            'call step {"n": 1}', journal=begun(ToolCall("step", '{"n": 1}', "call-1"))
        )

        assert desk.requests[0].tool_outputs == {"call-1": UNKNOWN}
    assert recorder.effects == []
    assert [
        (step["tool_call_id"], step["status"], step["name"], step["args"], step["turn"]) for step in recorder.steps
    ] == [("call-1", "unknown", "step", {"n": 1}, 0)]
    assert recorder.entries[0] == ToolEnded(
        call_id="call-1", item={"type": "function_call_output", "call_id": "call-1", "output": UNKNOWN}
    )
    assert result.text == f"done: {UNKNOWN}"


@pytest.mark.promise("M16")
async def test_an_idempotent_tool_whose_outcome_is_unknown_is_run_again(bench: MakeBench, wire: ModelApi) -> None:
    async with bench(wire=wire) as desk:
        result, recorder = await desk.answer(
            'call look {"n": 1}', journal=begun(ToolCall("look", '{"n": 1}', "call-1"))
        )

        assert desk.requests[0].tool_outputs == {"call-1": "saw 1"}
    assert recorder.effects == ["look 1"]
    assert [step["status"] for step in recorder.steps][-1] == "success"
    assert recorder.entries[0] == ToolEnded(
        call_id="call-1", item={"type": "function_call_output", "call_id": "call-1", "output": "saw 1"}
    )
    assert result.text == "done: saw 1"


@pytest.mark.parametrize(
    "name",
    [
        "stumble",
        "fall",
    ],
)
async def test_an_idempotent_tool_that_raises_when_run_again_is_an_error(
    bench: MakeBench, wire: ModelApi, name: str
) -> None:
    async with bench(agent="clumsy", wire=wire) as desk:
        result, recorder = await desk.answer(f"call {name} {{}}", journal=begun(ToolCall(name, "{}", "call-1")))

    assert [(step["tool_call_id"], step["status"], step["error"]) for step in recorder.steps] == [
        ("call-1", "error", "ValueError")
    ]
    assert result.text.startswith("done: ")
    assert SECRET not in repr((result, recorder))


def ended(call: ToolCall, output: str) -> list[JournalEntry]:
    """The journal of a run that died right behind this tool."""
    item = {"type": "function_call_output", "call_id": call.call_id, "output": output}
    return [*begun(call), ToolEnded(call_id=call.call_id, item=item)]


@pytest.mark.parametrize("agent", ["hasty", "stopping"])
async def test_a_tool_that_is_the_answer_is_the_answer_of_a_resumed_run_too(
    bench: MakeBench, wire: ModelApi, agent: str
) -> None:
    async with bench(agent=agent, wire=wire) as desk:
        whole, recorder = await desk.answer('call step {"n": 1}')
        assert len(desk.requests) == 1
        desk.stub.requests.clear()
        assert isinstance(recorder.entries[-1], ToolEnded)

        result, again = await desk.answer('call step {"n": 1}', journal=recorder.entries)

        assert desk.requests == []
    assert result == whole
    assert result.text == "step 1 done"
    assert again.trace == []


async def test_a_tool_that_is_not_among_those_that_stop_is_not_the_answer(bench: MakeBench, wire: ModelApi) -> None:
    async with bench(agent="stopping", wire=wire) as desk:
        look = ToolCall("look", '{"n": 1}', "call-1")
        result, _ = await desk.answer('call look {"n": 1}', journal=ended(look, "saw 1"))

        assert len(desk.requests) == 1
    assert result.text == "done: saw 1"


async def test_what_a_run_cost_is_added_up_over_its_attempts(bench: MakeBench, wire: ModelApi) -> None:
    script = in_order(Reply("done", usage=(100, 7)))
    async with bench(script, wire=wire) as desk:
        result, _ = await desk.answer("go", journal=begun(ToolCall("step", '{"n": 1}', "call-1")))

    assert result.usage == Usage(requests=2, input_tokens=110, output_tokens=12, total_tokens=122)


async def test_the_limit_of_turns_counts_those_of_earlier_attempts(bench: MakeBench) -> None:
    async with bench(max_turns=2) as desk:
        steps = 'chain step {"n": 1} ; step {"n": 2} ; step {"n": 3}'
        failed = await desk.failing(steps, journal=begun(ToolCall("step", '{"n": 1}', "call-1")))

        assert len(desk.requests) == 1
    assert failed.code == "max_turns"


async def test_a_resumed_run_without_turns_left_asks_nothing(bench: MakeBench, wire: ModelApi) -> None:
    async with bench(max_turns=1, wire=wire) as desk:
        failed = await desk.failing("go", journal=ended(ToolCall("step", '{"n": 1}', "call-1"), "step 1 done"))

        assert desk.requests == []
    assert (failed.code, failed.retryable) == ("max_turns", False)


# ---------------------------------------------------------------- ending early


async def test_cancelling_a_run_closes_the_models_stream(bench: MakeBench, wire: ModelApi) -> None:
    gate = asyncio.Event()
    async with bench(lambda _request: Reply("one two three", gate=gate, gate_after=1), agent=None, wire=wire) as desk:
        recorder = Recorder()
        running = asyncio.create_task(desk.answer("go", recorder=recorder))
        await wait_until(lambda: recorder.said() != "", description="the first token")

        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await wait_until(lambda: desk.stub.hung_up == 1, timeout_s=2, description="the model hears of it")

    assert recorder.entries == []


async def test_cancelling_a_run_cancels_its_tools(bench: MakeBench, wire: ModelApi) -> None:
    async with bench(wire=wire) as desk:
        recorder = Recorder()
        running = asyncio.create_task(desk.answer("call endless {}", recorder=recorder))
        await wait_until(lambda: recorder.effects == ["begun"], description="the tool runs")

        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await wait_until(lambda: recorder.effects == ["begun", "cancelled"], description="the tool is cancelled")

        assert len(desk.requests) == 1
    assert [type(entry) for entry in recorder.entries] == [ModelTurn, ToolStarted]


@pytest.mark.parametrize("kind", [ModelTurn, ToolStarted, ToolEnded])
async def test_a_run_whose_job_is_lost_ends_as_lost(bench: MakeBench, wire: ModelApi, kind: Any) -> None:
    recorder = Recorder(lose_at=kind)
    async with bench(wire=wire) as desk:
        with pytest.raises(LeaseLost):
            await desk.answer('call step {"n": 1}', recorder=recorder)

        assert len(desk.requests) == 1
    assert recorder.effects == (["step 1"] if kind is ToolEnded else [])


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("reply", "code", "retryable"),
    [
        (Reply(status=400, error=SECRET), "model_error", False),
        (Reply(status=401, error=SECRET), "model_error", False),
        (Reply(status=403, error=SECRET), "model_error", False),
        (Reply(status=404, error=SECRET), "model_error", False),
        (Reply(status=408, error=SECRET), "model_error", True),
        (Reply(status=409, error=SECRET), "model_error", True),
        (Reply(status=413, error=SECRET), "model_error", False),
        (Reply(status=422, error=SECRET), "model_error", False),
        (Reply(status=429, error=SECRET), "model_error", True),
        (Reply(status=500, error=SECRET), "model_error", True),
        (Reply(status=503, error=SECRET), "model_error", True),
        (Reply("one two three", cut_after=2), "model_error", True),
        (Reply("one two three", failed=True, error=SECRET), "model_error", True),
        (Reply("one two three", bad_json=True), "model_error", True),
        (Reply(refusal=SECRET), "model_refusal", False),
    ],
    ids=lambda value: f"{value.status}-{value.text or value.refusal}" if isinstance(value, Reply) else None,
)
async def test_what_the_models_server_does_wrong_is_told_in_our_words(
    bench: MakeBench, wire: ModelApi, reply: Reply, code: str, retryable: bool
) -> None:
    async with bench(lambda _request: reply, agent=None, wire=wire) as desk:
        failed = await desk.failing("go")

        assert len(desk.requests) == 1  # trying again is the worker's business
    assert (failed.code, failed.retryable) == (code, retryable), str(failed)
    assert SECRET not in str(failed)


async def test_a_stream_that_just_stops_may_be_tried_again(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the Responses wire: the HTTP response ends as it should, the model's has no end."""
    frames = ResponsesAnswer.frames
    ends: list[Frame] = []

    def endless_frames(answer: ResponsesAnswer) -> Iterator[Frame]:
        *but_last, last = frames(answer)
        ends.append(last)
        return iter(but_last)

    monkeypatch.setattr(ResponsesAnswer, "frames", endless_frames)
    async with bench(lambda _request: Reply("one two three"), agent=None) as desk:
        recorder = Recorder()
        failed = await desk.failing("go", recorder=recorder)

        assert len(desk.requests) == 1
    assert [end.data.splitlines()[0] for end in ends] == ["event: response.completed"]
    assert recorder.said() == "one two three"
    assert (failed.code, failed.retryable) == ("model_error", True)
    assert recorder.entries == []


async def test_an_answer_cut_off_at_the_models_limit_is_no_answer(bench: MakeBench) -> None:
    """On the Responses wire: on the other the SDK hides it, see test_sdk_promises.py."""
    async with bench(agent=None) as desk:
        failed = await desk.failing("incomplete")

    assert (failed.code, failed.retryable) == ("model_error", False)
    assert "cut off at its token limit" in str(failed)


async def test_a_server_that_says_when_to_come_back_is_heeded(bench: MakeBench, wire: ModelApi) -> None:
    async with bench(lambda _request: Reply(status=429, headers=(("retry-after", "7"),)), wire=wire) as desk:
        assert (await desk.failing("go")).retry_after_s == 7.0


async def test_a_server_nobody_listens_at_may_come_back(bench: MakeBench, wire: ModelApi) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    async with bench(agent=None, wire=wire) as desk:
        desk.runner = OpenAIRunner(RunnerConfig(base_url=url, api_key=SECRET, model_api=wire))
        failed = await desk.failing("go")
        await desk.runner.aclose()

    assert (failed.code, failed.retryable) == ("model_error", True)


async def test_a_guardrail_that_trips_is_an_error_that_tells_nothing_more(bench: MakeBench) -> None:
    async with bench(agent="guarded") as desk:
        failed = await desk.failing("go")

    assert (failed.code, failed.retryable) == ("guardrail", False)
    assert SECRET not in str(failed)


def status_error(status: int, body: object = None, **headers: str) -> openai.APIStatusError:
    request = httpx2.Request("POST", "http://model/v1")
    response = httpx2.Response(status, request=request, headers=headers)
    return openai.APIStatusError(SECRET, response=response, body=body)


def tool_error() -> UserError:
    error = UserError(SECRET)
    error.__cause__ = KeyError(SECRET)
    return error


REQUEST = httpx2.Request("POST", "http://model/v1")
MAPPING: list[tuple[Exception, str | None, str, bool]] = [
    (openai.APITimeoutError(REQUEST), None, "model_timeout", True),
    (openai.APIConnectionError(message=SECRET, request=REQUEST), None, "model_error", True),
    (openai.OpenAIError(SECRET), None, "model_error", True),
    (json.JSONDecodeError(SECRET, SECRET, 0), None, "model_error", True),
    (status_error(401), None, "model_error", False),
    (status_error(425), None, "model_error", True),
    (status_error(429), None, "model_error", True),
    (status_error(429, {"code": "insufficient_quota"}), None, "model_error", False),
    (status_error(502), None, "model_error", True),
    (ModelRefusalError(SECRET), None, "model_refusal", False),
    (MaxTurnsExceeded(SECRET), None, "max_turns", False),
    (ModelBehaviorError(SECRET), "response.incomplete", "model_error", False),
    (ModelBehaviorError(SECRET), "response.failed", "model_error", True),
    (ModelBehaviorError(SECRET), "error", "model_error", True),
    (ModelBehaviorError(SECRET), None, "model_error", True),
    (tool_error(), None, "agent_error", False),
    (UserError(SECRET), None, "agent_error", False),
]


@pytest.mark.parametrize(("error", "ended", "code", "retryable"), MAPPING)
def test_every_error_of_the_sdk_has_a_code_and_says_nothing_of_its_own(
    error: Exception, ended: str | None, code: str, retryable: bool
) -> None:
    failed = as_failed(error, ended)

    assert isinstance(failed, RunFailed)
    assert (failed.code, failed.retryable) == (code, retryable)
    assert SECRET not in str(failed)


def test_the_sdks_own_timeout_is_a_timeout() -> None:
    error = ModelTimeoutError.__new__(ModelTimeoutError)

    failed = as_failed(error)

    assert isinstance(failed, RunFailed)
    assert (failed.code, failed.retryable) == ("model_timeout", True)


def test_a_tripped_guardrail_is_a_guardrail() -> None:
    failed = as_failed(InputGuardrailTripwireTriggered.__new__(InputGuardrailTripwireTriggered))

    assert isinstance(failed, RunFailed)
    assert failed.code == "guardrail"


def test_a_lost_job_is_found_wherever_it_hides() -> None:
    lost = LeaseLost()
    error = UserError("a tool failed")
    error.__cause__ = RuntimeError("inside")
    error.__cause__.__cause__ = lost

    assert as_failed(error) is lost


def test_what_nobody_knows_stays_itself() -> None:
    error = RuntimeError("a defect")

    assert as_failed(error) is error


# ---------------------------------------------------------------- what it leaves alone


async def test_nothing_but_the_configured_server_is_spoken_to(
    bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[str] = []
    real: Callable[..., Any] = socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **more: Any) -> Any:
        looked_up.append(str(host))
        return real(host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    async with bench() as desk:
        await desk.answer('call step {"n": 1}')

        assert desk.stub.requests[0]["headers"]["authorization"] == f"Bearer {SECRET}"
    assert set(looked_up) <= {"127.0.0.1"}


@pytest.mark.parametrize("name", ["stepper", "front", "boss"])
async def test_the_users_own_agent_is_not_touched(bench: MakeBench, name: str) -> None:
    agent: Agent[None] = globals()[name]
    before = {attribute: getattr(agent, attribute) for attribute in ("model", "tools", "handoffs", "hooks", "name")}
    lists = {attribute: list(value) for attribute, value in before.items() if isinstance(value, list)}

    async def invoke(arguments: dict[str, Any]) -> str:
        raise NotImplementedError

    async with bench(agent=name, tools=[Tool("ours", "x", {"type": "object", "properties": {}}, invoke)]) as desk:
        await desk.answer("hello")

        assert "ours" in desk.requests[0].tools
    for attribute, value in before.items():
        assert getattr(agent, attribute) is value
    for attribute, items in lists.items():
        assert getattr(agent, attribute) == items


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("nowhere_at_all:agent", "there is no module 'nowhere_at_all'"),
        (f"{__name__}:nobody", "has no attribute 'nobody'"),
        (f"{__name__}:SECRET", "is a str, not an agents.Agent"),
        ("nowhere_at_all", "is not MODULE:ATTRIBUTE"),
        (":agent", "is not MODULE:ATTRIBUTE"),
    ],
)
def test_an_agent_that_cannot_be_loaded_is_told_in_plain_words(spec: str, told: str) -> None:
    with pytest.raises(BadAgent, match=told):
        OpenAIRunner(RunnerConfig(agent=spec))


def make_stepper() -> Agent[None]:
    return stepper


async def test_a_function_that_makes_an_agent_will_do(bench: MakeBench) -> None:
    async with bench(agent="make_stepper") as desk:
        result, _ = await desk.answer('call step {"n": 1}')

    assert result.text == "done: step 1 done"
