"""`magent2 …`: each command is imported when it is chosen, because importing the SDK takes seconds."""

from __future__ import annotations

import asyncio
import signal
import sys
from importlib import import_module

import click

from magent2 import __version__

_ELSEWHERE = {
    "client": ("magent2.client.cli", "client", "Send a message and print what happens, or follow a conversation.")
}
_AGENT = click.argument("agent", required=False, metavar="[MODULE:ATTRIBUTE]")


class _Group(click.Group):
    """Loads the commands of other packages only when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_ELSEWHERE])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _ELSEWHERE:
            module, name, _ = _ELSEWHERE[cmd_name]
            command: click.Command = getattr(import_module(module), name)
            return command
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="magent2")
def main() -> None:
    """Put agents written with the OpenAI Agents SDK into service."""


@main.command()
@_AGENT
def local(agent: str | None) -> None:
    """Run gateway and worker in one process, without Redis: http://localhost:8000.

    With MODULE:ATTRIBUTE your own agents.Agent, or a function that makes one, answers.
    """
    from magent2 import log
    from magent2.errors import Magent2Error
    from magent2.settings import load_settings
    from magent2.worker.service import exit_code

    try:
        settings = load_settings(magent2_bus_url="memory://")
        log.set_up(settings.log())
        from magent2.local import serve

        asyncio.run(serve(settings, agent))
    except Magent2Error as error:
        _fail(str(error), exit_code(error))


@main.command()
def gateway() -> None:
    """Run the gateway on the bus of REDIS_URL."""
    from magent2 import log, preflight
    from magent2.errors import Magent2Error
    from magent2.gateway.asgi import app_of
    from magent2.gateway.server import Server, bind
    from magent2.settings import load_settings
    from magent2.worker.service import exit_code

    try:
        settings = load_settings()
        log.set_up(settings.log())
        config = settings.gateway()
        listener = bind(config, allow_anonymous=settings.magent2_allow_anonymous)
        durability = asyncio.run(preflight.check_bus(settings))
    except Magent2Error as error:
        _fail(str(error), exit_code(error))
    click.echo(f"gateway on http://{config.host}:{listener.getsockname()[1]} - bus: {durability}", err=True)
    server = Server(app_of(settings))
    asyncio.run(server.serve(sockets=[listener]))
    sys.exit(server.exit_code)


@main.command()
@_AGENT
def worker(agent: str | None) -> None:
    """Run a worker for AGENT_NAME on the bus of REDIS_URL."""
    from magent2.worker.service import main as work

    work(agent)


@main.command()
def doctor() -> None:
    """Say what is configured and what is missing."""
    from magent2.doctor import examine

    sys.exit(asyncio.run(examine()))


def _fail(message: str, code: int) -> None:
    click.echo(f"magent2: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
