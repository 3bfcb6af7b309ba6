"""The generated pages are current, complete, and an example file that is copied changes nothing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from magent2.settings import Settings, example, load_settings, table
from tests.docs.blocks import ROOT

NAMES = """
    REDIS_URL MAGENT2_BUS_URL AGENT_NAME AGENT_MODEL AGENT_INSTRUCTIONS AGENT_INSTRUCTIONS_FILE AGENT_MAX_TURNS
    AGENT_TOOLS AGENT_REQUIRE_EXPLICIT_TOOLS AGENT_SESSION_PATH AGENT_CONCURRENCY OPENAI_API_KEY OPENAI_BASE_URL
    AGENT_MODEL_API AGENT_GUARDRAILS TOOLS_NEED_APPROVAL AGENT_APPROVAL_TTL_SECONDS AGENT_HOP_LIMIT AGENT_TRACE_BUDGET
    SIGNAL_TOPIC_PREFIX SIGNAL_MAX_PAYLOAD_BYTES WORKER_METRICS_PORT WORKER_DRAIN_SECONDS MCP_CONFIG
    TERMINAL_ALLOWED_COMMANDS TERMINAL_TIMEOUT_SECONDS TERMINAL_OUTPUT_CAP_BYTES TERMINAL_FUNCTION_OUTPUT_MAX_CHARS
    TERMINAL_REDACT_SUBSTRINGS TERMINAL_REDACT_PATTERNS TERMINAL_SANDBOX TERMINAL_WORKDIR TODO_STORE_PREFIX
    AUTO_CHILD_SIGNAL_DONE ENABLE_ORCHESTRATE_TOOL GATEWAY_HOST GATEWAY_PORT MAGENT2_API_TOKEN MAGENT2_ALLOW_ANONYMOUS
    GATEWAY_MAX_BODY_BYTES GATEWAY_SSE_MAX_BYTES GATEWAY_MAX_STREAMS GATEWAY_ALLOWED_HOSTS GATEWAY_ALLOWED_ORIGINS
    BUS_STREAM_MAXLEN BUS_STREAM_TTL_SECONDS BUS_LEASE_SECONDS BUS_MAX_ATTEMPTS BUS_STALL_SECONDS BUS_KEY_BACKLOG
    BUS_QUEUE_BACKLOG OBS_INDEX_ENABLED OBS_INDEX_TTL_DAYS GATEWAY_UI GATEWAY_PING_SECONDS LOG_FORMAT LOG_LEVEL
    LOG_MODULE_LEVELS SERVICE_NAME MAGENT2_BASE_URL MAGENT2_AGENT_NAME
"""
"""What users type, kept to the letter: a name leaves this list only in a release that says so."""


def test_the_pages_are_current() -> None:
    """If not: `python -m magent2.settings table > docs/settings.md`, `… example > .env.example`."""
    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == table()
    assert (ROOT / ".env.example").read_text(encoding="utf-8") == example()


def test_no_variable_is_lost_or_renamed() -> None:
    fields = {name.upper() for name in Settings.model_fields}

    assert set(NAMES.split()) - fields == set()


@pytest.mark.promise("settings.example")
def test_the_example_lists_every_variable_and_copied_it_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    without = load_settings()
    (tmp_path / ".env").write_text(example(), encoding="utf-8")

    assert load_settings() == without
    assert set(re.findall(r"^# ([A-Z0-9_]+)=", example(), re.MULTILINE)) == {n.upper() for n in Settings.model_fields}


def test_a_default_written_out_means_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line with a value may be uncommented as it stands."""
    monkeypatch.chdir(tmp_path)
    without = load_settings()
    lines = re.findall(r"^# ([A-Z0-9_]+=.+)$", example(), re.MULTILINE)
    (tmp_path / ".env").write_text("\n".join(lines), encoding="utf-8")

    assert load_settings() == without
