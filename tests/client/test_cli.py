"""`magent2 client` as a process: what it prints, where, and the code it leaves with."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from magent2.client.cli import client
from tests.client.stand_in import (
    Answer,
    Connection,
    Payload,
    StandIn,
    answer,
    output,
    running_stand_in,
    started,
    tokens,
)
from tests.support.wait import wait_until

pytestmark = pytest.mark.anyio

ROOT = str(Path(__file__).parents[2])
COMMAND = (sys.executable, "-c", "from magent2.client.cli import client; client()")
NO_STREAM = asyncio.subprocess.DEVNULL
PIPE = asyncio.subprocess.PIPE


@pytest.fixture(autouse=True, scope="module")
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The first process compiles what it imports, the others find it: most of the time of one, where nothing may."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("bytecode")))
        yield


@pytest.fixture(autouse=True, scope="module")
def interruptible() -> Iterator[None]:
    """A shell starts what runs behind `&` with SIGINT ignored, and processes started here would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
async def stand_in() -> AsyncIterator[StandIn]:
    async with running_stand_in() as server:
        yield server


@dataclass
class Ended:
    """A process that is over."""

    code: int | None
    out: str
    err: str

    @property
    def events(self) -> list[Payload]:
        return [json.loads(line) for line in self.out.splitlines()]


@asynccontextmanager
async def running(
    *args: str, env: dict[str, str] | None = None, **streams: Any
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The command as a process of its own, killed at the end of the block if it still runs."""
    streams = {"stdin": NO_STREAM, "stdout": PIPE, "stderr": PIPE} | streams
    process = await asyncio.create_subprocess_exec(
        *COMMAND, *args, env={**os.environ, "PYTHONPATH": ROOT, **(env or {})}, **streams
    )
    try:
        async with asyncio.timeout(10):
            yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def run(*args: str, stdin: bytes | None = None, **more: Any) -> Ended:
    if stdin is not None:
        more["stdin"] = PIPE
    async with running(*args, **more) as process:
        out, err = await process.communicate(stdin)
        return Ended(process.returncode, (out or b"").decode(), (err or b"").decode())


async def ask(stand_in: StandIn, *args: str, **more: Any) -> Ended:
    return await run("--base-url", stand_in.base_url, "--message", "hello there", "--conv", "c1", *args, **more)


async def ask_here(stand_in: StandIn, *args: str, **more: Any) -> Ended:
    """The same without a process of its own: half a second less."""
    args = ("--base-url", stand_in.base_url, "--message", "hello there", "--conv", "c1", *args)
    ended = await asyncio.to_thread(CliRunner().invoke, client, args, catch_exceptions=False, **more)
    return Ended(ended.exit_code, ended.stdout, ended.stderr)


def reacting(*events: Payload) -> Callable[[Payload], list[Payload]]:
    """What the stand-in writes for a message: one run's events."""
    return lambda body: answer(body, *events) if body["type"] == "message" else []


# ---------------------------------------------------------------- asking


async def test_tokens_are_printed_once_and_the_output_not_again(stand_in: StandIn) -> None:
    ended = await ask(stand_in, "--agent", "agent:Dev", "--sender", "user:ann", env={"MAGENT2_API_TOKEN": "t2,t1"})

    assert ended == Ended(0, "hello there\n", "")
    assert stand_in.tokens == ["Bearer t2"]
    sent = stand_in.sends[0]
    assert (sent["recipient"], sent["sender"], sent["content"]) == ("agent:Dev", "user:ann", "hello there")
    assert stand_in.streams == [{"last_event_id": None, "after": "0-0", "until": sent["id"]}]


async def test_everything_that_happens_is_shown_without_control_characters(stand_in: StandIn) -> None:
    call = {"event": "tool_step", "tool_call_id": "t1", "name": "ls", "args": {"path": "\x1b[2J"}, "turn": 0}
    stand_in.react = reacting(
        started(),
        *tokens("let me \x1b]52;c;ZXZpbA==\x07look", turn=0),
        {**call, "status": "start"},
        {**call, "status": "success", "result_summary": "a\nb\x9b1m", "duration_ms": 12.4},
        {"event": "log", "level": "debug", "component": "worker", "message": "unseen"},
        {"event": "log", "level": "warning", "component": "worker", "message": "x\n[log][ERROR] forged"},
        *tokens("it is\r\n\tdone \u2028 🙂", turn=1),
        {"event": "something_new"},
        output("it is\r\n\tdone \u2028 🙂"),
    )

    ended = await ask_here(stand_in)

    assert ended.out.split("\n") == [
        r"let me \x1b]52;c;ZXZpbA==\x07look",
        r'[tool] ls start {"path": "\u001b[2J"}',
        r"[tool] ls success 12 ms: a\nb\x9b1m",
        r"[log][WARNING] worker: x\n[log][ERROR] forged",
        "it is",
        "\tdone \u2028 🙂",
        "",
    ]


async def test_quiet_prints_the_output_alone(stand_in: StandIn) -> None:
    stand_in.react = reacting(started(), *tokens("thinking aloud"), output("the answer"))

    assert await ask_here(stand_in, "--quiet") == Ended(0, "the answer\n", "")


async def test_json_prints_one_event_per_line_in_any_locale(stand_in: StandIn) -> None:
    stand_in.react = reacting(started(), output("\x1b[1m🙂\u2028\ud800"))

    ended = await ask(stand_in, "--json", env={"LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"})

    assert ended.code == 0
    assert ended.out.isascii()
    assert "\x1b" not in ended.out
    assert ended.events == [json.loads(data) for _, data in stand_in.log("c1")]


async def test_text_in_a_locale_without_its_characters(stand_in: StandIn) -> None:
    stand_in.react = reacting(started(), *tokens("é🙂"), output("é🙂"))
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}

    assert await ask(stand_in, env=ascii_only) == Ended(0, "\\xe9\\U0001f642\n", "")


async def test_another_attempt_is_announced(stand_in: StandIn) -> None:
    stand_in.react = reacting(
        started(), *tokens("one", turn=0), *tokens("tw", turn=1), started(2, 1), *tokens("two", turn=1), output("two")
    )

    ended = await ask_here(stand_in)

    assert ended.out == "one\ntw\ntwo\n"
    assert "attempt 2, the answer starts again from turn 1" in ended.err


@pytest.mark.parametrize(
    ("terminal", "told"),
    [
        (
            {"event": "error", "code": "model_error", "message": "no\x1b[0m", "retryable": False},
            r"(model_error): no\x1b",
        ),
        ({"event": "cancelled", "reason": "asked to"}, "cancelled: asked to"),
    ],
)
async def test_a_run_that_fails_exits_1(stand_in: StandIn, terminal: Payload, told: str) -> None:
    stand_in.react = reacting(started(), *tokens("half"), terminal)

    ended = await ask(stand_in)

    assert (ended.code, ended.out) == (1, "half\n")
    assert told in ended.err


async def test_piped_input_is_the_message(stand_in: StandIn) -> None:
    ended = await run("--base-url", stand_in.base_url, "--conv", "c1", stdin="1 é\n2\n".encode())

    assert (ended.code, stand_in.sends[0]["content"]) == (0, "1 é\n2")


async def test_a_fresh_conversation_is_named_on_stderr(stand_in: StandIn) -> None:
    ended = await run("--message", "-", env={"MAGENT2_BASE_URL": stand_in.base_url}, stdin=b"-x")

    assert (ended.code, ended.out) == (0, "-x\n")
    assert ended.err == f"conversation {stand_in.sends[0]['conversation_id']}\n"


async def test_broken_connections_are_not_seen_in_the_output(stand_in: StandIn) -> None:
    stand_in.answers.append(Answer(cut=True))
    stand_in.connections += [Connection(cut_after=2), Connection(cut_inside=1, chunk=3), Connection(status=503)]

    assert await ask_here(stand_in) == Ended(0, "hello there\n", "")


async def test_max_events(stand_in: StandIn) -> None:
    ended = await ask_here(stand_in, "--max-events", "2", "--json")

    assert [event["event"] for event in ended.events] == ["user_message", "run_started"]
    assert (ended.code, stand_in.streams[0]["max_events"]) == (0, "2")


# ---------------------------------------------------------------- failing


async def test_a_timeout_exits_2(stand_in: StandIn) -> None:
    stand_in.react = reacting(started(), *tokens("half"))

    ended = await ask(stand_in, "--timeout", "0.5")

    assert (ended.code, ended.out) == (2, "half\n")
    assert "timed out after 0.5 s" in ended.err


async def test_a_send_that_fails_exits_3(stand_in: StandIn) -> None:
    stand_in.answers.append(Answer(409, {}, b'{"error":{"code":"busy","message":"the conversation is busy"}}'))

    assert await ask(stand_in) == Ended(3, "", "error: send failed (busy): the conversation is busy\n")


async def test_a_stream_that_fails_exits_4(stand_in: StandIn) -> None:
    stand_in.connections.append(Connection(status=404))

    assert await ask(stand_in) == Ended(4, "", "error: stream failed (refused): not now\n")


async def test_a_stream_that_ends_without_an_answer_exits_4(stand_in: StandIn) -> None:
    stand_in.react = lambda _body: []
    stand_in.connections += [Connection(end_after=1), Connection(end_after=0), Connection(end_after=0)]

    ended = await ask_here(stand_in)

    assert (ended.code, ended.err) == (4, "error: stream failed (ended): the stream ended before the final output\n")


async def test_stdout_closed_by_its_reader(stand_in: StandIn) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        ended = await ask(stand_in, stdout=write_end)
    finally:
        os.close(write_end)

    assert (ended.code, ended.err) == (141, "")


async def test_stdout_full(stand_in: StandIn) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        ended = await ask(stand_in, stdout=full)
    finally:
        os.close(full)

    assert (ended.code, ended.err) == (1, "error: cannot write to stdout: No space left on device\n")


# ---------------------------------------------------------------- following


async def test_without_a_message_it_follows_from_the_beginning(stand_in: StandIn) -> None:
    said = {"event": "user_message", "message_id": "m1", "sender": "user:bob", "recipient": "agent:Dev", "text": "hi"}
    run_of = {"run_id": "r1", "message_id": "m1", "agent": "Dev"}
    answered = [{**run_of, **event} for event in (started(), *tokens("hi bob"), output("hi bob"))]
    await stand_in.append("c1", said, *answered)
    args = ["--conv", "c1", "--base-url", stand_in.base_url, "--max-events", "6"]

    async with running(*args) as process:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"[user:bob -> agent:Dev] hi\n"
        assert await process.stdout.readline() == b"[Dev] hi bob\n"
        await stand_in.append("c1", {**run_of, "event": "error", "code": "max_turns", "message": "too long"})
        assert await process.stdout.readline() == b"[Dev] [error] max_turns: too long\n"
        assert await process.wait() == 0

    assert stand_in.sends == []


# ---------------------------------------------------------------- Ctrl-C


async def interrupt_until_ended(process: asyncio.subprocess.Process) -> None:
    """Again and again: two in one instant are one to a process, and readline misses one just before it waits."""
    while process.returncode is None:
        process.send_signal(signal.SIGINT)
        await asyncio.sleep(0.05)


def waiting_for_cancel(body: Payload) -> list[Payload]:
    return answer(body, started(), *tokens("half")) if body["type"] == "message" else []


async def test_the_first_ctrl_c_cancels_the_run_and_shows_its_end(stand_in: StandIn) -> None:
    def cancelled(body: Payload) -> list[Payload]:
        if body["type"] == "message":
            return waiting_for_cancel(body)
        return answer(stand_in.sends[0], *tokens(" done"), {"event": "cancelled", "reason": "asked to"})

    stand_in.react = cancelled
    async with running("--base-url", stand_in.base_url, "--message", "x", "--conv", "c1") as process:
        assert process.stdout is not None
        assert await process.stdout.readexactly(4) == b"half"
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()

    assert (process.returncode, out) == (130, b" done\n")
    assert b"cancelled: asked to" in err
    cancel = stand_in.sends[1]
    assert (cancel["type"], cancel["content"], cancel["recipient"]) == ("control", "cancel", "agent:DevAgent")
    assert cancel["metadata"] == {"run_id": "run-" + stand_in.sends[0]["id"]}


async def test_the_second_ctrl_c_leaves(stand_in: StandIn) -> None:
    stand_in.react = waiting_for_cancel
    async with running("--base-url", stand_in.base_url, "--message", "x", "--conv", "c1") as process:
        assert process.stdout is not None
        await process.stdout.readexactly(4)
        process.send_signal(signal.SIGINT)
        await wait_until(lambda: len(stand_in.sends) == 2, description="the cancel")
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()

    assert (process.returncode, err) == (130, b"")


async def test_ctrl_c_twice_leaves_a_pipe_that_nobody_reads(stand_in: StandIn) -> None:
    stand_in.react = reacting(started(), *tokens("x" * 300_000))
    read_end, write_end = os.pipe()
    args = ["--base-url", stand_in.base_url, "--message", "x", "--conv", "c1"]
    async with running(*args, stdout=write_end) as process:
        os.close(write_end)
        assert await asyncio.to_thread(os.read, read_end, 1) == b"x"
        await interrupt_until_ended(process)
        _, err = await process.communicate()
    os.close(read_end)

    assert (process.returncode, err) == (130, b"")


async def test_ctrl_c_while_following_leaves_at_once(stand_in: StandIn) -> None:
    async with running("--base-url", stand_in.base_url, "--conv", "c1") as process:
        await wait_until(lambda: len(stand_in.streams) == 1, description="the stream")
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()

    assert (process.returncode, err, stand_in.sends) == (130, b"", [])


# ---------------------------------------------------------------- chatting


@dataclass
class Terminal:
    """The other side of a pseudo-terminal."""

    master: int
    shown: bytes = b""

    def receive(self) -> None:
        try:
            self.shown += os.read(self.master, 65_536)
        except OSError:  # nobody has the terminal open any more
            asyncio.get_running_loop().remove_reader(self.master)

    async def prompt(self, number: int) -> None:
        await wait_until(lambda: self.shown.count(b"> ") >= number, description=f"prompt {number}: {self.shown!r}")

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)


@asynccontextmanager
async def chatting(stand_in: StandIn) -> AsyncIterator[tuple[Terminal, asyncio.subprocess.Process]]:
    master, slave = pty.openpty()
    terminal = Terminal(master)
    args = ["--base-url", stand_in.base_url, "--conv", "c1"]
    asyncio.get_running_loop().add_reader(master, terminal.receive)
    try:
        env = {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "20"}
        async with running(*args, stdin=slave, stdout=slave, stderr=slave, env=env) as process:
            os.close(slave)
            yield terminal, process
    finally:
        asyncio.get_running_loop().remove_reader(master)
        os.close(master)


async def test_on_a_terminal_it_is_a_chat_loop(stand_in: StandIn) -> None:
    async with chatting(stand_in) as (terminal, process):
        await terminal.prompt(1)
        terminal.type(b"hi you\n")
        await terminal.prompt(2)
        stand_in.answers.append(Answer(409, {}, b'{"error":{"code":"busy","message":"not now"}}'))
        terminal.type(b"refused\n")
        await terminal.prompt(3)
        terminal.type(b"\n")
        await terminal.prompt(4)
        terminal.type("é\n".encode())
        await terminal.prompt(5)
        terminal.type(b"\x04")
        assert await process.wait() == 0

    assert [body["content"] for body in stand_in.sends] == ["hi you", "refused", "é"]
    assert [asked["after"] for asked in stand_in.streams] == ["0-0", "5-0"]
    assert terminal.shown.count(b"hi you") == 2  # as typed and as answered
    assert b"(busy): not now" in terminal.shown
    assert b"\x1b" not in terminal.shown


async def test_ctrl_c_at_the_prompt_leaves_the_chat(stand_in: StandIn) -> None:
    async with chatting(stand_in) as (terminal, process):
        await terminal.prompt(1)
        await interrupt_until_ended(process)
        assert process.returncode == 130

    assert b"Traceback" not in terminal.shown


# ---------------------------------------------------------------- usage


@pytest.mark.parametrize(
    "args",
    [
        ["--timeout", "-1"],
        ["--timeout", "0"],
        ["--timeout", "nan"],
        ["--timeout", "1e400"],
        ["--timeout", "soon"],
        ["--conv", "../../x"],
        ["--conv", ""],
        ["--conv", "a\n"],
        ["--conv", "x" * 129],
        ["--agent", "user:Dev"],
        ["--agent", "a b"],
        ["--sender", "ann"],
        ["--sender", "chat:c1"],
        ["--message", ""],
        ["--message", " \n"],
        ["--message", "\udcff"],
        ["--message", "x", "-"],
        ["hello"],
        ["--max-events", "0"],
        ["--log-level", "loud"],
        ["--quiet", "--json"],
        ["--base-url", "localhost:8000"],
        ["--base-url", "http://localhost:99999"],
        ["--base-url", "http://[::1"],
        ["--base-url", ""],
        ["--mesage", "x"],
        ["--message"],
    ],
)
async def test_usage_errors_exit_5_alone_and_under_a_group(args: list[str]) -> None:
    group = click.Group("magent2", commands={"client": client})
    more = ["--message", "x"] if args[0].startswith("-") and not args[0].startswith("--me") else []

    alone = CliRunner().invoke(client, [*more, *args])
    grouped = CliRunner().invoke(group, ["client", *more, *args])

    assert (alone.exit_code, grouped.exit_code) == (5, 5)
    assert "Error: " in alone.stderr


async def test_usage_errors_of_other_commands_still_exit_2() -> None:
    group = click.Group("magent2", commands={"client": client})
    CliRunner().invoke(group, ["client", "--nonsense"])

    assert CliRunner().invoke(group, ["nonsense"]).exit_code == 2


@pytest.mark.parametrize(
    ("stdin", "told"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"a\0b", "NUL"),
        (b"x" * (1024 * 1024 + 1), "larger than 1 MiB"),
        (b"x" + "🙂".encode() * 300_000, "larger than 1 MiB"),
        (b"", "empty"),
    ],
)
async def test_input_that_cannot_be_sent_exits_5(stdin: bytes, told: str) -> None:
    ended = CliRunner().invoke(client, ["-"], input=stdin)

    assert ended.exit_code == 5
    assert told in ended.stderr


async def test_environment_is_checked_as_flags_are() -> None:
    for variable in ({"MAGENT2_AGENT_NAME": "a b"}, {"MAGENT2_BASE_URL": "x"}, {"MAGENT2_API_TOKEN": "a\nb"}):
        ended = CliRunner(env=variable).invoke(client, ["--message", "x"])
        assert ended.exit_code == 5
        assert "a\nb" not in ended.stderr


async def test_help_costs_little() -> None:
    heavy = ["asyncio", "httpx", "pydantic", "starlette", "redis", "agents", "rich", "ssl"]
    code = f"import sys; from magent2.client.cli import client; client(['--help'], standalone_mode=False); \
print([name for name in {heavy} if name in sys.modules])"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=PIPE, cwd=ROOT)
    out, _ = await process.communicate()

    assert b"--max-events" in out
    assert out.splitlines()[-1] == b"[]"


# ---------------------------------------------------------------- where the gateway is


async def test_the_gateway_of_docker_compose_is_found(stand_in: StandIn, tmp_path: Path) -> None:
    port = stand_in.base_url.rpartition(":")[2]
    docker = tmp_path / "docker"
    docker.write_text(f'#!/bin/sh\n[ "$*" = "compose port gateway 8000" ] && echo 0.0.0.0:{port}\n')
    docker.chmod(0o755)
    (tmp_path / "docker-compose.yml").touch()
    args = ["--message", "hi", "--conv", "c1", "--base-url", "auto"]

    ended = await run(*args, cwd=tmp_path, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})

    assert ended == Ended(0, "hi\n", "")


# ---------------------------------------------------------------- what a `.env` says


def dotenv(folder: Path, **variables: str) -> Path:
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()), encoding="utf-8")
    return folder


async def test_the_gateway_and_the_agent_are_read_from_dotenv(stand_in: StandIn, tmp_path: Path) -> None:
    dotenv(tmp_path, MAGENT2_BASE_URL=stand_in.base_url, MAGENT2_AGENT_NAME="Filed", MAGENT2_API_TOKEN="t1")

    ended = await run("--message", "hi", "--conv", "c1", cwd=tmp_path)

    assert ended == Ended(0, "hi\n", "")
    assert [sent["recipient"] for sent in stand_in.sends] == ["agent:Filed"]
    assert stand_in.tokens == ["Bearer t1"]


async def test_the_environment_wins_over_dotenv(stand_in: StandIn, tmp_path: Path) -> None:
    dotenv(tmp_path, MAGENT2_BASE_URL="http://127.0.0.1:1", MAGENT2_AGENT_NAME="Filed", MAGENT2_API_TOKEN="t1")
    env = {"MAGENT2_BASE_URL": stand_in.base_url, "MAGENT2_AGENT_NAME": "Given", "MAGENT2_API_TOKEN": "t2"}

    ended = await run("--message", "hi", "--conv", "c1", cwd=tmp_path, env=env)

    assert ended == Ended(0, "hi\n", "")
    assert [sent["recipient"] for sent in stand_in.sends] == ["agent:Given"]
    assert stand_in.tokens == ["Bearer t2"]


async def test_a_flag_wins_over_dotenv(stand_in: StandIn, tmp_path: Path) -> None:
    dotenv(tmp_path, MAGENT2_BASE_URL="http://127.0.0.1:1", MAGENT2_AGENT_NAME="Filed")

    ended = await ask(stand_in, "--agent", "Flagged", cwd=tmp_path)

    assert ended == Ended(0, "hello there\n", "")
    assert [sent["recipient"] for sent in stand_in.sends] == ["agent:Flagged"]
