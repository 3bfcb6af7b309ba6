"""The names of the test at hand."""

from __future__ import annotations


class Names:
    """Set anew for each test."""

    conversation: str
    agent: str


now = Names()
