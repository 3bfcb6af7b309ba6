"""The environment as the processes read it: what wins, what is refused, and what a refusal does not tell."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from magent2.bus.interface import BusConfig
from magent2.errors import BadSettings
from magent2.runner.config import RunnerConfig
from magent2.settings import GatewayConfig, Settings, WorkerConfig, load_settings


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder of this test's own, where `.env` is looked for."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused() -> str:
    with pytest.raises(BadSettings) as error:
        load_settings()
    return str(error.value)


# ---------------------------------------------------------------- what is refused


@pytest.mark.promise("settings.strict")
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MAGENT2_API_TOKN", "MAGENT2_API_TOKEN"),
        ("MAGENT2_BUSURL", "MAGENT2_BUS_URL"),
        ("magent2_base_ur", "MAGENT2_BASE_URL"),
    ],
)
def test_an_unknown_name_of_ours_is_refused_with_what_was_meant(
    monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    monkeypatch.setenv(name, "secret-value")

    said = refused()

    assert said == f"{name} is not a setting of magent2; did you mean {meant}?"


@pytest.mark.promise("settings.strict")
def test_an_unknown_name_in_the_file_is_refused_too(folder: Path) -> None:
    (folder / ".env").write_text("# a comment\nexport MAGENT2_API_TOKN=x\n", encoding="utf-8")

    assert "MAGENT2_API_TOKN in .env" in refused()


def test_names_of_others_are_let_alone(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("AGENT_FAVOURITE_COLOUR", "blue")
    (folder / ".env").write_text("COMPOSE_PROJECT_NAME=x\n", encoding="utf-8")

    load_settings()


@pytest.mark.promise("settings.strict")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BUS_KEY_BACKLOG", "many"),
        ("BUS_KEY_BACKLOG", "0"),
        ("BUS_LEASE_SECONDS", "-1"),
        ("BUS_LEASE_SECONDS", "nan"),
        ("BUS_STALL_SECONDS", "inf"),
        ("AGENT_NAME", "two words"),
        ("AGENT_NAME", "x" * 129),
        ("AGENT_MODEL_API", "telegraph"),
        ("AGENT_REQUIRE_EXPLICIT_TOOLS", "perhaps"),
        ("GATEWAY_PORT", "65536"),
        ("GATEWAY_PORT", "http"),
        ("TERMINAL_SANDBOX", "maybe"),
        ("LOG_LEVEL", "LOUD"),
        ("LOG_FORMAT", "xml"),
        ("LOG_MODULE_LEVELS", "httpx=LOUD"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)

    assert refused().startswith(name)


@pytest.mark.promise("settings.strict")
def test_everything_wrong_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUS_KEY_BACKLOG", "many")
    monkeypatch.setenv("LOG_FORMAT", "xml")

    said = refused()

    assert "BUS_KEY_BACKLOG" in said
    assert "LOG_FORMAT" in said


@pytest.mark.promise("settings.secrets")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BUS_KEY_BACKLOG", "hunter2"),
        ("REDIS_URL", "http://user:hunter2@host"),
        ("REDIS_URL", "redis://user:hunter2@host:port"),
        ("MAGENT2_BUS_URL", "hunter2"),
        ("OPENAI_BASE_URL", "ftp://user:hunter2@host"),
        ("LOG_MODULE_LEVELS", "a=hunter2"),
    ],
)
def test_a_refusal_does_not_show_the_value(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)

    assert "hunter2" not in refused()


@pytest.mark.promise("settings.secrets")
def test_secrets_are_not_shown_with_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hunter2")
    monkeypatch.setenv("MAGENT2_API_TOKEN", "hunter2,hunter22")

    settings = load_settings()

    assert "hunter2" not in repr(settings)
    assert settings.gateway().tokens == ("hunter2", "hunter22")
    assert settings.runner().api_key == "sk-hunter2"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"AGENT_NAME=\xe4\n"])
def test_a_file_that_is_no_text_is_refused(folder: Path, content: bytes) -> None:
    (folder / ".env").write_bytes(content)

    assert refused() == ".env is not UTF-8 text"


def test_instructions_that_cannot_be_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_INSTRUCTIONS_FILE", "nowhere.txt")

    with pytest.raises(BadSettings, match=r"AGENT_INSTRUCTIONS_FILE.*nowhere\.txt"):
        load_settings().runner()


# ---------------------------------------------------------------- what wins


@pytest.mark.promise("settings.order")
def test_the_environment_wins_over_the_file_and_an_argument_over_both(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    (folder / ".env").write_text("AGENT_NAME=File\nAGENT_MODEL=file\nSERVICE_NAME=file\n", encoding="utf-8")
    monkeypatch.setenv("AGENT_MODEL", "environment")
    monkeypatch.setenv("SERVICE_NAME", "environment")

    settings = load_settings(service_name="argument")

    assert (settings.agent_name, settings.agent_model, settings.service_name) == ("File", "environment", "argument")


@pytest.mark.promise("settings.order")
def test_empty_means_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    default = load_settings()
    for name in Settings.model_fields:
        if name != "terminal_allowed_commands":
            monkeypatch.setenv(name.upper(), "")

    assert load_settings() == default


@pytest.mark.promise("settings.order")
def test_an_empty_list_of_commands_denies_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().terminal_allowed_commands is None
    monkeypatch.setenv("TERMINAL_ALLOWED_COMMANDS", "")

    assert load_settings().terminal_allowed_commands == ()


def test_the_bus_url_wins_over_the_redis_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://a:6379/0")
    assert load_settings().bus_url == "redis://a:6379/0"

    monkeypatch.setenv("MAGENT2_BUS_URL", "memory://")
    assert load_settings().bus_url == "memory://"


def test_the_file_with_instructions_wins(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "say.txt").write_text("Be brief.", encoding="utf-8")
    monkeypatch.setenv("AGENT_INSTRUCTIONS", "Be long.")
    assert load_settings().runner().instructions == "Be long."

    monkeypatch.setenv("AGENT_INSTRUCTIONS_FILE", "say.txt")
    assert load_settings().runner().instructions == "Be brief."


# ---------------------------------------------------------------- how values are written


@pytest.mark.parametrize("text", ["a,b", " a , b ", "a,,b,", ",a,b"])
def test_a_list_has_commas(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("AGENT_TOOLS", text)

    assert load_settings().agent_tools == ("a", "b")


def test_levels_of_modules_and_case_of_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_LEVEL", "warning")
    monkeypatch.setenv("LOG_MODULE_LEVELS", "httpx=debug, magent2.worker = ERROR")

    config = load_settings().log()

    assert config.level == "WARNING"
    assert config.module_levels == {"httpx": "DEBUG", "magent2.worker": "ERROR"}


@pytest.mark.parametrize(
    ("variables", "kind"),
    [({}, "echo"), ({"OPENAI_API_KEY": "k"}, "openai"), ({"OPENAI_BASE_URL": "http://localhost/v1"}, "openai")],
)
def test_the_runner_is_chosen_by_what_is_set(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], kind: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert load_settings().runner().kind == kind
    assert load_settings().runner("my_app:agent").kind == "openai"


def test_the_defaults_of_the_packages_are_those_of_the_settings() -> None:
    settings = load_settings()
    made: list[BusConfig | GatewayConfig | RunnerConfig] = [settings.bus(), settings.gateway(), settings.runner()]

    for config in made:
        assert config == type(config)(), [field.name for field in fields(config)]
    assert settings.worker() == WorkerConfig(agent="DevAgent")
