"""Errors as HTTP answers: one shape, never a traceback, never the input."""

from __future__ import annotations

import logging
from http import HTTPStatus
from uuid import uuid4

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from magent2.errors import BadCursor, DedupConflict, KeyBusy, Magent2Error, QueueFull, Rejected, Unavailable

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1


class Problem(Exception):
    """An answer other than 200, raised by an endpoint."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


HANDLED: tuple[type[Exception], ...] = (Problem, HTTPException, ValidationError, ClientDisconnect, Magent2Error)
"""Errors that are answers; anything else is a defect, answered 500 and logged."""


def as_problem(error: Exception) -> Problem:
    """The answer to an error; 500 for what nobody raised on purpose."""
    match error:
        case Problem():
            return error
        case HTTPException():
            status = HTTPStatus(error.status_code)
            return Problem(status, status.name.lower(), status.phrase, **dict(error.headers or {}))
        case ValidationError():
            return _invalid(error)
        case BadCursor():
            return Problem(400, "bad_cursor", "not a cursor: take one from the `id:` of an event")
        case ClientDisconnect():
            return Problem(400, "gone", "the client closed the connection")
        case DedupConflict():
            return Problem(409, "id_conflict", "this id was used before with other content")
        case KeyBusy():
            return Problem(409, "busy", "the conversation has unfinished work")
        case QueueFull():
            return Problem(
                429, "queue_full", "too much is waiting", Retry_After=str(max(1, round(error.retry_after_s)))
            )
        case Rejected():
            return Problem(error.status, error.code, str(error))
        case Unavailable():
            return Problem(503, "unavailable", "the message bus cannot be reached", Retry_After=str(RETRY_AFTER_S))
        case _:
            return Problem(500, "internal", "something went wrong here")


def _invalid(error: ValidationError) -> Problem:
    items = error.errors(include_input=False, include_url=False, include_context=False)
    if any(item["type"] == "json_invalid" for item in items):
        return Problem(400, "bad_json", "the body is not valid JSON")
    told = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}" for item in items[:5])
    return Problem(422, "invalid", told.replace("Value error, ", "")[:700])


async def answer(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for all errors."""
    problem = as_problem(error)
    request_id = uuid4().hex
    if problem.status >= 500 and not isinstance(error, Magent2Error):
        logger.error("request %s to %s failed", request_id, request.url.path, exc_info=error)
    body = {"error": {"code": problem.code, "message": str(problem), "request_id": request_id}}
    return JSONResponse(body, status_code=problem.status, headers=problem.headers)
