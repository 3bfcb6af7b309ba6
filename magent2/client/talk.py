"""What `magent2 client` does once its arguments are understood: ask, follow or chat, and the exit code of each."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType
from typing import Any

from magent2.client.api import TERMINAL, GatewayClient, SendFailed, Sent, StreamedEvent, StreamFailed
from magent2.client.render import OutputLost, Printer, drop_stdout, say

SEND_TIMEOUT_S = 30.0
STOP_S = 2.0  # how long the end of a cancelled run is waited for


class Exit(IntEnum):
    """The exit codes of `magent2 client`; usage errors are 5."""

    OK = 0
    RUN_FAILED = 1
    TIMEOUT = 2
    SEND_FAILED = 3
    STREAM_FAILED = 4
    USAGE = 5
    INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Target:
    """Where to talk, as whom and to whom."""

    base_url: str
    token: str | None
    conversation_id: str
    recipient: str
    sender: str


class Talk:
    """One use of the client. `timeout_s` bounds each of `ask` and `follow`."""

    def __init__(
        self, target: Target, printer: Printer, *, timeout_s: float | None = None, max_events: int | None = None
    ) -> None:
        self.target = target
        self.printer = printer
        self.timeout_s = timeout_s
        self.max_events = max_events
        self._client: GatewayClient
        self._sent: Sent | None = None
        self._run_id: str | None = None
        self._cursor: str | None = None
        self._left = max_events

    def ask(self, content: str) -> int:
        """Send, print what happens until it is answered."""
        return self._run(lambda: self._ask(content))

    def follow(self) -> int:
        """Print what happens in the conversation, from its beginning, for ever."""
        return self._run(self._follow)

    def chat(self, read_line: Callable[[], str]) -> int:
        """Ask line after line until the input ends. An answer that fails is told; the chat goes on."""
        while True:
            try:
                line = read_line()
            except EOFError:
                return Exit.OK
            code = self.ask(line)
            if code in (Exit.INTERRUPTED, 141) or self._left == 0:
                return code

    def _run(self, work: Callable[[], Awaitable[int]]) -> int:
        try:
            return asyncio.run(self._supervise(work))
        except SendFailed as error:
            say(f"error: send failed ({error.code}): {error}")
            return Exit.SEND_FAILED
        except StreamFailed as error:
            say(f"error: stream failed ({error.code}): {error}")
            return Exit.STREAM_FAILED
        except OutputLost as lost:
            if str(lost):
                say(f"error: {lost}")
            return lost.exit_code
        except KeyboardInterrupt:
            drop_stdout()  # it may be what hangs
            return Exit.INTERRUPTED

    async def _supervise(self, work: Callable[[], Awaitable[int]]) -> int:
        """Run the work until it is done, out of time or interrupted."""
        send_timeout_s = min(self.timeout_s or SEND_TIMEOUT_S, SEND_TIMEOUT_S)
        client = GatewayClient(self.target.base_url, token=self.target.token, send_timeout_s=send_timeout_s)
        async with client as self._client:
            with interrupts() as pressed:
                task, press = asyncio.ensure_future(work()), asyncio.ensure_future(pressed.wait())
                try:
                    done, _ = await asyncio.wait({task, press}, timeout=self.timeout_s, return_when="FIRST_COMPLETED")
                    if task in done:
                        return task.result()
                    return await self._stop(task) if press in done else self._timed_out()
                finally:
                    task.cancel()
                    press.cancel()
                    await asyncio.gather(task, press, return_exceptions=True)

    def _timed_out(self) -> int:
        self.printer.break_line()
        say(f"error: timed out after {self.timeout_s:g} s")
        if self._sent is not None:
            say(f"the run goes on; magent2 client --conv {self.target.conversation_id} < /dev/null follows it")
        return Exit.TIMEOUT

    async def _stop(self, task: asyncio.Future[int]) -> int:
        """Cancel the run that was started here and print its end; what does not end soon is left alone."""
        if self._sent is not None:
            with suppress(TimeoutError, SendFailed):
                async with asyncio.timeout(STOP_S):
                    await self._send(
                        "cancel", type="control", metadata={"run_id": self._run_id} if self._run_id else {}
                    )
                    await asyncio.wait({task})
        with suppress(OutputLost):
            self.printer.break_line()
        return Exit.INTERRUPTED

    async def _send(self, content: str, **more: Any) -> Sent:
        target = self.target
        return await self._client.send(
            conversation_id=target.conversation_id,
            recipient=target.recipient,
            sender=target.sender,
            content=content,
            **more,
        )

    async def _ask(self, content: str) -> int:
        self._sent = self._run_id = None
        sent = await self._send(content)
        self._sent = sent
        self.printer.own = sent.message_id
        code: int | None = None
        async for event in self._events(after=self._cursor or sent.cursor, until=sent.message_id):
            if event.data.get("message_id") != sent.message_id:
                continue
            self._run_id = event.data.get("run_id", self._run_id)
            if event.data.get("event") in TERMINAL:
                code = self._answered(event.data)
        if code is not None or self._left == 0:
            return code or Exit.OK
        raise StreamFailed(200, "ended", "the stream ended before the final output")

    def _answered(self, event: dict[str, Any]) -> int:
        self._sent = None
        match event["event"]:
            case "error":
                say(f"error: the run failed ({event.get('code')}): {event.get('message')}")
            case "cancelled":
                say(f"error: the run was cancelled: {event.get('reason')}")
            case _:
                return Exit.OK
        return Exit.RUN_FAILED

    async def _follow(self) -> int:
        async for _event in self._events(after=None, until=None):
            pass
        return Exit.OK

    async def _events(self, *, after: str | None, until: str | None) -> AsyncIterator[StreamedEvent]:
        """Events as they are printed."""
        stream = self._client.follow(self.target.conversation_id, after=after, until=until, max_events=self._left)
        async with aclosing(stream) as events:
            async for event in events:
                self.printer.show(event.data)
                self._cursor = event.cursor or self._cursor
                if self._left is not None:
                    self._left -= 1
                yield event
        self.printer.break_line()


@contextmanager
def interrupts() -> Iterator[asyncio.Event]:
    """An event set by the first Ctrl-C; the second one is a KeyboardInterrupt.

    Not `loop.add_signal_handler`: that one runs in the loop only, which a full pipe on stdout can block. Ctrl-C
    reaches the main thread alone; in another one there is nothing to catch.
    """
    loop, pressed = asyncio.get_running_loop(), asyncio.Event()
    presses = 0

    def press(_signal: int, _frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt
        loop.call_soon_threadsafe(pressed.set)

    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
