"""Everything a run of the SDK may raise, as the `error` event users see. Pure.

Texts of other people (a server's body, a tool's exception) may hold secrets and are not repeated.
"""

from __future__ import annotations

import json

import openai
from agents import (
    AgentsException,
    InputGuardrailTripwireTriggered,
    MaxTurnsExceeded,
    ModelBehaviorError,
    ModelRefusalError,
    OutputGuardrailTripwireTriggered,
    ToolInputGuardrailTripwireTriggered,
    ToolOutputGuardrailTripwireTriggered,
    UserError,
)
from agents.exceptions import ModelTimeoutError

from magent2.errors import LeaseLost, RunFailed

MAX_TURNS = "the run reached its limit of model calls (AGENT_MAX_TURNS)"

_RETRYABLE_STATUS = frozenset({408, 409, 425, 429})
_GUARDRAILS = (
    InputGuardrailTripwireTriggered,
    OutputGuardrailTripwireTriggered,
    ToolInputGuardrailTripwireTriggered,
    ToolOutputGuardrailTripwireTriggered,
)


def as_failed(error: Exception, ended: str | None = None) -> Exception:
    """The error as `RunFailed`; `LeaseLost` wherever it hides; anything unknown as itself.

    `ended` is the type of the event the last model response ended with, where one was seen.
    """
    if lost := _lease_lost(error):
        return lost
    match error:
        case ModelTimeoutError() | openai.APITimeoutError():
            return RunFailed("model_timeout", "the model did not answer in time", retryable=True)
        case openai.APIStatusError():
            return _status(error)
        case openai.APIConnectionError():
            return RunFailed("model_error", "the connection to the model's server failed", retryable=True)
        case openai.OpenAIError() | json.JSONDecodeError():
            return RunFailed("model_error", f"the model's server failed ({type(error).__name__})", retryable=True)
        case ModelRefusalError():
            return RunFailed("model_refusal", "the model refused to answer")
        case MaxTurnsExceeded():
            return RunFailed("max_turns", MAX_TURNS)
        case ModelBehaviorError():
            return _behavior(ended)
        case _ if isinstance(error, _GUARDRAILS):
            return RunFailed("guardrail", f"a guardrail stopped the run ({type(error).__name__})")
        case UserError() if error.__cause__ is not None:
            return RunFailed("agent_error", f"a tool raised {type(error.__cause__).__name__}")
        case AgentsException():
            return RunFailed("agent_error", f"the run failed ({type(error).__name__})")
    return error


def _status(error: openai.APIStatusError) -> RunFailed:
    status = error.status_code
    said = {
        400: "the model's server refused the request",
        401: "the model's server refused the API key",
        403: "the model's server forbids this request",
        404: "the model's server does not know this model or address",
        413: "the request is too large for the model's server",
        429: "the model's server is over its rate limit or quota",
    }.get(status, "the model's server failed" if status >= 500 else "the model's server refused the request")
    code = f", {error.code}" if isinstance(error.code, str) and error.code.isidentifier() else ""
    retryable = status >= 500 or status in _RETRYABLE_STATUS
    if error.code == "insufficient_quota":
        retryable = False  # 429 too, but no wait will help
    wait_s = _seconds(error.response.headers.get("retry-after"))
    return RunFailed("model_error", f"{said} ({status}{code})", retryable=retryable, retry_after_s=wait_s)


def _seconds(retry_after: str | None) -> float | None:
    try:
        return max(0.0, float(retry_after)) if retry_after else None
    except ValueError:
        return None  # a date: the worker's own backoff will do


def _behavior(ended: str | None) -> RunFailed:
    match ended:
        case "response.incomplete":
            return RunFailed("model_error", "the model's answer was cut off at its token limit")
        case "response.failed" | "error" | None:  # None: the stream just stopped
            return RunFailed("model_error", "the model's server broke off its answer", retryable=True)
    return RunFailed("model_error", "the model's answer could not be used")


def _lease_lost(error: BaseException | None) -> LeaseLost | None:
    while error is not None:
        if isinstance(error, LeaseLost):
            return error
        error = error.__cause__
    return None
