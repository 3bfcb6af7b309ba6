"""Who may come in: the Host and Origin of a request, and its token. Plain ASGI around the whole application."""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from magent2.gateway.problems import Problem, answer
from magent2.settings import GatewayConfig

OPEN_PATHS = ("/health", "/ready")


class Access:
    """Refuses unknown hosts (a web page may have its own name resolve to loopback), foreign origins and strangers."""

    def __init__(self, app: ASGIApp, config: GatewayConfig) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in config.allowed_hosts)
        self._origins = frozenset(config.allowed_origins)
        self._tokens = tuple(token.encode() for token in config.tokens)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (problem := self._refusal(scope)):
            response = await answer(Request(scope), problem)
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> Problem | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or _name(hosts[0]) not in self._hosts:
            return Problem(421, "unknown_host", "this gateway does not answer to that Host: see GATEWAY_ALLOWED_HOSTS")
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins:
            return Problem(403, "foreign_origin", "this origin may not call: see GATEWAY_ALLOWED_ORIGINS")
        if self._tokens and scope["path"] not in OPEN_PATHS and not self._known(headers.getlist("authorization")):
            return Problem(401, "unauthorized", "a valid bearer token is needed", WWW_Authenticate="Bearer")
        return None

    def _known(self, authorizations: Iterable[str]) -> bool:
        given = list(authorizations)
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        # compared with each, without stopping early: the time says nothing of what is right
        matches = [hmac.compare_digest(token.strip().encode(), known) for known in self._tokens]
        return scheme.lower() == "bearer" and any(matches)


def _name(host: str) -> str:
    """The host without its port, in lower case."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdecimal() and (name.endswith("]") or ":" not in name) else host.lower()
