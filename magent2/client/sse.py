"""Server-sent events out of bytes as they arrive: what `GatewayClient.follow` reads.

Not a text line reader: those also split at U+2028 and U+0085, which JSON may carry inside a string.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Frame:
    """One dispatched event. `id` is what this event itself carried, not the last one seen."""

    id: str | None
    data: str


class Parser:
    """Feed it chunks cut anywhere, inside a character or a line end too. An event the stream never ended is dropped."""

    def __init__(self) -> None:
        self.retry_ms: int | None = None
        self._line: list[bytes] = []
        self._after_cr = False
        self._first = True
        self._id: str | None = None
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        """The events this chunk completes."""
        if not chunk:
            return
        lines = chunk.splitlines(keepends=True)  # of bytes: at LF, CRLF and CR only
        if self._after_cr and lines[0] == b"\n":
            del lines[0]  # the other half of a CRLF
        self._after_cr = chunk.endswith(b"\r")
        for line in lines:
            self._line.append(line)
            if line.endswith((b"\n", b"\r")) and (frame := self._end_line()):
                yield frame

    def _end_line(self) -> Frame | None:
        line = b"".join(self._line).rstrip(b"\r\n")
        self._line.clear()
        if self._first:
            line, self._first = line.removeprefix(BOM), False
        if line:
            self._field(*line.partition(b":"))
            return None
        return self._dispatch()

    def _field(self, name: bytes, _colon: bytes, value: bytes) -> None:
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value.decode("utf-8", "replace"))
        elif name == b"id" and b"\0" not in value:
            self._id = value.decode("utf-8", "replace") or None
        elif name == b"retry" and value.isdigit() and len(value) < 10:
            self.retry_ms = int(value)

    def _dispatch(self) -> Frame | None:
        frame = Frame(self._id, "\n".join(self._data)) if self._data else None
        self._id = None
        self._data = []
        return frame
