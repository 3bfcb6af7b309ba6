"""What is said before anything heavy is imported: whether the bus and the model's server can be reached, and how."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

from magent2.errors import Unavailable
from magent2.runner.config import RunnerConfig, locate_agent
from magent2.settings import Settings

BUS_S = 4.0
MODEL_S = 4.0
OPENAI_URL = "https://api.openai.com/v1"


@dataclass(frozen=True, slots=True)
class Durability:
    """What a bus keeps when it dies. `policy` is the server's maxmemory-policy; None where it does not tell."""

    sentence: str
    policy: str | None = None


async def check_bus(settings: Settings) -> Durability:
    """How durable the bus is. Raises `Unavailable` in plain words, without the password."""
    if urlsplit(settings.bus_url).scheme == "memory":
        return Durability("in memory: messages and events end with this process, histories are kept in SQLite")
    from magent2.redis_link import RedisLink, without_password

    url = without_password(settings.bus_url)
    link = RedisLink(settings.bus_url)
    try:
        async with asyncio.timeout(BUS_S):
            facts = await link.server_config("appendonly", "appendfsync", "maxmemory-policy")
    except (Unavailable, TimeoutError) as error:
        why = "no answer" if isinstance(error, TimeoutError) else str(error)
        raise Unavailable(f"cannot reach the bus at {url} ({why}): is Redis running, is REDIS_URL right?") from None
    finally:
        await link.aclose()
    return _durability(facts["appendonly"], facts["appendfsync"], facts["maxmemory-policy"])


def _durability(appendonly: str | None, appendfsync: str | None, policy: str | None) -> Durability:
    match (appendonly, appendfsync):
        case (None, _):
            sentence = "the server does not tell how durable it is"
        case ("yes", "always"):
            sentence = "append-only file, synced before each answer: no accepted message is lost"
        case ("yes", "everysec"):
            sentence = "append-only file, synced every second: a power cut may lose the last 2 s"
        case ("yes", _):
            sentence = "append-only file, synced when the system likes: a power cut may lose about 30 s"
        case _:
            sentence = "no append-only file: a restart of the server loses what came since its last snapshot"
    return Durability(sentence, policy)


async def check_runner(settings: Settings, config: RunnerConfig) -> None:
    """Whether the runner can be made and has a model, before the SDK is imported. Raises `BadAgent`, `Unavailable`."""
    if config.agent is not None:
        locate_agent(config.agent)
    # an agent of the user's own may talk to another server
    if config.kind == "openai" and (config.agent is None or config.base_url):
        await check_model(settings)


async def check_model(settings: Settings) -> str:
    """The model server's URL. Raises `Unavailable` when nothing answers there; any HTTP answer will do."""
    url = settings.openai_base_url or OPENAI_URL
    try:
        async with httpx.AsyncClient(timeout=MODEL_S) as client:
            await client.get(f"{url.rstrip('/')}/models")
    except httpx.HTTPError as error:
        hint = "is OPENAI_BASE_URL right?" if settings.openai_base_url else "is there a network?"
        raise Unavailable(f"cannot reach the model at {url} ({type(error).__name__}): {hint}") from None
    return url
