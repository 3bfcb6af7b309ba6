"""`decide` is pure: the whole policy as a table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magent2.errors import RunFailed
from magent2.worker.retry import MAX_ASKED_DELAY_S, MAX_DELAY_S, GiveUp, Retry, decide


def failed(*, retryable: bool = True, retry_after_s: float | None = None) -> RunFailed:
    return RunFailed("model_error", "no", retryable=retryable, retry_after_s=retry_after_s)


@pytest.mark.parametrize(("strikes", "delay_s"), [(1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0)])
def test_the_delay_doubles_with_each_strike(strikes: int, delay_s: float) -> None:
    assert decide(failed(), strikes, max_attempts=5, jitter=0.5) == Retry(delay_s)


def test_the_last_attempt_gives_up_into_the_dead_letters() -> None:
    assert decide(failed(), 5, max_attempts=5, jitter=0.5) == GiveUp(dead_letter=True)


def test_what_cannot_be_retried_gives_up_at_once_and_is_no_dead_letter() -> None:
    assert decide(failed(retryable=False), 1, max_attempts=5, jitter=0.5) == GiveUp(dead_letter=False)


def test_what_the_server_asked_for_is_waited_for_within_reason() -> None:
    assert decide(failed(retry_after_s=30), 1, max_attempts=5, jitter=0.0) == Retry(30)
    assert decide(failed(retry_after_s=1e9), 1, max_attempts=5, jitter=0.0) == Retry(MAX_ASKED_DELAY_S)


@given(st.integers(1, 1000), st.floats(0, 1, exclude_max=True))
def test_a_delay_is_positive_and_bounded(strikes: int, jitter: float) -> None:
    decision = decide(failed(), strikes, max_attempts=2000, jitter=jitter)

    assert isinstance(decision, Retry)
    assert 0 < decision.delay_s <= 1.5 * MAX_DELAY_S
