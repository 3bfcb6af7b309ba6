"""Every promise of `docs/CONTRACTS.md` has a test that carries its id; every id a test carries is promised there."""

from __future__ import annotations

import ast
import re
from collections import defaultdict

from tests.docs.blocks import ROOT

_ROW = re.compile(r"^\| `?([A-Za-z0-9_.]+)`? \| (.+) \| ((?:`tests/[^`]+`(?:, )?)+) \|$", re.MULTILINE)


def promised() -> dict[str, set[str]]:
    """The files named for each id."""
    rows = _ROW.findall((ROOT / "docs/CONTRACTS.md").read_text(encoding="utf-8"))
    assert len(rows) == len({id for id, _, _ in rows}), "an id has two rows"
    return {id: set(re.findall(r"`([^`]+)`", tests)) for id, _, tests in rows}


def marked() -> dict[str, set[str]]:
    """The files whose tests carry each id."""
    found = defaultdict(set)
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) == "pytest.mark.promise"
                and isinstance(node.args[0], ast.Constant)
            ):
                found[str(node.args[0].value)].add(str(path.relative_to(ROOT)))
    return dict(found)


def test_every_promise_is_proved_where_it_says() -> None:
    proofs = marked()

    assert {id: files for id, files in promised().items() if not files <= proofs.get(id, set())} == {}


def test_every_proof_is_of_a_promise() -> None:
    promises = promised()

    assert {id: files for id, files in marked().items() if id not in promises} == {}
