"""Every error raised on purpose.

Magent2Error
├── Unavailable            the bus or the store cannot be reached; whether a write happened is unknown
├── QueueFull              a queue or one conversation's backlog is at its bound; try again later
├── KeyBusy                `only_if_idle` was asked and the conversation has work
├── LeaseLost              somebody else holds the job now; nothing more may be written for it
├── DedupConflict          the id was used before, with other content
├── Conflict               a compare-and-set met another version
├── BadCursor              not a cursor at all
├── CursorExpired          a well-formed cursor whose entry is not kept (trimmed, foreign or future)
├── Rejected               a rule of the send pipeline refused the message
├── RunFailed              a run ended in an error that users see
├── BadAgent               the user's agent cannot be loaded
└── BadSettings            a setting is unknown, missing or unparsable
"""

from __future__ import annotations


class Magent2Error(Exception):
    """Base of all errors raised on purpose. The docstring of a class is its default message."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or type(self).__name__).splitlines()[0])


class Unavailable(Magent2Error):
    """The bus or the store cannot be reached. Whether the write happened is unknown."""


class QueueFull(Magent2Error):
    """The queue is full. Try again later."""

    def __init__(self, message: str | None = None, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class KeyBusy(Magent2Error):
    """The conversation has unfinished work."""


class LeaseLost(Magent2Error):
    """Another consumer holds this job now."""


class DedupConflict(Magent2Error):
    """This id was used before with other content."""


class Conflict(Magent2Error):
    """The record changed since it was read."""


class BadCursor(Magent2Error):
    """Not a cursor."""


class CursorExpired(Magent2Error):
    """The entry this cursor names is not kept. `earliest` is the oldest one that is, or None."""

    def __init__(self, message: str | None = None, *, earliest: str | None = None) -> None:
        super().__init__(message)
        self.earliest = earliest


class Rejected(Magent2Error):
    """The message was refused. `status` is the HTTP status a door answers, `code` its error code."""

    def __init__(self, message: str, *, code: str = "rejected", status: int = 403) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


class RunFailed(Magent2Error):
    """A run ended in an error. `code` is one of the codes of the `error` event."""

    def __init__(self, code: str, message: str, *, retryable: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable
        self.retry_after_s = retry_after_s


class BadAgent(Magent2Error):
    """The agent cannot be loaded."""


class BadSettings(Magent2Error):
    """A setting is unknown, missing or unparsable."""
