"""How long to wait before trying again. For everybody, so that nobody's wait overflows after a day of failures."""

from __future__ import annotations

import random


def backoff(failures: int, longest: float = 30.0, first: float = 0.25) -> float:
    """Seconds: `first` after none, twice as long after each more, at most `longest`; jittered by half, so that many do
    not come back at once."""
    return random.uniform(0.5, 1.0) * min(longest, first * 2.0 ** min(failures, 16))
