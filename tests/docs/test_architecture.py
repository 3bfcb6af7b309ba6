"""What the documents name exists: paths in backticks, and the pages and headings that links go to."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, blocks, documents

FOLDERS = ("magent2", "tests", "docs", "scripts", "examples", "benchmarks")
# written in the documents as what a reader makes, or made when the service runs
_NOT_OURS = re.compile(r"<|\*|\bext/<|NNNN")
_BACKTICKS = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)#:]*)(#[^)]*)?\)")

each_document = pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))


def named_paths(text: str) -> set[str]:
    """What looks like a path of this repository."""
    found = {name for name in _BACKTICKS.findall(text) if not _NOT_OURS.search(name) and " " not in name}
    return {name for name in found if name.split("/")[0] in FOLDERS and "/" in name}


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_every_path_named_exists(path: Path) -> None:
    missing = {name for name in named_paths(path.read_text(encoding="utf-8")) if not (ROOT / name).exists()}

    assert missing == set()


@each_document
def test_every_link_goes_somewhere(path: Path) -> None:
    for page, anchor in _LINK.findall(path.read_text(encoding="utf-8")):
        target = (path.parent / page).resolve() if page else path
        assert target.exists(), page
        assert not anchor or anchor in anchors(target), f"{page}{anchor}"


def test_the_layers_shown_are_those_that_are_checked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    [checked] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    shown = [block.text.splitlines() for block in blocks(ROOT / "docs/ARCHITECTURE.md", "text")]

    assert [re.sub(r"[()]", "", layer) for layer in checked] in shown


def test_the_tree_shows_every_module_outside_a_folder_and_every_folder() -> None:
    shown = (ROOT / "docs/ARCHITECTURE.md").read_text(encoding="utf-8")
    modules = {path.name for path in (ROOT / "magent2").glob("*.py")} - {"__init__.py"}
    folders = {path.parent.name for path in (ROOT / "magent2").glob("*/__init__.py")}

    assert {name for name in modules if f"magent2/{name}`" not in shown} == set()
    assert {name for name in folders if f"`magent2/{name}/" not in shown} == set()


def test_every_decision_has_its_four_parts() -> None:
    pages = sorted((ROOT / "docs/adr").glob("*.md"))
    parts = ["## Context", "## Decision", "## Consequences", "## What would change our mind"]

    assert [page.name[:4] for page in pages] == [f"{n:04d}" for n in range(1, len(pages) + 1)]
    for page in pages:
        lines = page.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if line.startswith("## ")] == parts, page.name
        assert len(lines) <= 45, page.name
