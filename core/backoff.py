"""How long to wait: before trying again, so that nobody's wait overflows after a day of failures, and for a quota."""

from __future__ import annotations

import random
from collections import deque


def backoff(failures: int, longest: float = 30.0, first: float = 0.25) -> float:
    """Seconds: `first` after none, twice as long after each more, at most `longest`; jittered by half, so that many do
    not come back at once."""
    return random.uniform(0.5, 1.0) * min(longest, first * 2.0 ** min(failures, 16))


class Quota:
    """At most `count` in any `seconds`, the past ones remembered one by one: bursts are free, sums are kept."""

    def __init__(self, count: int, seconds: float) -> None:
        self._taken: deque[float] = deque(maxlen=count)
        self._seconds = seconds

    def take(self, now: float) -> float:
        """Take the next place; the seconds until its time comes."""
        at = now if self.free(now) else max(now, self._taken[0] + self._seconds)
        self._taken.append(at)
        return at - now

    def free(self, now: float, places: int = 1) -> bool:
        """Would so many (`count` at most) be there at once?"""
        over = len(self._taken) + places - (self._taken.maxlen or 0)
        return over <= 0 or self._taken[over - 1] + self._seconds <= now

    def idle(self, now: float) -> bool:
        return not self._taken or self._taken[-1] + self._seconds <= now
