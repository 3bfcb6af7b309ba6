"""Whether a failed run is tried again, and when: pure."""

from __future__ import annotations

from dataclasses import dataclass

from magent2.errors import RunFailed

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 60.0
MAX_ASKED_DELAY_S = 300.0


@dataclass(frozen=True, slots=True)
class Retry:
    """Try again after `delay_s`."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End with an error; `dead_letter` when it might have worked and all attempts are used up."""

    dead_letter: bool


def decide(error: RunFailed, strikes: int, *, max_attempts: int, jitter: float) -> Retry | GiveUp:
    """What to do after the `strikes`-th delivery in a row that got nowhere.

    The delay doubles from `FIRST_DELAY_S`, is spread by `jitter` in [0, 1) to between half and one and a half of it,
    and is at least what the model's server asked for.
    """
    if not error.retryable:
        return GiveUp(dead_letter=False)
    if strikes >= max_attempts:
        return GiveUp(dead_letter=True)
    backoff_s = min(FIRST_DELAY_S * 2 ** (strikes - 1), MAX_DELAY_S) * (0.5 + jitter)
    return Retry(max(backoff_s, min(error.retry_after_s or 0.0, MAX_ASKED_DELAY_S)))
