"""`magent2 …` as users start it: what it costs to ask for help, and how it ends."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from magent2 import __version__
from magent2.cli import main
from magent2.errors import BadSettings
from magent2.gateway.server import bind
from magent2.settings import GatewayConfig
from tests.support.processes import ROOT, starting
from tests.support.servers import RedisServer

HEAVY = ["agents", "openai", "redis", "uvicorn", "starlette", "httpx", "pydantic", "mcp"]
COMMANDS = ["client", "doctor", "gateway", "local", "worker"]


@pytest.fixture(scope="module")
def nowhere() -> Iterator[str]:
    """A Redis URL with a password at which nobody answers: the port is taken and not listened on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"redis://user:hunter2@127.0.0.1:{taken.getsockname()[1]}/0?password=hunter2"


def magent2(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run to its end, in a folder without `.env` and with nothing of the developer's environment."""
    return subprocess.run(
        [sys.executable, "-m", "magent2.cli", *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "GATEWAY_PORT": "0", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )


# ---------------------------------------------------------------- help


@pytest.mark.promise("cli.light")
def test_help_imports_next_to_nothing() -> None:
    asked = [["--help"], *([command, "--help"] for command in COMMANDS)]
    code = f"""
import sys
from magent2.cli import main
for arguments in {asked}:
    main(arguments, standalone_mode=False)
print([name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)

    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "[]"
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout


def test_the_version_is_told() -> None:
    assert CliRunner().invoke(main, ["--version"]).stdout.split()[-1] == __version__


# ---------------------------------------------------------------- 2: usage and settings


@pytest.mark.promise("cli.exit")
@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], ["local", "a:b", "c:d"], ["worker", "--port=1"]])
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    ended = CliRunner().invoke(main, arguments)

    assert ended.exit_code == 2
    assert "Error: " in ended.stderr


@pytest.mark.promise("cli.exit")
@pytest.mark.parametrize("command", ["local", "gateway", "worker", "doctor"])
def test_a_bad_setting_exits_2_and_says_which(tmp_path: Path, command: str) -> None:
    ended = magent2(tmp_path, command, BUS_KEY_BACKLOG="many")

    assert ended.returncode == 2
    assert "BUS_KEY_BACKLOG" in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.promise("cli.exit")
def test_uvicorn_is_told_a_bad_setting_in_plain_words_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "uvicorn", "magent2.gateway.asgi:app", "--port", "0"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "BUS_KEY_BACKLOG": "many"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30)

    assert ended.returncode == 2
    assert ended.stderr.startswith("magent2: BUS_KEY_BACKLOG")


@pytest.mark.promise("H10")
@pytest.mark.parametrize("command", ["gateway", "local"])
def test_beyond_loopback_it_refuses_to_start_without_a_token(tmp_path: Path, command: str) -> None:
    ended = magent2(tmp_path, command, GATEWAY_HOST="0.0.0.0")

    assert ended.returncode == 2
    assert "MAGENT2_API_TOKEN" in ended.stderr
    assert "MAGENT2_ALLOW_ANONYMOUS" in ended.stderr


@pytest.mark.promise("H10")
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_what_is_not_loopback_is_beyond_it(host: str) -> None:
    with pytest.raises(BadSettings, match="MAGENT2_API_TOKEN"):
        bind(GatewayConfig(host=host, port=0), allow_anonymous=False)


@pytest.mark.promise("H10")
@pytest.mark.parametrize(("tokens", "allow_anonymous"), [(("t",), False), ((), True)])
def test_beyond_loopback_it_listens_when_told_to(tokens: tuple[str, ...], allow_anonymous: bool) -> None:
    config = GatewayConfig(host="0.0.0.0", port=0, tokens=tokens)

    with bind(config, allow_anonymous=allow_anonymous) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


# ---------------------------------------------------------------- 5: what cannot be reached


@pytest.mark.promise("cli.exit")
@pytest.mark.promise("cli.secrets")
@pytest.mark.parametrize("command", ["doctor", "gateway", "worker"])
def test_a_bus_that_is_away_exits_5_without_its_password(tmp_path: Path, nowhere: str, command: str) -> None:
    ended = magent2(tmp_path, command, REDIS_URL=nowhere)

    said = ended.stdout + ended.stderr
    assert ended.returncode == 5
    assert "cannot reach the bus at redis://" in said
    assert "hunter2" not in said
    assert "Traceback" not in said


@pytest.mark.promise("cli.exit")
def test_a_model_that_is_away_exits_5(tmp_path: Path, nowhere: str, redis_server: RedisServer) -> None:
    url = f"http://{nowhere.partition('@')[2].partition('/')[0]}/v1"

    ended = magent2(tmp_path, "doctor", REDIS_URL=redis_server.url, OPENAI_BASE_URL=url)

    assert ended.returncode == 5
    assert f"cannot reach the model at {url}" in ended.stdout


# ---------------------------------------------------------------- 0 and 130: ended in order


def test_the_doctor_finds_nothing_wrong_with_a_server_and_the_defaults(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    ended = magent2(tmp_path, "doctor", REDIS_URL=redis_server.url)

    assert ended.returncode == 0
    assert "BAD" not in ended.stdout
    assert {"bus", "agent", "model", "gateway"} <= {line.split()[0] for line in ended.stdout.splitlines()}


@pytest.mark.anyio
@pytest.mark.promise("cli.exit")
async def test_told_to_stop_it_exits_0_and_after_ctrl_c_130(tmp_path: Path) -> None:
    with starting(tmp_path) as processes:
        terminated, interrupted = processes.local(), processes.local(AGENT_SESSION_PATH="other.db")
        await terminated.ready()
        await interrupted.ready()

        assert await terminated.stopped(signal.SIGTERM) == 0
        assert await interrupted.stopped(signal.SIGINT) == 130
