"""Waiting before another try, and for a quota."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.backoff import Quota, backoff


def test_it_doubles_from_the_first_to_the_longest_and_is_jittered_by_half() -> None:
    for failures, whole in ((0, 0.25), (1, 0.5), (4, 4.0), (7, 30.0)):
        drawn = [backoff(failures) for _ in range(300)]
        assert 0.5 * whole <= min(drawn) < 0.6 * whole and 0.9 * whole < max(drawn) <= whole
    assert 0.5 <= backoff(0, 60.0, first=1.0) <= 1.0


def test_after_a_day_of_failures_it_is_still_the_longest() -> None:
    assert 15.0 <= backoff(100_000) <= 30.0


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 5),
    st.floats(0.1, 10),
    st.lists(st.floats(0, 5), min_size=1, max_size=60),
)
def test_a_quota_is_never_broken_and_never_idle_for_nothing(count: int, seconds: float, gaps: list[float]) -> None:
    quota, now, times = Quota(count, seconds), 0.0, list[float]()
    for gap in gaps:
        now += gap
        free = quota.free(now)
        places = sum(at + seconds <= now for at in times[-count:]) + count - len(times[-count:])
        assert [quota.free(now, n) for n in range(1, count + 1)] == [n <= places for n in range(1, count + 1)]
        times.append(now + quota.take(now))
        assert free == (times[-1] == now)
        assert times[-1] == now or times[-1] == pytest.approx(times[-1 - count] + seconds)
    assert all(late >= early - 1e-6 for early, late in pairwise(times))
    for first, last in zip(times, times[count:], strict=False):
        assert last - first >= seconds - 1e-6
