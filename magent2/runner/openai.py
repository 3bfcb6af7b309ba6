"""Runs agents of the OpenAI Agents SDK: the history is a plain input list, no SDK session is attached.

Only the modules `openai*` of this package import the SDK, and they are imported when a worker starts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, cast

from agents import (
    Agent,
    FunctionTool,
    ItemHelpers,
    ModelSettings,
    RunConfig,
    RunContextWrapper,
    RunHooks,
    ToolErrorFormatterArgs,
    set_trace_processors,
)
from agents import Runner as SdkRunner
from agents import Tool as SdkTool
from agents.items import ModelResponse, TResponseInputItem
from agents.tool import default_tool_timeout_error_message
from agents.tool_context import ToolContext

from magent2.errors import RunFailed
from magent2.models.events import ToolStatus, Usage
from magent2.models.text import mended
from magent2.runner.config import RunnerConfig
from magent2.runner.interface import ApprovalRequest, Parked, Result, Turn
from magent2.runner.openai_agent import load_agent, reachable
from magent2.runner.openai_errors import MAX_TURNS, as_failed
from magent2.runner.openai_events import (
    REASONING_DELTAS,
    RESPONSE_ENDS,
    TEXT_DELTA,
    finished,
    is_answer,
    parsed,
    portable,
    response_text,
    summary,
    text_of,
    total,
    usage_of,
)
from magent2.runner.openai_models import make_client, make_provider, tap
from magent2.runner.openai_tools import failures, function_tool_of
from magent2.store.history import (
    UNKNOWN,
    HandedOff,
    Item,
    JournalEntry,
    ModelTurn,
    ToolEnded,
    ToolStarted,
    call_id_of,
    closing,
    journal_items,
    open_calls,
    repair,
    started_calls,
    user_item,
)
from magent2.tools.interface import Tool, is_idempotent

logger = logging.getLogger(__name__)

MAX_UNJUDGED = 5
"""So many answers of one message are asked again for their guardrails' sake."""

BREATHE_TOKENS = 16
"""The SDK does not yield while its buffer holds chunks: without a pause now and then no other run gets a word in."""


class OpenAIRunner:
    """The `Runner` for the Agents SDK: one client, one agent, many runs."""

    kind = "openai"

    def __init__(self, config: RunnerConfig, tools: Sequence[Tool] = ()) -> None:
        # the SDK's default would post inputs and outputs to api.openai.com, whatever server the model is on
        set_trace_processors([])
        self.config = config
        self.agent = load_agent(config, [function_tool_of(tool) for tool in tools])
        self._client = make_client(config)
        self._provider = make_provider(self._client, config)

    @property
    def model(self) -> str:
        """The model's name as configured, or as the user's agent names it."""
        named = getattr(self.agent.model, "_model", self.agent.model)
        return named if isinstance(named, str) else str(getattr(named, "model", type(named).__name__))

    async def run(self, turn: Turn) -> Result | Parked:
        attempt = _Attempt(self.agent, turn)
        return await attempt.run(self._run_config(attempt), self.config.max_turns)

    async def aclose(self) -> None:
        await self._client.close()

    def _run_config(self, attempt: _Attempt) -> RunConfig:
        return RunConfig(
            model_provider=self._provider,
            model_settings=ModelSettings(include_usage=True),
            tracing_disabled=True,
            tool_error_formatter=attempt.on_tool_error,
            tool_not_found_behavior="return_error_to_model",
        )


class _Attempt(RunHooks[Any]):
    """One attempt at one message, as the SDK's hooks see it."""

    def __init__(self, agent: Agent[Any], turn: Turn) -> None:
        self._turn = turn
        self._sink = turn.sink
        self._journal: list[JournalEntry] = list(turn.journal)
        self._agents = reachable(agent)
        self._agent = self._agents.get(_last_agent(turn.journal) or agent.name, agent)
        self._user = user_item(turn.envelope.content or "")
        self._number = sum(isinstance(entry, ModelTurn) for entry in turn.journal) - 1
        self._open: dict[str, Item] = {}  # calls of the last model turn whose output is not journalled, by id
        self._began: dict[str, float] = {}
        self._failed: dict[str, BaseException | None] = {}
        self._config: RunConfig | None = None
        self._in_model = False
        self._tokens = 0
        self._ended: str | None = None

    async def run(self, config: RunConfig, max_turns: int) -> Result | Parked:
        """Go on from the journal to the answer."""
        tap.set(self._seen)
        failures.set(self._failed)
        self._config = config
        if self._guarded(config):
            self._forget_answers()
        answer = finished(self._journal)
        await self._close_open_calls()
        resumed = repair(journal_items(self._journal), started_calls(self._journal))
        text = text_of(answer.items) if answer is not None else self._answer_of_tool()
        if text is not None:
            # it was finished and paid for: nothing is asked again
            return Result([self._user, *resumed], text, self._usage())
        history = [*self._turn.history, self._user, *resumed]
        left = max_turns - sum(isinstance(entry, ModelTurn) for entry in self._journal)
        if left < 1:
            raise RunFailed("max_turns", MAX_TURNS)
        result = SdkRunner.run_streamed(
            self._agent,
            cast("list[TResponseInputItem]", history),
            max_turns=left,
            hooks=self,
            run_config=config,
        )
        try:
            async for _ in result.stream_events():
                pass  # everything is told by the tap and the hooks
        except asyncio.CancelledError:
            result.cancel()
            raise
        except Exception as error:
            raise as_failed(error, self._ended) from error
        if result.interruptions:
            return self._parked(result)
        added = repair(portable(result.to_input_list()[len(history) :]))
        usage = total([self._usage(), usage_of(result.context_wrapper.usage)])
        return Result([self._user, *resumed, *added], self._text(result.final_output, added), usage)

    # the model

    async def _seen(self, event: Any) -> None:
        """A raw event of a model, before the SDK queues it."""
        if not self._in_model:  # an agent used as a tool: its words are not the answer
            return
        kind = event.type
        if kind == TEXT_DELTA:
            self._sink.token(event.delta, self._number)
            self._tokens += 1
            if self._tokens % BREATHE_TOKENS == 1:
                await self._sink.breathe()
        elif kind in REASONING_DELTAS:
            self._sink.reasoning(event.delta, self._number)
        elif kind in RESPONSE_ENDS:
            self._ended = kind

    async def on_llm_start(
        self,
        context: RunContextWrapper[Any],
        agent: Agent[Any],
        system_prompt: str | None,
        input_items: list[TResponseInputItem],
    ) -> None:
        # outputs that no tool hook tells of: hand-offs, unknown tools, calls a guardrail rejected
        for item in portable(input_items):
            call = self._open.pop(str(item.get("call_id")), None) if str(item.get("type")).endswith("_output") else None
            if call is None:
                continue
            await self._record(ToolEnded(call_id=call["call_id"], item=item))
            if call["type"] != "function_call":
                self._step(call, "success", result_summary=summary(item.get("output")))
        self._open.clear()
        self._number += 1
        self._tokens = 0
        self._ended = None
        self._in_model = True

    async def on_llm_end(self, context: RunContextWrapper[Any], agent: Agent[Any], response: ModelResponse) -> None:
        self._in_model = False
        if not self._tokens:  # a model that does not stream, or not through the tap
            self._sink.token(response_text(response), self._number)
        # a turn's tokens are in the log before the turn is journalled: a resumed run does not say them again
        await self._sink.flush()
        items = portable(response.to_input_items())
        self._open = {call_id: item for item in items if (call_id := call_id_of(item)) is not None}
        usage = usage_of(response.usage)
        await self._record(ModelTurn(turn=self._number, agent=agent.name, items=items, usage=usage))
        for call_id, call in self._open.items():
            if call["type"] != "function_call":  # shell, computer…: the SDK tells no hook when it starts one
                self._step(call, "start")
                await self._record(ToolStarted(call_id=call_id))

    # tools

    async def on_tool_start(self, context: RunContextWrapper[Any], agent: Agent[Any], tool: SdkTool) -> None:
        if not isinstance(context, ToolContext):
            return
        call_id = context.tool_call_id
        self._began[call_id] = time.monotonic()
        self._sink.tool_step(
            tool_call_id=call_id,
            name=context.tool_name,
            args=parsed(context.tool_arguments),
            status="start",
            turn=self._number,
        )
        await self._record(ToolStarted(call_id=call_id))

    async def on_tool_end(self, context: RunContextWrapper[Any], agent: Agent[Any], tool: SdkTool, result: Any) -> None:
        if not isinstance(context, ToolContext) or context.tool_call is None:
            return
        item = ItemHelpers.tool_call_output_item(context.tool_call, result)
        await self._ended_call(context, dict(item), self._error_of(context, tool, result))

    async def on_handoff(self, context: RunContextWrapper[Any], from_agent: Agent[Any], to_agent: Agent[Any]) -> None:
        self._sink.agent_updated(from_agent.name, to_agent.name)
        await self._record(HandedOff(agent=to_agent.name))

    def on_tool_error(self, args: ToolErrorFormatterArgs[Any]) -> None:
        """Note that a call failed; what the model reads stays the SDK's own text."""
        self._failed[args.call_id] = args.error
        if args.kind == "tool_not_found":
            self._sink.tool_step(
                tool_call_id=args.call_id,
                name=args.tool_name,
                args={},
                status="error",
                turn=self._number,
                error="the agent has no such tool",
            )

    def _error_of(self, context: ToolContext[Any], tool: SdkTool, result: Any) -> str | None:
        if context.tool_call_id in self._failed:
            error = self._failed[context.tool_call_id]
            return type(error).__name__ if error is not None else "failed"
        if isinstance(tool, FunctionTool) and tool.timeout_seconds is not None:
            late = default_tool_timeout_error_message(tool_name=tool.name, timeout_seconds=tool.timeout_seconds)
            return "timed out" if result == late else None
        return None

    async def _ended_call(self, context: ToolContext[Any], item: Item, error: str | None) -> None:
        call_id = context.tool_call_id
        self._open.pop(call_id, None)
        await self._record(ToolEnded(call_id=call_id, item=portable([item])[0]))
        self._sink.tool_step(
            tool_call_id=call_id,
            name=context.tool_name,
            args=parsed(context.tool_arguments),
            status="error" if error else "success",
            turn=self._number,
            result_summary=summary(item["output"]),
            error=error,
            duration_ms=round((time.monotonic() - self._began.pop(call_id, time.monotonic())) * 1000, 3),
        )

    # going on after a crash

    async def _close_open_calls(self) -> None:
        """What was begun and whose end nobody saw: run again if its tool says it may be, else said to be unknown."""
        begun = started_calls(self._journal)
        for call in open_calls(journal_items(self._journal)):
            if call["call_id"] not in begun:
                continue
            tool = await self._idempotent(str(call.get("name")))
            if tool is not None:
                await self._run_again(tool, call)
                continue
            await self._record(ToolEnded(call_id=str(call["call_id"]), item=closing(call, may_have_run=True)))
            self._step(call, "unknown", result_summary=UNKNOWN)

    def _step(self, call: Item, status: ToolStatus, *, result_summary: str | None = None) -> None:
        """A step of a call that no tool hook tells of."""
        self._sink.tool_step(
            tool_call_id=str(call["call_id"]),
            name=str(call.get("name", call["type"])),
            args=parsed(str(call.get("arguments", ""))),
            status=status,
            turn=self._number,
            result_summary=result_summary,
        )

    def _forget_answers(self) -> None:
        """Have answers that were made but maybe not judged asked again, so that the guardrails see them."""
        kept = [entry for entry in self._journal if not is_answer(entry)]
        if len(self._journal) - len(kept) >= MAX_UNJUDGED:
            raise RunFailed("guardrail", "the run broke off each time before its answer was judged")
        self._journal = kept

    def _guarded(self, config: RunConfig) -> bool:
        """Whether guardrails judge the answer, or the input beside the model."""
        agent = self._agent
        return bool(
            agent.input_guardrails or agent.output_guardrails or config.input_guardrails or config.output_guardrails
        )

    def _answer_of_tool(self) -> str | None:
        """The answer, where the agent takes a tool's output for it and the last turn's calls have ended.

        `tool_use_behavior` may also be a function of the SDK's own results, which a journal cannot bring back: then
        the model is asked.
        """
        behavior = self._agent.tool_use_behavior
        last = next((entry for entry in reversed(self._journal) if isinstance(entry, ModelTurn)), None)
        if last is None or not (behavior == "stop_on_first_tool" or isinstance(behavior, dict)):
            return None
        outputs = {entry.call_id: entry.item for entry in self._journal if isinstance(entry, ToolEnded)}
        names = behavior.get("stop_at_tool_names", []) if isinstance(behavior, dict) else None
        for call in last.items:
            output = outputs.get(str(call.get("call_id")))
            if output is not None and (names is None or call.get("name") in names):
                return str(output.get("output"))
        return None

    async def _idempotent(self, name: str) -> FunctionTool | None:
        for tool in await self._agent.get_all_tools(RunContextWrapper(None)):
            if isinstance(tool, FunctionTool) and tool.name == name and is_idempotent(tool):
                return tool
        return None

    async def _run_again(self, tool: FunctionTool, call: Item) -> None:
        context: ToolContext[Any] = ToolContext(
            context=None,
            tool_name=tool.name,
            tool_call_id=call["call_id"],
            tool_arguments=call["arguments"],
            run_config=self._config,  # its formatter hears of a failure
        )
        self._began[call["call_id"]] = time.monotonic()
        output: object
        try:
            async with asyncio.timeout(tool.timeout_seconds):
                output = await tool.on_invoke_tool(context, call["arguments"])
        except Exception as error:
            logger.exception("tool %s failed", tool.name)
            self._failed[call["call_id"]] = error
            output = f"error: {type(error).__name__}"
        item = {"type": "function_call_output", "call_id": call["call_id"], "output": str(output)}
        await self._ended_call(context, item, self._error_of(context, tool, output))

    # the end

    async def _record(self, entry: JournalEntry) -> None:
        self._journal.append(entry)
        await self._turn.record(entry)

    def _usage(self) -> Usage | None:
        """What earlier attempts cost."""
        return total(entry.usage for entry in self._turn.journal if isinstance(entry, ModelTurn))

    def _text(self, output: Any, added: Sequence[Item]) -> str:
        """The final output as text; for a structured one what the model wrote."""
        if isinstance(output, str):
            return str(mended(output))
        last = next((item for item in reversed(added) if item.get("role") == "assistant"), None)
        return text_of([last]) if last is not None else summary(output)

    def _parked(self, result: Any) -> Parked:
        requests = [
            ApprovalRequest(item.call_id or "", item.tool_name or "", parsed(item.arguments or ""))
            for item in result.interruptions
        ]
        return Parked(result.to_state().to_string(), requests)


def _last_agent(journal: Sequence[JournalEntry]) -> str | None:
    for entry in reversed(journal):
        if isinstance(entry, ModelTurn | HandedOff):
            return entry.agent
    return None
