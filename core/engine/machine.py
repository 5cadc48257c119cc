"""What this machine gives us. Torch-free: who only measures or plans uses it too."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Microseconds of processor time a container has in so many of the clock's; more threads would be stopped in turns."""


def cores() -> int:
    """How many this process may use; a container's share of the machine counts, rounded down to whole ones."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no control groups, or no limit: then it says "max"
        quota, period = map(int, QUOTA.read_text("ascii").split())
        return max(1, min(seen, quota // period))
    return seen


def spin_briefly() -> None:
    """To be called before torch is imported: threads that share a step wait awake for some 0.03 ms, then asleep.

    libgomp's default is milliseconds. Where something else has one of the cores, a thread that waits awake takes the
    time of the very one it waits for. Whoever set GOMP_SPINCOUNT or OMP_WAIT_POLICY keeps it.
    https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
