"""Named places to die at, so that a test can die at each. Inert unless PALAVER_CRASH_AT names the place."""

from __future__ import annotations

import os
import signal

_AT = os.environ.get("PALAVER_CRASH_AT", "")


def crash_point(name: str) -> None:
    """kill -9 ourselves when `name` is the one asked for."""
    if name == _AT:
        os.kill(os.getpid(), signal.SIGKILL)
