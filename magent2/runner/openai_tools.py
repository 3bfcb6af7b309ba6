"""A `Tool` as a function tool of the SDK."""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from typing import Any

from agents import FunctionTool
from agents.tool_context import ToolContext

from magent2.tools.interface import Tool, idempotent

logger = logging.getLogger(__name__)

failures: ContextVar[dict[str, BaseException | None]] = ContextVar("magent2_tool_failures")
"""The calls of the run at hand that failed, by id: the SDK tells its hooks only what the model reads."""


def function_tool_of(tool: Tool) -> FunctionTool:
    """The tool for an agent. Its schema is sent as written: optional arguments stay optional."""

    async def invoke(context: ToolContext[Any], arguments: str) -> str:
        try:
            return await tool.invoke(json.loads(arguments or "{}"))
        except Exception as error:
            # an exception here would end the whole run; the model is told instead
            logger.exception("tool %s failed", tool.name)
            failures.get()[context.tool_call_id] = error
            return f"error: {type(error).__name__}"

    made = FunctionTool(
        name=tool.name,
        description=tool.description,
        params_json_schema=tool.schema,
        on_invoke_tool=invoke,
        strict_json_schema=False,
        needs_approval=tool.needs_approval,
    )
    return idempotent(made) if tool.idempotent else made
