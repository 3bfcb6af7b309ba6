"""Text from elsewhere, made fit for UTF-8."""

from __future__ import annotations

from typing import Any


def mended(value: Any) -> Any:
    """The JSON value with its text as UTF-8 can carry it.

    A server may cut a surrogate pair in two: halves that meet are joined, and one that stays alone is no text.
    """
    if isinstance(value, str):
        return value if _is_text(value) else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {mended(name): mended(part) for name, part in value.items()}
    if isinstance(value, list):
        return [mended(part) for part in value]
    return value


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
