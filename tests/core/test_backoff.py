"""Waiting before another try."""

from __future__ import annotations

from core.backoff import backoff


def test_it_doubles_from_the_first_to_the_longest_and_is_jittered_by_half() -> None:
    for failures, whole in ((0, 0.25), (1, 0.5), (4, 4.0), (7, 30.0)):
        drawn = [backoff(failures) for _ in range(300)]
        assert 0.5 * whole <= min(drawn) < 0.6 * whole and 0.9 * whole < max(drawn) <= whole
    assert 0.5 <= backoff(0, 60.0, first=1.0) <= 1.0


def test_after_a_day_of_failures_it_is_still_the_longest() -> None:
    assert 15.0 <= backoff(100_000) <= 30.0
