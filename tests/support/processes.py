"""magent2's commands as real processes: started in a folder of their own with a bare environment, killed at the end.

`Processes` starts them and returns at once, so that several start side by side; `await process.ready()` then waits.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from magent2.client.api import GatewayClient, Sent
from tests.support.wait import wait_until

ROOT = Path(__file__).parents[2]
_ADDRESS = re.compile(r"http://\S+?:(\d+)")


class Process:
    """One process of magent2; what it says on stderr is kept in a file."""

    def __init__(self, arguments: tuple[str, ...], folder: Path, environment: dict[str, str], log: Path) -> None:
        self.arguments = arguments
        self.log = log
        with log.open("wb") as stderr:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "magent2.cli", *arguments],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
            )

    @property
    def said(self) -> str:
        """All it has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def base_url(self) -> str:
        """Where a gateway listens, as it said itself. Known once it is ready."""
        found = _ADDRESS.search(self.said)
        if found is None:
            raise AssertionError(f"no address in: {self.said}")
        return f"http://127.0.0.1:{found[1]}"

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative when a signal killed it."""
        return self._popen.poll()

    async def ready(self, within_s: float = 30.0) -> Process:
        """Return when a gateway answers `/ready`, or when a worker says that it is."""
        if self.arguments[0] == "worker":
            await self.says("worker ready", within_s)
            return self
        await self.says("http://", within_s)
        async with httpx.AsyncClient(trust_env=False) as client:

            async def answers() -> bool:
                self._must_live("ready")
                try:
                    return (await client.get(f"{self.base_url}/ready")).status_code == 200
                except httpx.TransportError:
                    return False

            await wait_until(answers, timeout_s=within_s, description=f"{self.arguments} is ready: {self.said}")
        return self

    async def says(self, text: str, within_s: float = 10.0) -> None:
        """Return when it has written this; fail when it ends without."""

        def said() -> bool:
            if text in self.said:
                return True
            self._must_live(text)
            return False

        await wait_until(said, timeout_s=within_s, description=f"{self.arguments} says {text!r}: {self.said}")

    async def stopped(self, number: signal.Signals = signal.SIGTERM, within_s: float = 15.0) -> int:
        """Send the signal, wait for the end; the exit code."""
        self.signal(number)
        return await self.ended(within_s)

    async def ended(self, within_s: float = 15.0) -> int:
        """The exit code, once it has ended by itself."""
        await wait_until(
            lambda: self.exit_code is not None, timeout_s=within_s, description=f"{self.arguments} ends: {self.said}"
        )
        return self._popen.returncode

    def signal(self, number: signal.Signals) -> None:
        """Send a signal and do not wait."""
        self._popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait: from here on it does nothing more."""
        self._popen.kill()
        self._popen.wait()

    def _must_live(self, what: str) -> None:
        if self.exit_code is not None and what not in self.said:
            raise AssertionError(f"{self.arguments} ended with {self.exit_code} before {what!r}:\n{self.said}")


class Processes:
    """Starts processes that share a folder and an environment; each `…(NAME="value")` adds to it."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
            "GATEWAY_PORT": "0",
            **environment,
        }
        self._started: list[Process] = []

    def gateway(self, **environment: str) -> Process:
        return self._start(("gateway",), environment)

    def worker(self, agent: str | None = None, **environment: str) -> Process:
        return self._start(("worker", agent) if agent else ("worker",), environment)

    def local(self, agent: str | None = None, **environment: str) -> Process:
        return self._start(("local", agent) if agent else ("local",), environment)

    def _start(self, arguments: tuple[str, ...], environment: dict[str, str]) -> Process:
        log = self.folder / f"{len(self._started)}-{arguments[0]}.log"
        process = Process(arguments, self.folder, self._environment | environment, log)
        self._started.append(process)
        return process

    def close(self) -> None:
        """Kill what still runs."""
        for process in self._started:
            process.kill()


@contextmanager
def starting(folder: Path, **environment: str) -> Iterator[Processes]:
    """Processes for the length of the block."""
    processes = Processes(folder, **environment)
    try:
        yield processes
    finally:
        processes.close()


Event = dict[str, Any]


async def tell(client: GatewayClient, conversation_id: str, content: str, *, agent: str = "DevAgent") -> Sent:
    """Send a message to the agent."""
    return await client.send(
        conversation_id=conversation_id, recipient=f"agent:{agent}", sender="user:test", content=content
    )


async def ask(client: GatewayClient, conversation_id: str, content: str, *, within_s: float = 30.0) -> list[Event]:
    """Send a message to `DevAgent`; all events from it to its terminal event."""
    sent = await tell(client, conversation_id, content)
    return await events_until(client, sent, within_s=within_s)


async def events_until(client: GatewayClient, sent: Sent, *, within_s: float = 30.0) -> list[Event]:
    """All events from this message to its terminal event."""
    async with asyncio.timeout(within_s):
        following = client.follow(sent.conversation_id, after=sent.cursor, until=sent.message_id)
        return [event.data async for event in following]


def of_kind(events: list[Event], *kinds: str) -> list[Event]:
    """The events of these kinds."""
    return [event for event in events if event["event"] in kinds]
