"""The documents, and the fenced blocks in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and what is in it."""

    language: str
    text: str


def documents() -> list[Path]:
    """The README, everything under `docs`, and the pages for contributors and users of releases."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*top, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path: Path, language: str = "") -> list[Block]:
    """The blocks of a document, of one language or of all."""
    text = path.read_text(encoding="utf-8")
    found = [Block(match["language"], match["text"]) for match in _BLOCK.finditer(text)]
    return [block for block in found if language in ("", block.language)]


def commands(text: str) -> list[str]:
    """The commands of a shell block: continued lines joined, comments and empty lines gone."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and (lines[-1].endswith("\\") or lines[-1].count("'") % 2):
            lines[-1] = f"{lines[-1].removesuffix(chr(92))}\n{line}"
        else:
            lines.append(line)
    return [line for line in lines if line.strip() and not line.startswith("#")]
