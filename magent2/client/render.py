"""Printing what happens in a conversation: events to stdout, everything about the client itself to stderr."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any, Literal

Payload = dict[str, Any]
Mode = Literal["text", "quiet", "json"]

LEVELS = ("debug", "info", "warning", "error")
MAX_ARGS = 200  # characters of a tool's arguments on its line

_CONTROLS = [*range(0x20), *range(0x7F, 0xA0)]
_VISIBLE = {code: f"\\x{code:02x}" for code in _CONTROLS} | {ord("\t"): "\t", ord("\n"): "\n", ord("\r"): ""}
_ONE_LINE = _VISIBLE | {ord("\n"): "\\n", ord("\r"): "\\r"}


def harmless(text: object) -> str:
    """The text with control characters made visible: nothing in it can move the cursor or reach the clipboard.

    One character at a time, so it works on tokens that cut an escape sequence in two. A carriage return is dropped.
    """
    return str(text).translate(_VISIBLE)


def one_line(text: object) -> str:
    """`harmless`, with line ends made visible too: nothing in it looks like a line of its own."""
    return str(text).translate(_ONE_LINE)


class OutputLost(Exception):
    """Stdout takes no more. `exit_code` is the one to leave with."""

    def __init__(self, exit_code: int, message: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code


def prepare_streams() -> None:
    """Characters that the terminal's encoding lacks are printed escaped instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(message: str) -> None:
    """One line to stderr, if there still is one."""
    try:
        print(one_line(message), file=sys.stderr, flush=True)  # noqa: T201
    except (OSError, ValueError, AttributeError):
        return


def write(text: str) -> None:
    """Print now, not at the end of the line. Raises: OutputLost."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except (BrokenPipeError, AttributeError):  # closed by the reader, or never there
        drop_stdout()
        raise OutputLost(141) from None  # 128 + SIGPIPE, as any other program in a pipe
    except OSError as error:
        drop_stdout()
        raise OutputLost(1, f"cannot write to stdout: {error.strerror}") from None


def drop_stdout() -> None:
    """Send what stdout still buffers nowhere, else the interpreter tries it again at exit and says so."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        return


class Printer:
    """Shows events, one after the other. `own` is the message whose answer is printed without the agent's name."""

    def __init__(self, mode: Mode = "text", log_level: str = "info") -> None:
        self.own: str | None = None
        self.mode = mode
        self._threshold = LEVELS.index(log_level)
        self._line: object = None
        self._said: dict[str, dict[int, str]] = {}
        """What tokens said, by run and turn: an output that repeats it is not printed again."""

    def show(self, event: Payload) -> None:
        """Print one event. Raises: OutputLost."""
        if self.mode == "json":
            write(json.dumps(event, separators=(",", ":")) + "\n")
        elif self.mode == "text":
            show = getattr(self, f"_show_{event.get('event')}", None)
            if show is not None:  # else of a later version: `--json` shows it
                show(event)
        elif event.get("event") == "output":
            write(harmless(event.get("text", "")) + "\n")

    def break_line(self) -> None:
        """End the line of tokens that is open, if one is."""
        if self._line is not None:
            write("\n")
            self._line = None

    def _print(self, line: str) -> None:
        self.break_line()
        write(f"{line}\n")

    def _continue(self, key: object, label: str, text: str) -> None:
        """Go on with the line of that key, or begin it."""
        if not text:
            return
        if self._line != key:
            self.break_line()
            text = label + text
        write(text)
        self._line = None if text.endswith("\n") else key

    def _label(self, event: Payload) -> str:
        own = self.own is not None and event.get("message_id") == self.own
        return "" if own else f"[{one_line(event.get('agent'))}] "

    def _show_token(self, event: Payload) -> None:
        run, turn, text = event.get("run_id", ""), event.get("turn", 0), event.get("text", "")
        said = self._said.setdefault(run, {})
        said[turn] = said.get(turn, "") + text
        self._continue(("token", run, turn), self._label(event), harmless(text))

    def _show_reasoning(self, event: Payload) -> None:
        key = ("reasoning", event.get("run_id"), event.get("turn"))
        self._continue(key, self._label(event) + "[reasoning] ", harmless(event.get("text", "")))

    def _show_output(self, event: Payload) -> None:
        said, text = self._said.pop(event.get("run_id", ""), {}), event.get("text", "")
        if text and (not said or said[max(said)] != text):
            self.break_line()
            self._continue("output", self._label(event), harmless(text))
        self.break_line()

    def _show_run_started(self, event: Payload) -> None:
        if event.get("attempt", 1) <= 1:
            return
        turn, said = event.get("resumed_turn", 0), self._said.get(event.get("run_id", ""), {})
        for forgotten in [number for number in said if number >= turn]:
            del said[forgotten]
        self.break_line()
        say(f"{event.get('agent')}: attempt {event['attempt']}, the answer starts again from turn {turn}")

    def _show_user_message(self, event: Payload) -> None:
        if event.get("message_id") != self.own:
            self._print(one_line(f"[{event.get('sender')} -> {event.get('recipient')}] {event.get('text')}"))

    def _show_tool_step(self, event: Payload) -> None:
        args, status = event.get("args"), event.get("status")
        line = f"[tool] {event.get('name')} {status}"
        if status == "start":
            line += f" {args if isinstance(args, str) else json.dumps(args, ensure_ascii=False)}"[:MAX_ARGS]
        elif event.get("duration_ms") is not None:
            line += f" {event['duration_ms']:.0f} ms"
        detail = event.get("error") or event.get("result_summary")
        self._print(self._label(event) + one_line(f"{line}: {detail}" if detail else line))

    def _show_log(self, event: Payload) -> None:
        level = str(event.get("level"))
        if level in LEVELS and LEVELS.index(level) < self._threshold:
            return
        self._print(one_line(f"[log][{level.upper()}] {event.get('component')}: {event.get('message')}"))

    def _show_agent_updated(self, event: Payload) -> None:
        self._print(one_line(f"[hand-off] {event.get('from')} -> {event.get('to')}"))

    def _show_approval_requested(self, event: Payload) -> None:
        what = f"{event.get('name')} {json.dumps(event.get('args'), ensure_ascii=False)[:MAX_ARGS]}"
        ids = f"run_id={event.get('run_id')} tool_call_id={event.get('tool_call_id')}"
        self._print(one_line(f"[approval] {what} waits for a person until {event.get('expires_at')} ({ids})"))

    def _show_control(self, event: Payload) -> None:
        reason = f": {event['reason']}" if event.get("reason") else ""
        self._print(one_line(f"[control] {event.get('command')} {event.get('state')}{reason}"))

    def _show_signal(self, event: Payload) -> None:
        self._print(one_line(f"[signal] {event.get('direction')} {event.get('topic')}"))

    def _show_gap(self, event: Payload) -> None:
        self.break_line()
        say(f"events are missing here: what came before {event.get('missing_before') or 'now'} is not kept")

    def _show_error(self, event: Payload) -> None:
        self._terminal(event, f"[error] {event.get('code')}: {event.get('message')}")

    def _show_cancelled(self, event: Payload) -> None:
        self._terminal(event, f"[cancelled] {event.get('reason')}")

    def _terminal(self, event: Payload, line: str) -> None:
        self._said.pop(event.get("run_id", ""), None)
        self.break_line()
        if event.get("message_id") != self.own:  # of its own one the caller tells, on stderr
            self._print(self._label(event) + one_line(line))
