"""The environment, read once, and the config of every package made from it.

Nothing else reads the environment (ruff holds that). `docs/settings.md` and `.env.example` are generated from here:
`python -m magent2.settings table` and `… example`.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, StringConstraints, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from magent2.bus.interface import BusConfig
from magent2.errors import BadSettings
from magent2.log import LogConfig
from magent2.models.envelope import NAME
from magent2.runner.config import RunnerConfig

AgentName = Annotated[str, StringConstraints(pattern=rf"^{NAME}\z")]
Positive = Annotated[int, Field(gt=0)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Names = Annotated[tuple[str, ...], NoDecode]
Port = Annotated[int, Field(ge=0, le=65535)]
Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """A worker: whom it answers for, how many conversations at once, how it ends and when it gives up."""

    agent: str
    concurrency: int = 16
    drain_s: float = 30.0
    max_attempts: int = 5


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """A gateway and its limits. `max_unsent_bytes` is per reader; `allowed_hosts` are names without a port."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 1024 * 1024
    max_unsent_bytes: int = 256 * 1024
    max_streams: int = 10_000
    ping_s: float = 20.0
    allowed_hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    allowed_origins: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()


NOT_YET = frozenset(
    {
        "agent_hop_limit", "agent_trace_budget", "agent_approval_ttl_seconds", "worker_metrics_port", "mcp_config",
        "terminal_allowed_commands", "terminal_timeout_seconds", "terminal_output_cap_bytes",
        "terminal_function_output_max_chars", "terminal_redact_substrings", "terminal_redact_patterns",
        "terminal_sandbox", "terminal_workdir", "todo_store_prefix", "auto_child_signal_done",
        "enable_orchestrate_tool", "signal_topic_prefix", "signal_max_payload_bytes", "gateway_ui",
        "obs_index_enabled", "obs_index_ttl_days",
    }
)  # fmt: skip
"""Settings whose part of the product is still to come."""


def _setting(default: Any, meaning: str, **more: Any) -> Any:
    return Field(default, description=meaning, **more)


class Settings(BaseSettings):
    """Every variable of every process. A field's name in upper case is the variable."""

    model_config = SettingsConfigDict(
        env_file=".env", env_file_encoding="utf-8", extra="ignore", case_sensitive=False, hide_input_in_errors=True,
        frozen=True,
    )  # fmt: skip

    # bus
    redis_url: str = _setting("redis://localhost:6379/0", "the Redis or Valkey server of the bus")
    magent2_bus_url: str | None = _setting(None, "`memory://` or `redis://…`; wins over `REDIS_URL`")
    bus_stream_maxlen: Positive = _setting(10_000, "events kept per conversation, at least")
    bus_stream_ttl_seconds: PositiveSeconds = _setting(
        604_800.0, "a conversation's log is kept this long after its last event"
    )
    bus_lease_seconds: PositiveSeconds = _setting(15.0, "a worker that is silent this long has lost its jobs")
    bus_max_attempts: Positive = _setting(5, "deliveries without progress before a message goes to the dead letters")
    bus_stall_seconds: PositiveSeconds = _setting(
        600.0, "a worker whose event loop stands still this long gives up its jobs"
    )
    bus_key_backlog: Positive = _setting(100, "messages that may wait in one conversation; beyond: 429")
    bus_queue_backlog: Positive = _setting(10_000, "messages that may wait for one agent; beyond: 429")

    # agent
    agent_name: AgentName = _setting("DevAgent", "whom this worker answers for")
    agent_model: str = _setting("gpt-4o-mini", "model name, passed exactly as written", min_length=1)
    agent_instructions: str | None = _setting(None, "the agent's instructions")
    agent_instructions_file: Path | None = _setting(
        None, "a file with the instructions; wins over `AGENT_INSTRUCTIONS`"
    )
    agent_max_turns: Positive = _setting(10, "model calls one message may cause")
    agent_tools: Names = _setting((), "allowlist of tool groups or functions, comma-separated")
    agent_require_explicit_tools: bool = _setting(False, "`1`: no tool unless in `AGENT_TOOLS`")
    agent_session_path: Path = _setting(
        Path("./.sessions/agents.db"),
        "SQLite file of the histories with the in-memory bus; with Redis they live in Redis",
    )
    agent_concurrency: Positive = _setting(16, "conversations a worker runs at once")
    openai_api_key: SecretStr | None = _setting(
        None, "the model server's key; with it or `OPENAI_BASE_URL` the OpenAI runner is used, else the echo runner"
    )
    openai_base_url: str | None = _setting(None, "any OpenAI-compatible server")
    agent_model_api: Literal["responses", "chat_completions"] = _setting("responses", "the wire to the model")
    agent_guardrails: Names = _setting((), "guardrails as `module:attribute`, comma-separated")
    tools_need_approval: Names = _setting((), "tools whose every call waits for a person")
    agent_approval_ttl_seconds: PositiveSeconds = _setting(
        3600.0, "a waiting approval becomes a rejection after this long"
    )
    agent_hop_limit: Positive = _setting(8, "how far agents may call agents")
    agent_trace_budget: Positive = _setting(20, "how many messages one trace may cause")
    worker_metrics_port: Port | None = _setting(None, "serve the worker's `/metrics`, `/health`, `/ready` on loopback")
    worker_drain_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = _setting(
        30.0, "after SIGTERM: finish or hand back within this"
    )

    # tools
    mcp_config: Path | None = _setting(None, "path to an `mcp.json`")
    terminal_allowed_commands: Annotated[tuple[str, ...] | None, NoDecode] = _setting(
        None, "basenames, comma-separated; empty denies all; default: a useful set"
    )
    terminal_timeout_seconds: PositiveSeconds = _setting(5.0, "a command may run this long")
    terminal_output_cap_bytes: Positive = _setting(8192, "stdout and stderr together")
    terminal_function_output_max_chars: Positive = _setting(1000, "what the model gets")
    terminal_redact_substrings: Names = _setting((), "redacted everywhere, comma-separated")
    terminal_redact_patterns: Names = _setting((), "regular expressions redacted everywhere, comma-separated")
    terminal_sandbox: Literal["auto", "bwrap", "landlock", "off"] = _setting("auto", "how commands are contained")
    terminal_workdir: Path = _setting(Path("./workspace"), "the only writable place")
    todo_store_prefix: str = _setting("todo", "key prefix of the todo tool")
    auto_child_signal_done: bool = _setting(False, "`1`: the worker sends the `done` signal of an orchestrated child")
    enable_orchestrate_tool: bool = _setting(False, "`1`: registers `orchestrate_split`")
    signal_topic_prefix: str = _setting("signal:", "topics the signals tool may use start with this")
    signal_max_payload_bytes: Positive = _setting(16_384, "bound of one signal")

    # gateway
    gateway_host: str = _setting("127.0.0.1", "address to listen on")
    gateway_port: Port = _setting(8000, "port to listen on; 0 takes a free one")
    magent2_api_token: Annotated[tuple[SecretStr, ...], NoDecode] = _setting(
        (), "comma-separated for rotation; when set, every route but `/health` and `/ready` needs one"
    )
    magent2_allow_anonymous: bool = _setting(False, "`1`: listen beyond loopback without a token")
    gateway_max_body_bytes: Positive = _setting(1024 * 1024, "largest request body")
    gateway_sse_max_bytes: Positive = _setting(256 * 1024, "unsent bytes per reader before it is closed to resume")
    gateway_max_streams: Positive = _setting(10_000, "open streams per gateway")
    gateway_allowed_hosts: Names = _setting(
        ("localhost", "127.0.0.1", "[::1]"), "names the gateway answers to, comma-separated"
    )
    gateway_allowed_origins: Names = _setting((), "web origins that may call it, comma-separated")
    gateway_ui: bool = _setting(True, "the web page")
    gateway_ping_seconds: PositiveSeconds = _setting(20.0, "between two comments on a silent stream")
    obs_index_enabled: bool = _setting(True, "the observer routes")
    obs_index_ttl_days: Positive = _setting(7, "how long the observer routes remember")

    # client
    magent2_base_url: str | None = _setting(None, "the gateway's URL, for `magent2 client`")
    magent2_agent_name: str | None = _setting(None, "whom `magent2 client` talks to by default")

    # logs, to stderr
    log_format: Literal["text", "json"] = _setting("text", "one line a record, or one JSON object a line")
    log_level: Level = _setting("INFO", "the least level that is logged")
    log_module_levels: Annotated[dict[str, Level], NoDecode] = _setting({}, "`module=LEVEL,…`")
    service_name: str = _setting("magent2", "who logs, in JSON logs")

    @field_validator(
        "agent_tools", "agent_guardrails", "tools_need_approval", "terminal_allowed_commands", "gateway_allowed_hosts",
        "terminal_redact_substrings", "terminal_redact_patterns", "gateway_allowed_origins", "magent2_api_token",
        mode="before",
    )  # fmt: skip
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(item.strip() for item in value.split(",") if item.strip()) if isinstance(value, str) else value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("log_module_levels", mode="before")
    @classmethod
    def _split_levels(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [item.partition("=") for item in value.split(",") if item.strip()]
        return {name.strip(): level.strip().upper() for name, _, level in pairs}

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: Any, info: Any) -> Any:
        # last of all: pydantic runs the validators defined later first, and this must see what was written
        if value == "" and info.field_name not in ("terminal_allowed_commands",):
            return cls.model_fields[info.field_name].default
        return value

    @model_validator(mode="after")
    def _urls_are_urls(self) -> Settings:
        check_bus_url(self.bus_url)
        if self.openai_base_url is not None and urlsplit(self.openai_base_url).scheme not in ("http", "https"):
            raise ValueError("OPENAI_BASE_URL must start with http:// or https://")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over `.env`."""
        return init_settings, env_settings, dotenv_settings

    def without_effect(self) -> list[str]:
        """Variables that are set and do nothing in this version, for a warning at start."""
        return sorted(name.upper() for name in self.model_fields_set & NOT_YET)

    @property
    def bus_url(self) -> str:
        """Where the bus is."""
        return self.magent2_bus_url or self.redis_url

    def bus(self) -> BusConfig:
        """The bus's bounds."""
        return BusConfig(
            stream_maxlen=self.bus_stream_maxlen,
            stream_ttl_s=self.bus_stream_ttl_seconds,
            lease_s=self.bus_lease_seconds,
            stall_s=self.bus_stall_seconds,
            key_backlog=self.bus_key_backlog,
            queue_backlog=self.bus_queue_backlog,
        )

    def worker(self) -> WorkerConfig:
        """The worker."""
        return WorkerConfig(
            agent=self.agent_name,
            concurrency=self.agent_concurrency,
            drain_s=self.worker_drain_seconds,
            max_attempts=self.bus_max_attempts,
        )

    def gateway(self) -> GatewayConfig:
        """The gateway."""
        return GatewayConfig(
            host=self.gateway_host,
            port=self.gateway_port,
            max_body_bytes=self.gateway_max_body_bytes,
            max_unsent_bytes=self.gateway_sse_max_bytes,
            max_streams=self.gateway_max_streams,
            ping_s=self.gateway_ping_seconds,
            allowed_hosts=self.gateway_allowed_hosts,
            allowed_origins=self.gateway_allowed_origins,
            tokens=tuple(token.get_secret_value() for token in self.magent2_api_token),
        )

    def runner(self, agent: str | None = None) -> RunnerConfig:
        """The runner, for the user's own `module:attribute` agent if one is given. Raises `BadSettings`."""
        return RunnerConfig(
            name=self.agent_name,
            model=self.agent_model,
            instructions=self._instructions(),
            max_turns=self.agent_max_turns,
            api_key=self.openai_api_key.get_secret_value() if self.openai_api_key else None,
            base_url=self.openai_base_url,
            model_api=self.agent_model_api,
            agent=agent,
            tools=self.agent_tools,
            explicit_tools=self.agent_require_explicit_tools,
        )

    def log(self) -> LogConfig:
        """The logs."""
        return LogConfig(self.log_format, self.log_level, dict(self.log_module_levels), self.service_name)

    def _instructions(self) -> str | None:
        if self.agent_instructions_file is None:
            return self.agent_instructions
        try:
            return self.agent_instructions_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadSettings(f"AGENT_INSTRUCTIONS_FILE: cannot read {str(self.agent_instructions_file)!r}: "
                              f"{type(error).__name__}") from None  # fmt: skip


def check_bus_url(url: str) -> None:
    """Raise `ValueError` unless this is a URL a bus can be made from."""
    parts = urlsplit(url)
    if parts.scheme == "memory":
        return
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError("the bus URL must start with memory://, redis://, rediss:// or unix://")
    try:
        _ = parts.port
    except ValueError:
        # not its own text, which holds what it took for the port: part of a password, where that has a slash
        raise ValueError("the bus URL has no valid port (a password in it must be percent-encoded)") from None


def load_settings(**overrides: Any) -> Settings:
    """The settings of this process: arguments, then the environment, then `.env`. Raises `BadSettings`."""
    try:
        settings = Settings(**overrides)
    except ValidationError as error:
        raise BadSettings("; ".join(_complaint(item) for item in error.errors(include_input=False))) from None
    except UnicodeDecodeError:
        raise BadSettings(".env is not UTF-8 text") from None
    except OSError as error:
        raise BadSettings(f".env cannot be read: {error.strerror}") from None
    _refuse_unknown(os.environ, "")
    _refuse_unknown(_dotenv_names(), " in .env")
    return settings


def _complaint(error: Mapping[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"]).upper()
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def _refuse_unknown(names: Mapping[str, Any] | set[str], where: str) -> None:
    known = {name.upper() for name in Settings.model_fields}
    for name in sorted(names):
        if name.upper().startswith("MAGENT2_") and name.upper() not in known:
            close = difflib.get_close_matches(name.upper(), [k for k in known if k.startswith("MAGENT2_")], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise BadSettings(f"{name}{where} is not a setting of magent2{hint}")


def _dotenv_names() -> set[str]:
    try:
        text = Path(".env").read_text(encoding="utf-8")
    except OSError:
        return set()
    return set(re.findall(r"^\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=", text, re.MULTILINE))


def _shown(default: Any) -> str:
    if default is None or default == () or default == {}:
        return ""
    if isinstance(default, bool):
        return str(int(default))
    if isinstance(default, tuple):
        return ",".join(default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def _as_written(path: Any) -> str:
    return f"./{path}" if isinstance(path, Path) else _shown(path)


def table() -> str:
    """`docs/settings.md`."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = f"`{_as_written(field.default)}`" if _shown(field.default) else "-"
        rows.append(f"| `{name.upper()}` | {default} | {field.description} |")
    head = [
        "# Settings",
        "",
        "Generated by `python -m magent2.settings table`; a test keeps it current. Every process reads the environment",
        "once, and `.env` beneath it; an unknown `MAGENT2_…` name or an unparsable value is an error at start.",
        "MCP servers are configured as `AGENT_<Name>_MCP_<N>_CMD` and so on.",
        "",
        "| variable | default | meaning |",
        "|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"


def example() -> str:
    """`.env.example`: every variable with its default, commented out, so that a copy means the same as no file."""
    lines = ["# Copy to .env and uncomment what you change. Generated by `python -m magent2.settings example`.", ""]
    for name, field in Settings.model_fields.items():
        lines += [f"# {field.description}", f"# {name.upper()}={_as_written(field.default)}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write({"table": table, "example": example}[sys.argv[1]]())
