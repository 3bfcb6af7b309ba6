"""What is said before anything heavy is imported: whether the bus and the model's server can be reached, and how."""

from __future__ import annotations

import asyncio
import logging
from urllib.parse import urlsplit

import httpx

from magent2.errors import BadSettings, Unavailable
from magent2.log import without_password
from magent2.runner.config import RunnerConfig, locate_agent
from magent2.settings import Settings

logger = logging.getLogger(__name__)

BUS_S = 4.0
MODEL_S = 4.0
OPENAI_URL = "https://api.openai.com/v1"


async def check_bus(settings: Settings) -> str:
    """What the bus keeps when it dies, as a sentence, for a gateway or a worker of its own.

    Raises `Unavailable` and `BadSettings` in plain words, without the password.
    """
    if urlsplit(settings.bus_url).scheme == "memory":
        raise BadSettings("memory:// lives in one process: use `magent2 local`, or set REDIS_URL")
    from magent2.redis_link import RedisLink

    url = without_password(settings.bus_url)
    try:
        link = RedisLink(settings.bus_url)
    except ValueError:
        raise BadSettings(f"the bus URL {url} is not one redis-py understands") from None
    try:
        async with asyncio.timeout(BUS_S):
            facts = await link.server_config("appendonly", "appendfsync", "maxmemory-policy")
    except (Unavailable, TimeoutError) as error:
        why = "no answer" if isinstance(error, TimeoutError) else str(error)
        raise Unavailable(f"cannot reach the bus at {url} ({why}): is Redis running, is REDIS_URL right?") from None
    finally:
        await link.aclose()
    if facts["maxmemory-policy"] not in (None, "noeviction"):
        raise BadSettings(f"the bus at {url} has maxmemory-policy {facts['maxmemory-policy']}: set noeviction, "
                          "else messages vanish")  # fmt: skip
    return _durability(facts["appendonly"], facts["appendfsync"])


def _durability(appendonly: str | None, appendfsync: str | None) -> str:
    match (appendonly, appendfsync):
        case (None, _):
            return "the server does not tell how durable it is"
        case ("yes", "always"):
            return "append-only file, synced before each answer: no accepted message is lost"
        case ("yes", "everysec"):
            return "append-only file, synced every second: a power cut may lose the last 2 s"
        case ("yes", _):
            return "append-only file, synced when the system likes: a power cut may lose about 30 s"
    return "no append-only file: a restart of the server loses what came since its last snapshot"


def warn(settings: Settings) -> None:
    """Log what is set and does nothing: no setting is skipped in silence."""
    if names := settings.without_effect():
        logger.warning("without effect in this version: %s", ", ".join(names))


async def check_runner(settings: Settings, config: RunnerConfig) -> None:
    """Whether the runner can be made and has a model, before the SDK is imported. Raises `BadAgent`, `Unavailable`."""
    for name, value in (("AGENT_GUARDRAILS", settings.agent_guardrails),
                        ("TOOLS_NEED_APPROVAL", settings.tools_need_approval)):  # fmt: skip
        if value:  # what is meant to protect must not be skipped in silence
            raise BadSettings(f"{name} is not part of this version yet")
    if config.agent is not None:
        locate_agent(config.agent)
    # an agent of the user's own may talk to another server
    if config.kind == "openai" and (config.agent is None or config.base_url):
        await check_model(settings)


async def check_model(settings: Settings) -> str:
    """The model server's URL. Raises `Unavailable` when nothing answers there; any HTTP answer will do."""
    url = settings.openai_base_url or OPENAI_URL
    shown = without_password(url)
    try:
        async with httpx.AsyncClient(timeout=MODEL_S) as client:
            await client.get(f"{url.rstrip('/')}/models")
    except httpx.HTTPError as error:
        hint = "is OPENAI_BASE_URL right?" if settings.openai_base_url else "is there a network?"
        raise Unavailable(f"cannot reach the model at {shown} ({type(error).__name__}): {hint}") from None
    return shown
