"""What `import magent2` gives, and what it does not cost. The layers themselves are held by import-linter."""

from __future__ import annotations

import subprocess
import sys

import pytest

import magent2
from tests.support.processes import ROOT


def test_the_public_names_are_sorted_and_there() -> None:
    assert list(magent2.__all__) == sorted(magent2.__all__)
    for name in magent2.__all__:
        assert getattr(magent2, name) is not None


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = magent2.nonsense


def test_importing_it_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import magent2; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)

    assert {name for name in eval(done.stdout) if name.startswith("magent2.")} == set()
    assert "pydantic" not in done.stdout


def test_testing_needs_no_sdk_and_no_redis() -> None:
    code = "import sys, magent2.testing; print([name for name in ('agents', 'openai', 'redis') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)

    assert (done.stdout, done.stderr) == ("[]\n", "")
