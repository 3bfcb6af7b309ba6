"""The README's commands are run as they stand there; only the port, and the program behind `uv run`, are changed."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REDIS_NAMES, server_named
from tests.docs.blocks import ROOT, blocks, commands, documents
from tests.support.processes import Process, Processes, starting
from tests.support.servers import RedisServer
from tests.support.stub_model import StubModel, running_stub

pytestmark = pytest.mark.anyio

README = ROOT / "README.md"
COMMANDS = [command for block in blocks(README, "sh") for command in commands(block.text)]
CURLS = [command for command in COMMANDS if command.startswith("curl ")]
CLIENTS = [command for command in COMMANDS if command.startswith("uv run magent2 client")]
NEEDS_CURL = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")

_VARYING = {
    r"\d{13}-\d+": "CURSOR",
    r"\d{4}-\d\d-\d\dT[\d:.]+Z": "TIME",
    r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22}": "UUID",
}


def steady(text: str) -> str:
    """The text without what differs from run to run."""
    for pattern, name in _VARYING.items():
        text = re.sub(pattern, name, text)
    return text.strip()


def started(processes: Processes, command: str, **environment: str) -> Process:
    """The process of an `uv run magent2 …` command."""
    words = command.removeprefix("uv run magent2 ").split()
    match words:
        case ["local", *agent]:
            return processes.local(*agent, **environment)
        case ["gateway"]:
            return processes.gateway(**environment)
        case ["worker", *agent]:
            return processes.worker(*agent, **environment)
    raise AssertionError(f"not a service: {command}")


async def printed(command: str, base_url: str) -> str:
    """What a command of the README prints, run in a shell against this gateway."""
    command = command.replace("localhost:8000", base_url.removeprefix("http://"))
    command = command.replace("uv run magent2", f"{sys.executable} -m magent2.cli")
    environment = {"MAGENT2_BASE_URL": base_url, "PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    shell = await asyncio.create_subprocess_exec("bash", "-c", command, stdout=PIPE, stderr=PIPE, env=environment)
    async with asyncio.timeout(20):
        out, err = await shell.communicate()
    assert shell.returncode == 0, (command, err.decode())
    return out.decode()


@dataclass(frozen=True)
class Services:
    """What the README starts, all running."""

    local: Process
    own: Process
    gateway: Process
    stub: StubModel


@pytest.fixture(scope="module")
async def services(
    tmp_path_factory: pytest.TempPathFactory, servers: dict[str, RedisServer]
) -> AsyncIterator[Services]:
    """Started side by side, each in a folder of its own: importing the SDK takes seconds."""
    folders = [tmp_path_factory.mktemp(name) for name in ("local", "own", "redis")]
    [source] = [block.text for block in blocks(README, "python")]
    (folders[1] / "my_app.py").write_text(source, encoding="utf-8")
    redis_url = server_named(servers, REDIS_NAMES[0]).url
    async with running_stub() as stub:
        with starting(folders[0]) as here, starting(folders[1]) as own, starting(folders[2]) as over_redis:
            model = {"OPENAI_API_KEY": "sk-your-key", "OPENAI_BASE_URL": stub.base_url}
            all_of_them = [
                started(here, COMMANDS[0]),
                started(own, "uv run magent2 local my_app:agent", **model),
                started(over_redis, "uv run magent2 gateway", REDIS_URL=redis_url),
                started(over_redis, "uv run magent2 worker", REDIS_URL=redis_url),
            ]
            local, own_one, gateway, _ = [await process.ready() for process in all_of_them]
            yield Services(local, own_one, gateway, stub)


async def test_it_fits_on_a_few_screens() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


async def test_the_first_screen_starts_it_sends_and_streams() -> None:
    first_screen = "\n".join(README.read_text(encoding="utf-8").splitlines()[:24])

    assert "uv run magent2 local" in first_screen
    assert "/send" in first_screen
    assert "/stream/" in first_screen


@NEEDS_CURL
async def test_the_first_screen_prints_what_it_says(services: Services) -> None:
    [shown] = blocks(README, "text")

    said = [await printed(command, services.local.base_url) for command in CURLS]

    assert len(CURLS) == 2
    assert steady("\n".join(said)) == steady(shown.text)


async def test_the_agent_of_one_s_own_answers(services: Services) -> None:
    said = await printed(CLIENTS[0], services.own.base_url)

    assert "echo: hello" in said
    assert "like a pirate" in json.dumps(services.stub.bodies[0])


async def test_gateway_and_worker_share_redis_and_the_client_talks_to_them(services: Services) -> None:
    text, lines = [await printed(command, services.gateway.base_url) for command in CLIENTS]

    assert text.strip() == "hello"
    assert [json.loads(line)["event"] for line in lines.splitlines()] == [
        "user_message",
        "run_started",
        "token",
        "output",
    ]


async def test_every_command_is_run_here_or_somewhere_else() -> None:
    run_here = {*CURLS, *CLIENTS} | {
        f"uv run magent2 {service}" for service in ("local", "local my_app:agent", "gateway", "worker")
    }
    run_elsewhere = {
        "uv run pytest",
        "export OPENAI_API_KEY=sk-your-key",
        "docker compose up --detach --build --wait",  # tests/e2e/test_compose.py
    }

    assert set(COMMANDS) == run_here | run_elsewhere


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
async def test_every_python_block_compiles(path: Path) -> None:
    for block in blocks(path, "python"):
        compile(block.text, str(path), "exec")


async def test_the_test_of_the_howto_passes() -> None:
    scripted, _ = blocks(ROOT / "docs/howto/test-your-agent.md", "python")
    names: dict[str, object] = {"__name__": "howto"}
    exec(scripted.text, names)
    test = names["test_ada_is_greeted"]

    assert callable(test)
    await asyncio.to_thread(test)
