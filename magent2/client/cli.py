"""`magent2 client`: its flags, its usage errors and where its message comes from.

Imports next to nothing, so that `--help` is quick; what talks is imported once the arguments are understood.
"""

from __future__ import annotations

import math
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from os import fstat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from magent2.client.render import Mode
    from magent2.client.talk import Talk

NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")  # as in `magent2.models.envelope`, which costs pydantic
USAGE, INTERRUPTED = 5, 130
MAX_MESSAGE_BYTES = 1024 * 1024
ASK_TIMEOUT_S = 60.0

HELP = """Send a message and print what happens, until the final output.

Without --message (and nothing piped in): a chat loop on a terminal, else the conversation is followed.

Exit codes: 0 ok, 1 the run ended in error or cancelled, 2 timeout, 3 send failed, 4 stream connect failed, 5 usage,
130 Ctrl-C (the first one cancels the run, the second one leaves at once).
"""


class ClientCommand(click.Command):
    """A command whose usage errors exit with 5; under a group too, whose own stay 2."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _usage_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _usage_errors():
            return super().invoke(ctx)


@contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        error.exit_code = USAGE  # type: ignore[misc]  # click reads it from the instance
        raise


def environment(name: str) -> str | None:
    """A variable, from the environment or else from `.env`; click reads the former, so that nothing here does."""
    value = click.Option(["--_"], envvar=name).resolve_envvar_value(click.get_current_context())
    return value or _dotenv().get(name)


@cache
def _dotenv() -> dict[str, str]:
    if not Path(".env").is_file():
        return {}
    from dotenv import dotenv_values  # comes with pydantic-settings, and reads the file as the services do

    with suppress(OSError, UnicodeDecodeError):
        return {name: value for name, value in dotenv_values(".env").items() if value}
    return {}


def _name(_ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """An id or a bare agent name; `agent:` before it is allowed for the latter."""
    if value is None and param.name == "agent":
        value = environment("MAGENT2_AGENT_NAME") or "DevAgent"
    if value is None:
        return None
    name = value.removeprefix("agent:") if param.name == "agent" else value
    if not NAME.fullmatch(name):
        raise click.BadParameter("must be 1 to 128 characters of A-Z a-z 0-9 . _ -")
    return name


def _sender(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    kind, _, name = value.partition(":")
    if kind not in ("user", "agent") or not NAME.fullmatch(name):
        raise click.BadParameter("must be user:<name> or agent:<Name>, of A-Z a-z 0-9 . _ -")
    return value


def _timeout(_ctx: click.Context, _param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise click.BadParameter("must be a finite number of seconds greater than 0")
    return value


def _base_url(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    if value == "auto":
        value = environment("MAGENT2_BASE_URL") or "auto"
    if value == "auto":
        return value
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(value)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or not value.isascii() or not value.isprintable() or " " in value:
        raise click.BadParameter("must look like http://localhost:8000")
    return value


@click.command("client", cls=ClientCommand, help=HELP)
@click.option("--message", help="What to say; `-` reads it from stdin.")
@click.option("--conv", callback=_name, help="Conversation id.  [default: a fresh one]")
@click.option("--agent", callback=_name, help="Whom to talk to.  [default: MAGENT2_AGENT_NAME, else DevAgent]")
@click.option("--sender", default="user:local", show_default=True, callback=_sender)
@click.option(
    "--base-url",
    default="auto",
    show_default=True,
    callback=_base_url,
    help="The gateway. auto: MAGENT2_BASE_URL, else the port of `docker compose`, else http://localhost:8000.",
)
@click.option(
    "--timeout", type=float, callback=_timeout, help="Seconds.  [default: 60 with a message from outside, else none]"
)
@click.option("--quiet", is_flag=True, help="Print only the final output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per event, one per line.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
    default="info",
    show_default=True,
    help="Show log events from this level on.",
)
@click.option("--max-events", type=click.IntRange(min=1), help="Stop after that many events.")
@click.argument("source", required=False, metavar="[-]")
@click.pass_context
def client(ctx: click.Context, /, **options: Any) -> None:
    try:
        code = _client(options)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        import signal

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a third Ctrl-C must not change how this one ends
    ctx.exit(code)


def _client(options: dict[str, Any]) -> int:
    if options["quiet"] and options["as_json"]:
        raise click.UsageError("--quiet and --json exclude each other")
    on_terminal = _is_terminal(sys.stdin) and _is_terminal(sys.stdout)
    message = _message(options["message"], options["source"])
    talk = _talk(options, asking=message is not None)
    if message is not None:
        return talk.ask(message)
    return talk.chat(_read_line) if on_terminal else talk.follow()


def _talk(options: dict[str, Any], *, asking: bool) -> Talk:
    token = _token()  # before the imports below, which take a while

    from magent2.client.render import Printer, prepare_streams, say
    from magent2.client.talk import Talk, Target

    prepare_streams()
    base_url = options["base_url"]
    if base_url == "auto":
        from magent2.client.compose import find_gateway

        base_url = find_gateway() or "http://localhost:8000"
    conversation_id = options["conv"] or _fresh_id()
    if options["conv"] is None and not options["quiet"]:
        say(f"conversation {conversation_id}")
    mode: Mode = "json" if options["as_json"] else "quiet" if options["quiet"] else "text"
    target = Target(base_url, token, conversation_id, f"agent:{options['agent']}", options["sender"])
    timeout_s = options["timeout"] or (ASK_TIMEOUT_S if asking else None)
    return Talk(target, Printer(mode, options["log_level"]), timeout_s=timeout_s, max_events=options["max_events"])


def _fresh_id() -> str:
    from uuid import uuid4

    return f"conv-{uuid4()}"


def _token() -> str | None:
    """The first token of MAGENT2_API_TOKEN: it lists several while they are rotated."""
    token = (environment("MAGENT2_API_TOKEN") or "").split(",")[0].strip()
    if not (token.isascii() and token.isprintable()):
        raise click.UsageError("MAGENT2_API_TOKEN holds a character that no HTTP header can carry")
    return token or None


def _message(message: str | None, source: str | None) -> str | None:
    """What to send, or None when there is nothing to send. Stdin is left alone where --message has the text."""
    if source not in (None, "-"):
        raise click.UsageError("the only argument is `-`; give the text as --message TEXT")
    if message is not None and message != "-":
        if source == "-":
            raise click.UsageError("--message and `-` exclude each other")
        return _checked(message)
    asked = source == "-" or message == "-"
    if not asked and not _is_piped(sys.stdin):
        return None
    text = _read_stdin()
    return None if not text and not asked else _checked(text)


def _checked(text: str) -> str:
    """The text, if it can be sent."""
    if not text.strip():
        raise click.UsageError("the message is empty")
    if "\0" in text:
        raise click.UsageError("the message contains a NUL character")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # what Python makes of arguments that are not UTF-8
        raise click.UsageError("the message is not UTF-8 text") from None
    if size > MAX_MESSAGE_BYTES:
        raise click.UsageError("the message is larger than 1 MiB")
    return text


def _read_stdin() -> str:
    """All of stdin, without the line end that `echo` adds."""
    if sys.stdin is None:
        return ""
    try:
        text = sys.stdin.buffer.read(MAX_MESSAGE_BYTES + 3)
        return text.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        too_large = len(error.object) > MAX_MESSAGE_BYTES  # then it may only be cut inside a character
        raise click.UsageError(f"stdin is {'larger than 1 MiB' if too_large else 'not UTF-8 text'}") from None
    except OSError as error:
        raise click.UsageError(f"cannot read stdin: {error.strerror}") from None


def _is_terminal(stream: Any) -> bool:
    with suppress(AttributeError, ValueError):
        return bool(stream.isatty())
    return False  # there is none, or it is closed


def _is_piped(stream: Any) -> bool:
    """True for a pipe, a socket or a file: not for a terminal, nor for /dev/null."""
    try:
        return not stat.S_ISCHR(fstat(stream.fileno()).st_mode)
    except OSError:  # without a descriptor: a stream of a test
        return not _is_terminal(stream)
    except (AttributeError, ValueError):  # none, or closed
        return False


def _read_line() -> str:
    """One line that can be sent, typed at the terminal. Raises: EOFError."""
    with suppress(ImportError):
        import readline  # noqa: F401  # gives `input` its editing and history
    while True:
        try:
            line = input("> ")
            if line.strip():
                return _checked(line)
        except EOFError:
            click.echo()
            raise
        except (click.UsageError, UnicodeDecodeError) as error:
            click.echo(f"error: {error}", err=True)
