"""How workers end, and what they refuse to start with: real processes, told by signals."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from magent2.client.api import GatewayClient
from tests.conftest import BINARIES, REDIS_NAMES
from tests.support.processes import starting, tell
from tests.support.servers import RedisServer, running_server
from tests.support.stub_model import StubModel, running_stub
from tests.support.wait import wait_until

pytestmark = pytest.mark.anyio

SLEEPER = '''
"""An agent with a tool that blocks its thread."""

import time
from pathlib import Path

from agents import Agent, function_tool


@function_tool
def nap() -> str:
    Path("napping").touch()
    time.sleep(30)
    return "rested"


agent = Agent(name="Sleeper", tools=[nap])
'''


@pytest.fixture(autouse=True, scope="module")
def interruptible() -> Iterator[None]:
    """A shell starts what runs behind `&` with SIGINT ignored, and processes started here would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
async def stub() -> AsyncIterator[StubModel]:
    async with running_stub() as running:
        yield running


@pytest.fixture(scope="module")
def bus() -> Iterator[RedisServer]:
    with running_server(BINARIES[REDIS_NAMES[0]]) as server:
        yield server


# ---------------------------------------------------------------- ending


@pytest.mark.redis
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_a_worker_told_to_stop_while_it_imports_the_sdk_does_so_at_once(
    tmp_path: Path, bus: RedisServer, stub: StubModel, number: signal.Signals, code: int
) -> None:
    with starting(tmp_path, REDIS_URL=bus.url, OPENAI_BASE_URL=stub.base_url) as processes:
        worker = processes.worker()
        await worker.says("bus:", within_s=30)

        assert await worker.stopped(number, within_s=2) == code
        assert "worker ready" not in worker.said  # else it came too late to tell anything
        assert "Traceback" not in worker.said


@pytest.mark.redis
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_a_worker_told_to_stop_while_it_imports_the_users_module_does_so_at_once(
    tmp_path: Path, bus: RedisServer, stub: StubModel, number: signal.Signals, code: int
) -> None:
    at_import = "from pathlib import Path\nimport time\nPath('importing').touch()\ntime.sleep(30)\n"
    (tmp_path / "my_app.py").write_text(at_import, encoding="utf-8")
    with starting(tmp_path, REDIS_URL=bus.url, OPENAI_BASE_URL=stub.base_url) as processes:
        worker = processes.worker("my_app:agent")
        await wait_until((tmp_path / "importing").exists, timeout_s=30, description="my_app is imported")

        assert await worker.stopped(number, within_s=2) == code
        assert "Traceback" not in worker.said


@pytest.mark.parametrize("number", [signal.SIGINT])
async def test_ctrl_c_does_not_wait_for_a_tool_that_blocks_its_thread(
    tmp_path: Path, stub: StubModel, number: signal.Signals
) -> None:
    (tmp_path / "my_app.py").write_text(SLEEPER, encoding="utf-8")
    with starting(tmp_path, OPENAI_BASE_URL=stub.base_url) as processes:
        process = await processes.local("my_app:agent").ready()
        async with GatewayClient(process.base_url) as client:
            await tell(client, "c1", "call nap {}")
            await wait_until((tmp_path / "napping").exists, timeout_s=30, description="the tool runs")
        began = time.monotonic()

        assert await process.stopped(number, within_s=20) == 130
        assert time.monotonic() - began < 6
        assert "Traceback" not in process.said


# ---------------------------------------------------------------- not starting


async def test_a_second_local_in_the_same_folder_says_that_the_file_is_in_use(tmp_path: Path) -> None:
    with starting(tmp_path) as processes:
        first = await processes.local().ready()
        second = processes.local()

        assert await second.ended() == 2
        assert "is in use by another magent2 local: set AGENT_SESSION_PATH" in second.said
        assert "agents.db" in second.said
        assert "Traceback" not in second.said

        # the first goes on, and once it is gone its file is free
        assert first.exit_code is None
        assert await first.stopped(signal.SIGTERM) == 0
        await processes.local().ready()


async def test_a_local_that_was_killed_leaves_its_file_free(tmp_path: Path) -> None:
    with starting(tmp_path) as processes:
        (await processes.local().ready()).kill()

        await processes.local().ready()


async def test_two_locals_with_files_of_their_own_run_side_by_side(tmp_path: Path) -> None:
    with starting(tmp_path) as processes:
        started = [processes.local(AGENT_SESSION_PATH=f"{name}.db") for name in ("one", "two")]

        await asyncio.gather(*(process.ready() for process in started))


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"MAGENT2_BUS_URL": "memory://"}, "use `magent2 local`, or set REDIS_URL"),
        ({"AGENT_GUARDRAILS": "x:y"}, "AGENT_GUARDRAILS is not part of this version"),
        ({"TOOLS_NEED_APPROVAL": "x"}, "TOOLS_NEED_APPROVAL is not part of this version"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.redis
async def test_what_a_worker_cannot_do_is_told_in_one_line(
    tmp_path: Path, bus: RedisServer, environment: dict[str, str], told: str
) -> None:
    with starting(tmp_path, REDIS_URL=bus.url) as processes:
        worker = processes.worker(**environment)

        assert await worker.ended() == 2
        assert told in worker.said
        assert len(worker.said.splitlines()) == 1, worker.said


@pytest.mark.parametrize("name", ["AGENT_GUARDRAILS", "TOOLS_NEED_APPROVAL"])
async def test_what_a_local_cannot_do_is_told_in_one_line(tmp_path: Path, name: str) -> None:
    with starting(tmp_path) as processes:
        process = processes.local(**{name: "x:y"})

        assert await process.ended() == 2
        assert f"{name} is not part of this version" in process.said
        assert len(process.said.splitlines()) == 1, process.said
