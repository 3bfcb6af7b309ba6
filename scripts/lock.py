"""Resolve the dependencies anew and pin each of them in `[tool.uv] constraint-dependencies`.

Run by `just lock`. The pins hold names, versions and markers and nothing about where packages come from, so they serve
with any index; `uv.lock` names one and stays out of the repository. Running it twice changes nothing more.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = re.compile(r"^constraint-dependencies = \[(?:\]|.*?^\])", re.MULTILINE | re.DOTALL)
REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;]+)(?:\s*;\s*(.+))?")


def uv(*arguments: str, folder: Path) -> str:
    """What `uv` prints; its own messages go to the terminal."""
    return subprocess.run(["uv", *arguments], cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout


def with_pins(pyproject: str, pins: list[str]) -> str:
    """The text of `pyproject.toml` with these pins and no others."""
    lines = "".join(f'    "{pin}",\n' for pin in pins)
    text, count = PINS.subn(
        lambda _: f"constraint-dependencies = [\n{lines}]" if pins else "constraint-dependencies = []", pyproject
    )
    if count != 1:
        raise SystemExit("pyproject.toml has no `constraint-dependencies = [...]` under [tool.uv]")
    return text


def parsed(exported: str) -> list[str]:
    """The pins of an exported requirements file, sorted by name, version and marker."""
    found = set()
    for line in exported.splitlines():
        if not line or line.startswith("#"):
            continue
        match = REQUIREMENT.fullmatch(line.strip())
        if match is None:
            raise SystemExit(f"neither a pin nor a comment: {line!r}")
        name, version, marker = match.groups()
        found.add((name, version, (marker or "").replace('"', "'")))
    return [f"{name}=={version}" + (f" ; {marker}" if marker else "") for name, version, marker in sorted(found)]


def resolve(pyproject: str) -> list[str]:
    """The newest versions that go together, resolved in a folder of its own where no earlier pin or lock is seen."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pyproject.toml").write_text(with_pins(pyproject, []), encoding="utf-8")
        (folder / "magent2").mkdir()
        for needed in ("magent2/__init__.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / needed, folder / needed)
        uv("lock", "--upgrade", folder=folder)
        exported = uv(
            "export",
            "--frozen",
            "--all-groups",
            "--all-extras",
            "--no-hashes",
            "--no-header",
            "--no-annotate",
            "--no-emit-project",
            folder=folder,
        )
    return parsed(exported)


def main() -> None:
    """Rewrite the pins, then let `uv.lock` follow."""
    path = ROOT / "pyproject.toml"
    before = path.read_text(encoding="utf-8")
    pins = resolve(before)
    path.write_text(with_pins(before, pins), encoding="utf-8")
    uv("lock", "--upgrade", folder=ROOT)
    sys.stderr.write(f"{len(pins)} pins in pyproject.toml\n")


if __name__ == "__main__":
    main()
