"""`magent2 doctor`: what is configured and what is missing, one line each."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable

from magent2 import __version__, preflight
from magent2.errors import BadSettings, Magent2Error
from magent2.runner.config import RunnerConfig
from magent2.settings import Settings, load_settings
from magent2.tools.registry import discover_tools

OK, USAGE, DOWN = 0, 2, 5


async def examine() -> int:
    """Print the findings; 0 if all is well, 2 for a bad setting, 5 if something cannot be reached."""
    try:
        settings = load_settings()
        config = settings.runner()
    except BadSettings as error:
        _say("settings", f"BAD: {error}")
        return USAGE
    _say("magent2", f"{__version__}, Python {sys.version.split()[0]}")
    down = not await _check("bus", lambda: _bus(settings))
    _say("agent", f"{config.name}, runner {config.kind}, model {config.model if config.kind == 'openai' else 'none'}")
    if config.kind == "openai":
        down |= not await _check("model", lambda: _model(settings))
    else:
        _say("model", "none: set OPENAI_API_KEY or OPENAI_BASE_URL; until then the echo runner answers")
    _say("tools", f"installed: {', '.join(discover_tools()) or 'none'}; allowed: {_allowed(config)}")
    _say("gateway", _gateway(settings))
    return DOWN if down else OK


async def _bus(settings: Settings) -> str:
    return f"reachable; {await preflight.check_bus(settings)}"


async def _model(settings: Settings) -> str:
    return f"reachable at {await preflight.check_model(settings)}"


def _allowed(config: RunnerConfig) -> str:
    return ", ".join(config.tools) or ("none" if config.explicit_tools else "all")


def _gateway(settings: Settings) -> str:
    token = "token needed" if settings.magent2_api_token else "no token: whoever reaches it may use it"
    return f"{settings.gateway_host}:{settings.gateway_port}, {token}"


async def _check(name: str, look: Callable[[], Awaitable[str]]) -> bool:
    try:
        _say(name, await look())
    except Magent2Error as error:
        _say(name, f"BAD: {error}")
        return False
    return True


def _say(name: str, finding: str) -> None:
    sys.stdout.write(f"{name:8} {finding}\n")
