"""Which tools an agent gets: real entry points, of a package made for the test."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from magent2.bus.memory import MemoryBus
from magent2.conversations import Conversations
from magent2.store.memory import MemoryStore
from magent2.tools.registry import ToolDeps, build, discover_tools

CODE = """
from magent2.tools.interface import Tool

async def invoke(arguments):
    return "done"

def make(deps):
    return [Tool(name, "A tool.", {"type": "object"}, invoke) for name in ("plant_seed", "plant_tree")]

def other(deps):
    return [Tool("dig", "A tool.", {"type": "object", "properties": {}}, invoke)]
"""

POINTS = """[magent2.tools]
garden = garden_tools:make
spade = garden_tools:other
broken = garden_tools_missing:make
"""


@pytest.fixture(autouse=True)
def garden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package with two working tool groups and a broken one."""
    (tmp_path / "garden_tools.py").write_text(CODE, encoding="utf-8")
    info = tmp_path / "garden_tools-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: garden-tools\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(POINTS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("garden_tools", None)


def names(*allowed: str, explicit: bool = False) -> list[str]:
    deps = ToolDeps(Conversations(MemoryBus()), MemoryStore())
    return [tool.name for tool in build(deps, allowed=allowed, explicit=explicit)]


def test_groups_are_found_without_importing_them() -> None:
    assert {"garden", "spade", "broken"} <= set(discover_tools())
    assert "garden_tools" not in sys.modules


def test_by_default_an_agent_gets_all_that_can_be_loaded() -> None:
    assert {"dig", "plant_seed", "plant_tree"} <= set(names())


def test_with_explicit_tools_and_none_named_it_gets_none() -> None:
    assert names(explicit=True) == []


def test_a_name_allows_a_group_or_a_single_tool() -> None:
    assert names("garden") == ["plant_seed", "plant_tree"]
    assert names("plant_tree", "spade", explicit=True) == ["plant_tree", "dig"]


def test_an_unknown_name_is_logged_and_skipped(caplog: pytest.LogCaptureFixture) -> None:
    assert names("dig", "plough") == ["dig"]
    assert "plough" in caplog.text


def test_a_group_that_cannot_be_loaded_says_why_and_the_others_stay(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert names("garden", "broken") == ["plant_seed", "plant_tree"]

    assert "'broken' cannot be loaded" in caplog.text
    assert "garden_tools_missing" in caplog.text
