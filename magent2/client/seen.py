"""What a reader of a conversation has seen already, so that nothing is shown twice."""

from __future__ import annotations

from collections import deque

REMEMBERED = 10_000  # as many events as a log keeps by default


class Seen:
    """The last cursor seen, and the events before it for the day the log itself goes back.

    After a `gap` cursors may be smaller than before: a store that was lost or restored from an older copy. What
    comes again then is told by cursor and content.
    """

    def __init__(self, after: str | None = None) -> None:
        self.cursor = after
        self._floor = after
        self._recent: deque[tuple[str, int]] = deque(maxlen=REMEMBERED)
        self._before_gap: frozenset[tuple[str, int]] = frozenset()
        self._gap: str | None = None

    def admit(self, cursor: str | None, data: str) -> bool:
        """True, once, for an event not seen yet. Without a cursor nothing is known of it: True."""
        if cursor is None:
            return True
        if self._floor is not None and not _later(cursor, self._floor):
            return False
        # also for what came again after a gap: this is the place in the log as it is now
        self.cursor = self._floor = cursor
        self._gap = None
        mark = (cursor, hash(data))
        if mark in self._before_gap:
            return False
        self._recent.append(mark)
        return True

    def admit_gap(self, missing_before: object) -> bool:
        """True, once: a gap is sent anew on each connection until an event after it was seen."""
        self._floor = None
        self._before_gap = frozenset(self._recent)
        told, self._gap = self._gap == str(missing_before), str(missing_before)
        return not told


def _later(cursor: str, floor: str) -> bool:
    """True when the first cursor is after the second; of cursors that cannot be compared: when they differ."""
    try:
        return _pair(cursor) > _pair(floor)
    except ValueError:
        return cursor != floor


def _pair(cursor: str) -> tuple[int, int]:
    high, _, low = cursor.partition("-")
    return int(high), int(low)
