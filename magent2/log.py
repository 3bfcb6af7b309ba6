"""Logging set-up: one line a record to stderr, as text or JSON, with the ids of the run at hand."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, NoReturn
from urllib.parse import urlsplit, urlunsplit

log_ids: ContextVar[Mapping[str, str]] = ContextVar("magent2_log_ids", default={})  # noqa: B039  never changed in place
"""Ids every record made in this context carries, for instance `{"run_id": …}`."""

_logger = logging.getLogger(__name__)


# they log a line a request, whole messages at debug level, or errors that we report ourselves
_QUIET = {"httpx": "WARNING", "httpx2": "WARNING", "openai": "WARNING", "openai.agents": "CRITICAL",
          "sse_starlette": "INFO", "uvicorn.error": "WARNING", "mcp": "WARNING"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LogConfig:
    """How and what to log. `module_levels` maps a logger's name to its level."""

    format: Literal["text", "json"] = "text"
    level: str = "INFO"
    module_levels: Mapping[str, str] = field(default_factory=dict)
    service: str = "magent2"


class _Ids(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.ids = log_ids.get()
        return True


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        ids = "".join(f" {name}={value}" for name, value in getattr(record, "ids", {}).items())
        return super().format(record) + ids


class _Json(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "ids", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def set_up(config: LogConfig) -> None:
    """Make the root logger write as configured, and nothing else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_Ids())
    handler.setFormatter(
        _Json(config.service)
        if config.format == "json"
        else _Text("%(asctime)s %(levelname)-7s %(name)s: %(message)s", datefmt="%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.level)
    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(level)
    for name, level in config.module_levels.items():
        logging.getLogger(name).setLevel(level)


@contextmanager
def span(name: str, **ids: str) -> Iterator[None]:
    """Give every record of the block these ids, and log at debug level how long it took."""
    token = log_ids.set({**log_ids.get(), **ids})
    start = time.perf_counter()
    try:
        yield
    finally:
        _logger.debug("%s took %.1f ms", name, (time.perf_counter() - start) * 1000)
        log_ids.reset(token)


def without_password(url: str) -> str:
    """The URL as it may be shown and logged: no password, and no query, which may hold one."""
    parts = urlsplit(url)
    _, at, host = parts.netloc.rpartition("@")
    return urlunsplit((parts.scheme, f"***@{host}" if at else host, parts.path, "", ""))


def leave(code: int) -> NoReturn:
    """End the process now, everything written, without waiting for threads: a tool's cannot be stopped."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
